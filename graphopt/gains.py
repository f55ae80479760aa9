"""Guards of single operators: whether int8 is possible for one, and whether it gains there; each with its reason.

They read the operator and the target's rule for it. What its neighbours make of it is for `graphopt.placement`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.graph import constant_of, has_input, is_constant, producer
from graphopt.sizes import fixed_shape
from graphopt.targets import Rule, Target
from graphopt.weights import is_weight


def why_float(node: gs.Node, rule: Rule, target: Target) -> str | None:
    """Why an operator whose rule says that it gains from int8 stays float; None when nothing speaks against int8."""
    if (reason := rule.why_not(node.op, node.attrs)) is not None:
        return reason
    value, weight = node.inputs[0], node.inputs[1]
    for tensor in (value, weight):
        if not is_float32(tensor):
            return f"{tensor.name} is {_dtype(tensor) or 'of unknown type'}; only float32 is quantized"
        if (rank := rank_of(tensor)) is not None and rank < 2:
            return f"{tensor.name} is a vector: there is no matrix product to speed up"
    if is_constant(value) and is_weight(weight):
        return "both inputs are constant: run fold first"
    if rule.needs_constant_weight and not is_weight(weight):
        if producer(weight) is None:
            return f"weight {weight.name} is a graph input that a caller may override: run freeze-inputs first"
        return f"weight {weight.name} is computed at run time"
    rows = fixed_shape(node.outputs[0])
    if rule.needs_rows and rows is not None and all(size == 1 for size in rows[:-1]):
        return "it multiplies a vector: int8 is no faster there"
    if weight.shape is None or not all(isinstance(size, int) for size in weight.shape):
        return None
    return _why_too_small(node, rule, target)


def keeps_integers(node: gs.Node, rule: Rule) -> bool:
    """Whether an operator with a rule other than gaining can run on integers with what it is given.

    New elements must be zeros or copies, which the zero point or the integers themselves stand for; an operand that the
    rule wants small must be constant and as small.
    """
    return rule.why_not(node.op, node.attrs) is None and _fills_with_zero(node, rule) and _fits(node, rule)


def is_float32(tensor: gs.Tensor) -> bool:
    """Whether a tensor is known to be float32."""
    return _dtype(tensor) == np.float32


def rank_of(tensor: gs.Tensor) -> int | None:
    """How many dimensions a tensor has; None when nobody knows."""
    return None if tensor.shape is None else len(tensor.shape)


def _why_too_small(node: gs.Node, rule: Rule, target: Target) -> str | None:
    """Whether too few channels meet in an operator, or its kernel is too large, for int8 to gain there."""
    least = rule.minimum_channels
    weight = tuple(node.inputs[1].shape)  # of an activation in its place, too
    group, kernel = node.attrs.get("group", 1), weight[2:]
    if rule.largest_kernel is not None and math.prod(kernel) > rule.largest_kernel:
        return f"its kernel has {math.prod(kernel)} places, and those of this type at most {rule.largest_kernel}"
    channels_in, channels_out = _channels(node, weight)
    if rule.counts_groups_alone:
        channels_in //= group
    if min(channels_in, channels_out) >= least:
        return None
    is_square, fits = len(set(kernel)) == 1, channels_out % target.channel_multiple == 0
    if rule.pads_inputs and group == 1 and is_square and fits and channels_out >= least:
        return None
    if group > 1 and fits and 0 < rule.minimum_grouped_kernel <= min(kernel, default=0):
        return None
    if rule.counts_groups_alone:
        return f"{channels_in} channels in and {channels_out} out of a group: under {least}, there is no kernel"
    return f"{channels_in} channels in and {channels_out} out: under {least}, int8 is no faster"


def _channels(node: gs.Node, shape: tuple[int, ...]) -> tuple[int, int]:
    """Input and output channels of a weighted operator from its weight's shape."""
    if node.op == "Conv":
        return shape[1] * node.attrs.get("group", 1), shape[0]
    if node.op == "ConvTranspose":
        return shape[0], shape[1] * node.attrs.get("group", 1)
    if node.op == "Gemm" and node.attrs.get("transB", 0):
        return shape[1], shape[0]
    return shape[-2], shape[-1]


def _fills_with_zero(node: gs.Node, rule: Rule) -> bool:
    if rule.filled_from is None or not has_input(node, rule.filled_from):
        return True
    value = constant_of(node.inputs[rule.filled_from])
    return value is not None and not value.any()


def _fits(node: gs.Node, rule: Rule) -> bool:
    if rule.largest_operand is None:
        return True
    values = constant_of(node.inputs[1])
    return values is not None and values.size > 0 and float(values.max()) <= rule.largest_operand


def _dtype(tensor: gs.Tensor) -> np.dtype[Any] | None:
    """A tensor's numpy dtype; None when it is not known or numpy has none."""
    dtype = tensor.dtype
    return None if dtype is None or isinstance(dtype, int) else np.dtype(dtype)
