"""Tensors that hold one value, known even where their shape is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from graphopt.graph import constant_of, producer
from graphopt.operators import MOVING


def filled_with(tensor: gs.Tensor) -> np.generic | None:
    """Return the one value that all elements of a tensor have; None where it is not known, or where there are none.

    Values of a weight that has to be read for that are not kept.
    """
    while True:
        if isinstance(tensor, gs.Constant):
            return _only_value(tensor._values)
        node = producer(tensor)
        if node is None or node.domain:
            return None
        if node.op == "ConstantOfShape":
            value = node.attrs.get("value")
            return np.float32(0) if value is None else _only_value(value._values)
        if node.op == "Constant":
            return _only_value(constant_of(tensor))
        if node.op == "Concat":
            values = [filled_with(part) for part in {id(part): part for part in node.inputs}.values()]
            return values[0] if all(_same(value, values[0]) for value in values) else None
        if node.op not in MOVING:
            return None
        tensor = node.inputs[0]


def _only_value(values: Any) -> np.generic | None:
    if values is None or np.dtype(values.dtype).kind not in "biuf":
        return None
    array = np.asarray(values.load() if isinstance(values, LazyValues) else values)
    if array.size == 0:
        return None
    first: np.generic = array.reshape(-1)[0]
    return first if bool((array == first).all()) else None


def _same(one: np.generic | None, other: np.generic | None) -> bool:
    return one is not None and other is not None and bool(one == other)
