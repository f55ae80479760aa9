"""Wire the quantizers of a placement into a graph: QuantizeLinear/DequantizeLinear pairs, integer weights.

A graph output that carries a pair keeps its name, on the DQ. What a target's runtime runs on integers without fusing it
is written between Q and DQ; a factor becomes the scale of a DQ.

Only what an int8 operator of the graph computes is replaced for all its readers; what a float operator computes, or a
branch reads from outside, is read as it is by all others. Integers of a weight that several branches read are stored
once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.biases import Bias
from graphopt.graph import (
    Array,
    Names,
    constant_of,
    disconnect,
    disconnect_all,
    has_input,
    integers_of,
    is_constant,
    is_output,
    named_tensors,
    nested_output_names,
    producer,
    replace_uses,
    set_input,
    set_output,
)
from graphopt.placement import Activation, Edge, Placement
from graphopt.quantization import UINT8, QuantParams, params_of_range, params_of_weight
from graphopt.ranges import Ranges
from graphopt.saturation import LARGEST_PAIR, largest_pairs
from graphopt.sizes import fixed_shape
from graphopt.targets import Target
from graphopt.weight_scales import WeightScales
from graphopt.weights import remove_unread_transpose, weight_values

_LARGEST_BIAS = 2.0**30
"""Half of what an int32 holds: the other half is for the products."""


def insert_pairs(
    graph: gs.Graph, target: Target, placements: Sequence[Placement], ranges: Ranges, scales: WeightScales
) -> None:
    """Change a graph and the graphs in it.

    Args:
        graph: the main graph.
        target: the table that the placements follow.
        placements: of the graph and those in it, outermost first.
        ranges: of all that carries a pair.
        scales: of weights, found already or here.
    """
    names, integers = Names(graph), dict[Hashable, list[gs.Constant]]()
    for placement in reversed(placements):  # a pair inside reads the tensor that a pair outside may then replace
        _Insertion(placement, target, ranges, scales, names, integers).run()


class _Insertion:
    """Wires a placement's pairs into its graph; `integers` has the weights that other graphs store already."""

    def __init__(
        self,
        placement: Placement,
        target: Target,
        ranges: Ranges,
        scales: WeightScales,
        names: Names,
        integers: dict[Hashable, list[gs.Constant]],
    ) -> None:
        self.graph = placement.graph
        self.target = target
        self.placement = placement
        self.ranges = ranges
        self.scales = scales
        self.names = names
        self.integers = integers
        self.new_nodes: list[gs.Node] = []
        self.nested_names = nested_output_names(self.graph)
        self.quantized = dict(placement.activations)
        self.quantized.update({each.tensor.name: each for each, _ in placement.rescaled})
        self.bias_adds = {id(producer(edge.node.inputs[1 - edge.index])): edge.node for edge in placement.biases}
        self.stored: dict[int, gs.Variable] = {}  # by id of a tensor, its integers
        self.replaced: set[int] = set()  # ids of nodes that others stand for now

    def run(self) -> None:
        """Change the graph."""
        between = [(node, node.inputs[0], node.outputs[0]) for node in self.placement.on_integers]
        sharing: dict[tuple[int, int | None], list[Edge]] = {}
        for edge, axis in self.placement.weights:
            sharing.setdefault((id(edge.tensor), axis), []).append(edge)
        for (_, axis), edges in sharing.items():
            weight, dequantized = edges[0].tensor, self._weight(edges, axis)
            for edge in edges:
                set_input(edge.node, edge.index, dequantized)
            remove_unread_transpose(self.graph, weight)
        for edge in self.placement.operands:
            set_input(edge.node, edge.index, self._operand(edge))
        for edge in self.placement.biases:
            self._flatten(edge)
        for name, activation in self.placement.activations.items():
            self._activation(activation, self.placement.readers[name])
        for activation, before in self.placement.rescaled:
            self._rescale(activation, before)
        for node, value, result in between:
            self._move_between(node, value, result)
        self._remove_replaced()
        self.graph.toposort()

    def _flatten(self, edge: Edge) -> None:
        """Make a bias of shape [1, N] a vector: onnxruntime fuses only those into int8 kernels."""
        values = constant_of(edge.tensor)
        assert values is not None
        if values.ndim > 1:
            name = self.names.fresh(f"{edge.tensor.name}_vector")
            set_input(edge.node, edge.index, gs.Constant(name, values.reshape(-1)))

    def _params(self, activation: Activation) -> QuantParams:
        found, quant_type = self.ranges.tensors[activation.range_name], self.target.activation
        low, high = found.minimum, found.maximum
        if quant_type.is_float:  # the precision of floats is relative: clipping makes no value finer
            low, high = found.observed_minimum, found.observed_maximum
        return params_of_range(low, high, quant_type).scaled(activation.factor)

    def _activation(self, activation: Activation, readers: tuple[Edge, ...]) -> None:
        tensor, params = activation.tensor, self._params(activation)
        is_int8 = tensor.name in self.placement.computed_by
        self._clip_before(tensor, params)
        if is_int8 and (is_output(self.graph, tensor) or tensor.name in self.nested_names):
            self._named_output(tensor, params)
            return
        pair_output = gs.Variable(self.names.fresh(f"{tensor.name}_dequantized"), tensor.dtype, tensor.shape)
        if is_int8:
            replace_uses(tensor, pair_output)
        else:
            for edge in readers:
                set_input(edge.node, edge.index, pair_output)
        self.stored[id(tensor)] = self._pair(tensor, pair_output, params)

    def _clip_before(self, tensor: gs.Tensor, params: QuantParams) -> None:
        """Put a pair before an activation function too, where it is all between a bias and the pair behind it.

        onnxruntime makes Reshape, Gemm, Reshape of a stack of matrices times a matrix plus a bias. It moves Qs before
        Reshapes, and only then drops a Relu or Clip that a Q makes redundant: the Gemm would run in float.
        """
        add, function = self.bias_adds.get(id(self.placement.computed_by.get(tensor.name))), producer(tensor)
        if add is None or function is None or function is add or len(tensor.shape or ()) < 3:
            return
        if self.target.activation.levels > UINT8.levels:  # no kernel takes those: each pair runs
            return
        before = function.inputs[0]
        clipped = gs.Variable(self.names.fresh(f"{before.name}_dequantized"), before.dtype, before.shape)
        set_input(function, 0, clipped)
        self._pair(before, clipped, params)

    def _rescale(self, activation: Activation, before: gs.Tensor) -> None:
        """Read the integers of `before` with the scale of `activation`, in place of the operator between them."""
        stored = self.stored[id(before)]
        self.stored[id(activation.tensor)] = stored
        node = producer(activation.tensor)
        assert node is not None
        disconnect(node)  # the DQ takes its output over, name and all
        self.replaced.add(id(node))
        params = self._params(activation)
        constants = self._constants(activation.tensor.name, params)
        self._add("DequantizeLinear", activation.tensor, [stored, *constants], activation.tensor, {})

    def _move_between(self, node: gs.Node, value: gs.Tensor, result: gs.Tensor) -> None:
        """Let an operator that reads `value` and computes `result` work on their integers."""
        stored, output = self.stored[id(value)], self.stored[id(result)]
        quantize = producer(output)
        assert quantize is not None
        constants = quantize.inputs[1:]
        zero_point = constants[1]
        disconnect(quantize)
        self.replaced.add(id(quantize))
        set_output(node, 0, output)
        if node.op == "PRelu":
            self._take_larger(node, constants)
            return
        set_input(node, 0, stored)
        if (border := _border(node, value)) is not None:
            self._concatenate(node, border, zero_point)
        elif len(node.inputs) > 2:
            set_input(node, 2, zero_point)
        elif node.attrs.get("mode", "constant") == "constant":
            node.inputs.append(zero_point)

    def _take_larger(self, node: gs.Node, constants: Sequence[gs.Tensor]) -> None:
        """Make a PRelu the larger one of x and slope * x, which it is where no slope is above 1.

        Both are quantized like the result, x by a LeakyRelu that leaves it as it is: a table of 256 entries.
        """
        value, slope = node.inputs
        operands: tuple[tuple[str, list[gs.Tensor], dict[str, Any]], ...]
        operands = ("LeakyRelu", [value], {"alpha": 1.0}), ("Mul", [value, slope], {})
        for index, (op, inputs, attributes) in enumerate(operands):
            (output,) = node.outputs
            real = gs.Variable(self.names.fresh(f"{output.name}_{op}"), np.dtype(np.float32), output.shape)
            integers = gs.Variable(self.names.fresh(f"{real.name}_quantized"), output.dtype, output.shape)
            self._add(op, real, inputs, real, attributes)
            self._add("QuantizeLinear", real, [real, *constants], integers, {})
            set_input(node, index, integers)
        node.op = "Max"

    def _concatenate(self, node: gs.Node, border: _Border, zero_point: gs.Constant) -> None:
        """Make a Pad along one axis a Concat with what it adds: onnxruntime copies larger pieces then."""
        (stored, *_), (output,) = node.inputs, node.outputs
        filled = [
            gs.Constant(self.names.fresh(f"{output.name}_border"), np.full(shape, zero_point.values))
            for shape in (border.before, border.after)
        ]
        disconnect(node)
        node.op = "Concat"
        node.attrs.clear()
        node.attrs["axis"] = border.axis
        node.inputs.extend(each for each in (filled[0], stored, filled[1]) if each is stored or each.values.size)
        node.outputs.append(output)

    def _remove_replaced(self) -> None:
        """Take out what others stand for now, and each DQ that only they read."""
        named = named_tensors(self.graph)
        unread = [
            node
            for node in self.new_nodes
            if node.op == "DequantizeLinear" and not node.outputs[0].outputs and id(node.outputs[0]) not in named
        ]
        disconnect_all(unread)
        gone = self.replaced | {id(node) for node in unread}
        self.graph.nodes[:] = [node for node in (*self.graph.nodes, *self.new_nodes) if id(node) not in gone]

    def _named_output(self, tensor: gs.Tensor, params: QuantParams) -> None:
        """Put a pair before a tensor whose name must stay: a new tensor takes its place at the producer."""
        node = producer(tensor)
        assert node is not None
        index = next(index for index, output in enumerate(node.outputs) if output is tensor)
        before = gs.Variable(self.names.fresh(f"{tensor.name}_float"), tensor.dtype, tensor.shape)
        node.outputs[index] = before
        self.stored[id(tensor)] = self._pair(before, tensor, params)

    def _pair(self, tensor: gs.Tensor, output: gs.Tensor, params: QuantParams) -> gs.Variable:
        """Add tensor -> Q -> DQ -> output; return the integers between them."""
        constants = self._constants(tensor.name, params)
        stored = gs.Variable(self.names.fresh(f"{tensor.name}_quantized"), params.quant_type.dtype, tensor.shape)
        attributes = {} if params.axis is None else {"axis": params.axis}
        self._add("QuantizeLinear", tensor, [tensor, *constants], stored, attributes)
        self._add("DequantizeLinear", tensor, [stored, *constants], output, attributes)
        return stored

    def _weight(self, edges: Sequence[Edge], axis: int | None) -> gs.Variable:
        """The Q/DQ pair of a weight, for all that read it."""
        weight = edges[0].tensor
        values = weight_values(weight)
        least = reduce(np.maximum, (self._least_scale(edge, axis, values) for edge in edges))
        if self.ranges.covering_weights:
            params = params_of_weight(values, axis, self.target.weight, least=least)
        else:
            mean_share = max(map(self._mean_share, edges))
            params = self.scales.params(values, axis, self.target.weight, least=least, mean_share=mean_share)
        return self._constant_pair(weight, params)

    def _mean_share(self, edge: Edge) -> float:
        """How much of the power of what a weight is multiplied with is that of its mean; 0 where nobody observed it."""
        data = self.quantized.get(edge.node.inputs[1 - edge.index].name)
        found = None if data is None else self.ranges.tensors[data.range_name]
        if found is None or found.mean is None or not found.second_moment:
            return 0.0
        return min(found.mean**2 / found.second_moment, 1.0)

    def _least_scale(self, edge: Edge, axis: int | None, values: Array) -> Array:
        """The least scale with which sums do not saturate, of each channel of a weight along `axis` (None: one)."""
        least = np.zeros(1) if axis is None else self._least_scale_for_bias(edge, axis)
        if not self.target.saturates:
            return least
        pairs = largest_pairs(edge.node, values) / (LARGEST_PAIR - 1)  # rounding adds up to half a step to each of two
        return np.maximum(least, pairs.max() if axis is None else pairs)

    def _least_scale_for_bias(self, edge: Edge, axis: int) -> Array:
        """The least scale of each channel of a weight with which its bias fits an int32.

        A kernel adds the bias as an integer, round(bias / (scale of x * scale of w)). A channel whose weights are all
        but zero, as training leaves behind a BatchNormalization, would need more bits; weights that far below the
        bias are nothing in float32 beside it.
        """
        bias, data = self._bias_of(edge.node), self.quantized.get(edge.node.inputs[1 - edge.index].name)
        if bias is None or data is None or bias.size not in (1, edge.tensor.shape[axis]):
            return np.zeros(1)
        return np.asarray(np.abs(bias.reshape(-1).astype(np.float64)) / (self._params(data).scale * _LARGEST_BIAS))

    def _bias_of(self, node: gs.Node) -> Array | None:
        add = self.bias_adds.get(id(node))
        bias = Bias(node, add)
        return bias.values() if add is not None or (has_input(node, 2) and is_constant(node.inputs[2])) else None

    def _operand(self, edge: Edge) -> gs.Variable:
        """A constant that meets activations: quantized as they are, over its own range."""
        values = constant_of(edge.tensor)
        assert values is not None
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
        return self._constant_pair(edge.tensor, params_of_range(low, high, self.target.activation))

    def _constant_pair(self, constant: gs.Tensor, params: QuantParams) -> gs.Variable:
        output = gs.Variable(self.names.fresh(f"{constant.name}_dequantized"), np.dtype(np.float32), constant.shape)
        if not self.target.stores_int8_weights:
            self._pair(constant, output, params)
            return output
        key = id(constant), params.axis, params.quant_type, params.scale.tobytes()
        if key not in self.integers:
            integers = params.quantize(weight_values(constant))
            stored = gs.Constant(self.names.fresh(f"{constant.name}_quantized"), integers)
            self.integers[key] = [stored, *self._constants(constant.name, params)]
        attributes = {} if params.axis is None else {"axis": params.axis}
        self._add("DequantizeLinear", constant, list(self.integers[key]), output, attributes)
        return output

    def _constants(self, name: str, params: QuantParams) -> list[gs.Constant]:
        scale = gs.Constant(self.names.fresh(f"{name}_scale"), params.scale)
        zero_point = gs.Constant(self.names.fresh(f"{name}_zero_point"), params.zero_point)
        return [scale, zero_point]

    def _add(
        self, op: str, about: gs.Tensor, inputs: list[gs.Tensor], output: gs.Tensor, attributes: dict[str, Any]
    ) -> None:
        name = self.names.fresh(f"{about.name}_{op}")
        self.new_nodes.append(gs.Node(op, name, attributes, inputs, [output]))


class _Border(NamedTuple):
    """What a Pad adds along its one axis, as shapes."""

    axis: int
    before: tuple[int, ...]
    after: tuple[int, ...]


def _border(node: gs.Node, value: gs.Tensor) -> _Border | None:
    """The border of a Pad that adds the zero point along one axis of a tensor of known sizes; else None."""
    shape, pads = fixed_shape(value), integers_of(node, 1)
    if node.attrs.get("mode", "constant") != "constant" or shape is None or pads is None or has_input(node, 3):
        return None
    before, after = pads[: len(shape)], pads[len(shape) :]
    axes = [axis for axis in range(len(shape)) if before[axis] or after[axis]]
    if len(axes) != 1 or min(pads) < 0 or math.prod(shape) == 0:
        return None
    (axis,) = axes
    sizes = [(*shape[:axis], length, *shape[axis + 1 :]) for length in (before[axis], after[axis])]
    return _Border(axis, *sizes)
