"""Copies of protobuf messages that leave the heavy parts where they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from google.protobuf.message import Message
from onnx import GraphProto

Proto = TypeVar("Proto", bound=Message)


def without(message: Proto, *fields: str) -> Proto:
    """Return a copy of a protobuf message without some of its fields, which are not even read."""
    copy: Proto = type(message)()
    for descriptor, value in message.ListFields():
        name = descriptor.name
        if name in fields:
            continue
        if isinstance(value, Message):
            getattr(copy, name).CopyFrom(value)
        elif hasattr(value, "__len__") and not isinstance(value, str | bytes):
            getattr(copy, name).extend(value)
        else:
            setattr(copy, name, value)
    return copy


def all_graph_protos(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield a graph and every graph nested in it, outermost first."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_graph_protos(attribute.g)
