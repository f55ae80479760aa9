"""Whether a tensor is known to hold nothing below zero, by the operators behind it."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.graph import constant_of, producer
from graphopt.operators import MOVING, NEVER_NEGATIVE
from graphopt.quantizers import quantizer_of

_KEEP_SIGN = MOVING | {"AveragePool", "Concat", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "Split"}
_MOST_STEPS = 64  # of the search


def is_never_negative(tensor: gs.Tensor) -> bool:
    """Search backwards for what makes a tensor never negative; False where nothing is found."""
    waiting, steps = [tensor], 0
    while waiting:
        node = producer(waiting.pop())
        steps += 1
        if node is None or steps > _MOST_STEPS:
            return False
        if node.op in NEVER_NEGATIVE or _clips_at_zero(node):
            continue
        if node.op in ("Add", "Mul", "Concat"):
            waiting.extend(node.inputs)
        elif node.op in _KEEP_SIGN or quantizer_of(node) is not None:
            waiting.append(node.inputs[0])
        else:
            return False
    return True


def _clips_at_zero(node: gs.Node) -> bool:
    if node.op != "Clip":
        return False
    low = constant_of(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1].name else node.attrs.get("min")
    return low is not None and float(np.asarray(low)) >= 0
