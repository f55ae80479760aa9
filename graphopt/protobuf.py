"""Copies of protobuf messages that leave the heavy parts where they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from google.protobuf.descriptor import FieldDescriptor
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


def broken_texts(message: Message) -> Iterator[bytes]:
    """Yield names and other texts, nested ones too, that are not UTF-8: damage that protobuf reads as bytes."""
    for descriptor, value in message.ListFields():
        if descriptor.type == FieldDescriptor.TYPE_MESSAGE:
            for each in value if hasattr(value, "__len__") else (value,):
                yield from broken_texts(each)
        elif descriptor.type == FieldDescriptor.TYPE_STRING:
            texts = (value,) if isinstance(value, str | bytes) else value
            yield from (text for text in texts if isinstance(text, bytes))


def all_graph_protos(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield a graph and every graph nested in it, outermost first."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_graph_protos(attribute.g)
