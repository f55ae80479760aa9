"""Dynamic quantization taken back: operators that compute in float what integers with scales of the moment stood for.

    x -> DynamicQuantizeLinear -> q, s, z        MatMulInteger(q, w, z, v) -> Cast -> Mul by s * t

With the scale s of the moment, (q - z) * s is x but for rounding. The integers are read by products alone, which are
linear in them, and the scale multiplies the results of just these. So the same is computed with x in the place of q, 1
in that of s and 0 in that of z, by a MatMul of floats; `fold` puts t into the weight.
(https://onnx.ai/onnx/operators/onnx__DynamicQuantizeLinear.html)
"""

from __future__ import annotations

from collections.abc import Container

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.dequantized import Dequantized
from graphopt.graph import (
    Array,
    Names,
    constant_of,
    disconnect,
    has_input,
    is_constant,
    label_of,
    only_reader,
    producer,
    replace_uses,
)

_FLOAT_FORM = {"MatMulInteger": ("MatMul", -1), "ConvInteger": ("Conv", 0)}  # and the axis of the weight's channels


def why_not_undone(node: gs.Node, named: Container[int]) -> str | None:
    """Why a DynamicQuantizeLinear and what reads it cannot be told in float; None where it can.

    Args:
        node: the operator.
        named: ids of the tensors that are read by name (`graphopt.graph.named_tensors`).
    """
    stored, scale, zero_point = node.outputs
    if any(id(tensor) in named for tensor in node.outputs):
        return "what it stores is an output"
    products = stored.outputs
    scalings = [_scaling(product, scale, named) for product in products]
    for product, scaling in zip(products, scalings, strict=True):
        if product.op not in _FLOAT_FORM or product.inputs[0] is not stored or product.inputs[1] is stored:
            return f"{product.op} {label_of(product)} computes with what it stores"
        if not has_input(product, 2) or product.inputs[2] is not zero_point:
            return f"{product.op} {label_of(product)} reads it with another zero point"
        if not is_constant(product.inputs[1]) or (has_input(product, 3) and not is_constant(product.inputs[3])):
            return f"the weight of {product.op} {label_of(product)} is computed at run time"
        if scaling is None:
            return f"the result of {product.op} {label_of(product)} is not multiplied by its scale alone"
    known = {id(each) for each in (*products, *scalings)}
    if any(id(reader) not in known for tensor in (scale, zero_point) for reader in tensor.outputs):
        return "its scale or zero point is read by others than the products of what it stores"
    return None


def undo(node: gs.Node, names: Names) -> None:
    """Let all that read a DynamicQuantizeLinear, for which `why_not_undone` says nothing, compute in float."""
    real = node.inputs[0]
    stored, scale, _ = node.outputs
    one = gs.Constant(names.fresh(f"{scale.name}/one"), np.ones((), np.float32))
    for product in list(stored.outputs):
        (result,) = product.outputs
        weight = gs.Constant(names.fresh(f"{product.inputs[1].name}/float"), _centred(product))
        disconnect(product)
        product.op = _FLOAT_FORM[product.op][0]
        product.inputs.extend([real, weight])
        product.outputs.append(result)
        result.dtype = np.dtype(np.float32)
    replace_uses(scale, one)
    disconnect(node)


def _scaling(product: gs.Node, scale: gs.Tensor, named: Container[int]) -> gs.Node | None:
    """The Mul by which `scale` gets to a product: that of the result itself, or of it and the weight's scale."""
    cast = only_reader(product.outputs[0], named)
    mul = None if cast is None or cast.op != "Cast" else only_reader(cast.outputs[0], named)
    if cast is None or mul is None or mul.op != "Mul":
        return None
    factor = mul.inputs[1 if mul.inputs[0] is cast.outputs[0] else 0]
    if factor is scale:
        return mul
    of_both = producer(factor)
    if of_both is None or of_both.op != "Mul" or sum(each is scale for each in of_both.inputs) != 1:
        return None
    if not any(is_constant(each) for each in of_both.inputs):
        return None
    return of_both if only_reader(factor, named) is mul else None


def _centred(product: gs.Node) -> Array:
    """The integers of the weight less their zero points, one for all or one for each channel, as float32."""
    stored = constant_of(product.inputs[1])
    zero_point = constant_of(product.inputs[3]) if has_input(product, 3) else np.zeros((), np.uint8)
    assert stored is not None and zero_point is not None
    ones = np.ones(zero_point.shape, np.float32)
    return Dequantized.of(stored, ones, zero_point, _FLOAT_FORM[product.op][1]).values()
