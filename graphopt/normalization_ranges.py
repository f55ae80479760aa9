"""What the BatchNormalizations of a model tell of the values of its tensors, without any data.

Behind a BatchNormalization channel c has the mean beta[c] and the standard deviation |gamma[c]| over the training data,
for which Nagel et al. take a normal distribution (2019, "Data-Free Quantization Through Weight Equalization and Bias
Correction", sections 4.2.1 and 5.1.2). So a channel is there a function of one standard normal variable z,

    y[c](z) = beta[c] + gamma[c] * sqrt(var[c] / (var[c] + epsilon)) * z

which is kept as its values at fixed points z. From there it is carried on:

- elementwise operators, activation functions first of all, are run on those values: one rule for all of them, and for
  SiLU and the like, whose parts are functions of the same z
- of tensors that depend on different variables, such as the branches of a residual Add, these count as independent;
  the values at all pairs of points are sorted, which gives the quantiles of the result
- operators that move, join, choose or interpolate elements (Transpose, Concat, Slice, MaxPool ...) are run on a tensor
  that holds the number of its channel in each place: that shows where channels go. The values of a channel count as
  they were, so the bounds hold, but the mean is a guess behind a maximum, and the deviation one behind an average

An elementwise operator that is bounded whatever it reads, such as Sigmoid or Clip, and Softmax tell a range without any
statistics: their values count as uniform between the bounds.

Nothing is told behind what adds over places or channels (Conv, Gemm, GlobalAveragePool), where channels no longer lie
along one axis, or of other types than float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from statistics import NormalDist

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graphopt.affine import AffineNode, affine_of, is_batch_norm
from graphopt.evaluate import evaluate
from graphopt.graph import Array, constant_of, is_constant, present
from graphopt.model_io import Model
from graphopt.node_order import sorted_nodes
from graphopt.operators import ELEMENTWISE, MIXING, MOVING
from graphopt.sizes import at_assumed_sizes, fixed_shape

STORED, BOUNDS = "batch-norm", "bounds"
"""What tells a distribution."""

REACH = 5.5
"""Standard deviations on each side that a range covers; of normal values 4e-8 are beyond. The paper takes 6; 5.5 was
better on three of five real nets, for symmetric types on all five, and 5 clips too much on one."""

_POINTS = np.linspace(-REACH, REACH, 89)  # an eighth apart, 0 among them
_NORMAL = NormalDist()
_BELOW = np.array([_NORMAL.cdf(point) for point in _POINTS])  # the shares of values below the points
_UNIFORM = (_BELOW - _BELOW[0]) / (_BELOW[-1] - _BELOW[0])
_COARSE = slice(None, None, 2)  # the points of which all pairs are taken
_MOST_CHANNELS = 1 << 14  # a flattened image has more: too many to carry on
_ROUNDING = 1e-2  # of numbers of channels that an average has gone over
_EPSILON = 1e-5  # of BatchNormalization's operator page
_FAR_AND_FARTHER = (1e3, 1e6)  # an operator that does the same on both is bounded
_SETTLED = 1e-2  # relative difference of bounds that are the same

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Distribution:
    """What the values of a tensor are like: each channel a function of a standard normal variable.

    Attributes:
        values: [C, points] of each channel at the points; C is 1 where there are no channels.
        axis: along which the channels lie, counted from the end; None where there are none.
        variable: tensors of the same number are functions of the same variable in each place.
        told_by: `STORED`, where statistics play a part, or `BOUNDS`.
    """

    values: Values
    axis: int | None
    variable: int
    told_by: str = STORED

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest value of all channels, each within `REACH` standard deviations."""
        return float(self.values.min()), float(self.values.max())

    @property
    def mean(self) -> Values:
        """[C], the means."""
        return self.values @ _WEIGHTS

    @property
    def deviation(self) -> Values:
        """[C], the standard deviations."""
        return np.asarray(np.sqrt(np.maximum(self.values**2 @ _WEIGHTS - self.mean**2, 0)))


def _weights(points: Values) -> Values:
    density = np.exp(-(points**2) / 2)
    return np.asarray(density / density.sum())


_WEIGHTS = _weights(_POINTS)


def predicted_distributions(model: Model) -> dict[str, Distribution]:
    """The distributions of the tensors of a model's main graph that can be told without data, by name.

    Args:
        model: as it was before `fold` took BatchNormalization away; it is left as it is.
    """
    graph, _ = at_assumed_sizes(model.graph, tuple(model.frame.defaults))
    return _Propagation(graph, tuple(model.frame.defaults)).run()


@dataclass
class _Propagation:
    graph: gs.Graph
    defaults: Sequence[str]
    known: dict[int, Distribution] = field(default_factory=dict)  # by id of the tensor
    variables: Iterator[int] = field(default_factory=count)

    def run(self) -> dict[str, Distribution]:
        names: dict[str, Distribution] = {}
        for node in sorted_nodes(self.graph):
            for tensor, distribution in self._outputs(node):
                if tensor.dtype == np.float32 and np.isfinite(distribution.values).all():
                    self.known[id(tensor)] = names[tensor.name] = distribution
        return names

    def _outputs(self, node: gs.Node) -> list[tuple[gs.Tensor, Distribution]]:
        if is_batch_norm(node):
            return self._normalized(node)
        computed = [tensor for tensor in present(node.inputs) if not is_constant(tensor)]
        if node.domain or not computed or any(tensor.dtype != np.float32 for tensor in computed):
            return []
        if node.op == "Softmax":
            return [(node.outputs[0], self._uniform(np.array([[0.0, 1.0]]), None))]
        if not all(id(tensor) in self.known for tensor in computed):
            return self._bounded(node, computed) if node.op in ELEMENTWISE else []
        if node.op == "Identity":
            return [(node.outputs[0], self.known[id(node.inputs[0])])]
        if node.op in ELEMENTWISE:
            return self._elementwise(node, computed)
        return self._moved(node, computed) if self._moves(node) else []

    def _moves(self, node: gs.Node) -> bool:
        if node.op == "Concat":  # elements of constants would count as numbers of channels
            return not any(is_constant(tensor) for tensor in node.inputs)
        return node.op in MOVING | MIXING and node.attrs.get("mode") != "cubic"  # which overshoots

    def _uniform(self, bounds: Values, axis: int | None) -> Distribution:
        """[C, 2], the lowest and the highest value of each channel, as a distribution."""
        low, high = bounds[:, :1], bounds[:, 1:]
        return Distribution(low + (high - low) * _UNIFORM, axis, next(self.variables), BOUNDS)

    def _normalized(self, node: gs.Node) -> list[tuple[gs.Tensor, Distribution]]:
        found = affine_of(node, self.graph.opset, self.defaults)
        if not isinstance(found, AffineNode) or found.affine.axis is None:
            return []
        gamma, beta, _, variance = (
            np.asarray(constant_of(tensor), np.float64).reshape(-1, 1) for tensor in node.inputs[1:5]
        )
        shrunk = np.sqrt(variance / (variance + node.attrs.get("epsilon", _EPSILON)))
        values = beta + np.abs(gamma) * shrunk * _POINTS
        return [(node.outputs[0], Distribution(values, found.affine.axis, next(self.variables)))]

    def _bounded(self, node: gs.Node, computed: list[gs.Tensor]) -> list[tuple[gs.Tensor, Distribution]]:
        """Run an operator of one unknown tensor on values far from zero and farther, and see whether that matters."""
        if len({id(tensor) for tensor in computed}) > 1:
            return []
        bounds: list[Values] = []
        axis: int | None = None
        for reach in _FAR_AND_FARTHER:
            found = self._run(node, {id(computed[0]): reach * np.linspace(-1, 1, 9)[None]}, {None})
            if found is None or not np.isfinite(found[0]).all():
                return []
            values, axis = found
            bounds.append(np.stack([values.min(axis=1), values.max(axis=1)], axis=1))
        near, far = bounds
        if not np.allclose(near, far, rtol=_SETTLED, atol=0):
            return []
        return [(node.outputs[0], self._uniform(far, axis))]

    def _elementwise(self, node: gs.Node, computed: list[gs.Tensor]) -> list[tuple[gs.Tensor, Distribution]]:
        """Run the node on arrays [C, points] or, for two variables, [C, points of one, points of the other]."""
        inputs = {id(tensor): self.known[id(tensor)] for tensor in computed}
        variables = sorted({each.variable for each in inputs.values()})
        if len(variables) > 2:
            return []
        feed: dict[int, Array] = {}
        for key, each in inputs.items():
            values = each.values if len(variables) == 1 else each.values[:, _COARSE]
            places = [values.shape[1] if each.variable == variable else 1 for variable in variables]
            feed[key] = values.reshape(len(values), *places)
        found = self._run(node, feed, {each.axis for each in inputs.values()})
        if found is None:
            return []
        values, axis = found
        told_by = STORED if any(each.told_by == STORED for each in inputs.values()) else BOUNDS
        if len(variables) == 1:
            return [(node.outputs[0], Distribution(values, axis, variables[0], told_by))]
        return [(node.outputs[0], Distribution(_quantiles(values), axis, next(self.variables), told_by))]

    def _run(self, node: gs.Node, feed: Mapping[int, Array], axes: set[int | None]) -> tuple[Values, int | None] | None:
        """What an elementwise node makes of arrays [C, ...] and its constants, and the axis of its channels.

        None where the constants or the inputs vary along two axes, or onnxruntime does not run it.
        """
        arrays = {key: value.astype(np.float32) for key, value in feed.items()}
        points = next(iter(feed.values())).ndim - 1
        along = set(axes)
        for tensor in present(node.inputs):
            value = constant_of(tensor)
            if value is not None:
                along.update(index - value.ndim for index, size in enumerate(value.shape) if size != 1)
                arrays[id(tensor)] = value.reshape(()) if value.size == 1 else value.reshape(-1, *[1] * points)
        along.discard(None)
        if len(along) > 1:
            return None
        result = evaluate([node], arrays, node.outputs, self.graph.import_domains).values.get(id(node.outputs[0]))
        return None if result is None else (result.astype(np.float64), next(iter(along), None))

    def _moved(self, node: gs.Node, computed: list[gs.Tensor]) -> list[tuple[gs.Tensor, Distribution]]:
        """Run the node on numbers of channels; those of its further inputs go on counting."""
        feed: dict[int, Array] = {}
        rows: list[Values] = []
        inputs = {id(tensor): self.known[id(tensor)] for tensor in computed}
        for tensor in {id(each): each for each in computed}.values():
            each, shape = inputs[id(tensor)], fixed_shape(tensor)
            if shape is None or 0 in shape:
                return []
            numbers = np.arange(len(each.values), dtype=np.float32) + sum(map(len, rows))
            along = numbers.reshape(()) if each.axis is None else numbers.reshape(-1, *[1] * (-each.axis - 1))
            feed[id(tensor)] = np.ascontiguousarray(np.broadcast_to(along, shape))
            rows.append(each.values)
        feed |= {id(tensor): np.asarray(constant_of(tensor)) for tensor in node.inputs if is_constant(tensor)}
        found = evaluate([node], feed, node.outputs, self.graph.import_domains).values
        told_by = STORED if any(each.told_by == STORED for each in inputs.values()) else BOUNDS
        outputs = []
        for tensor in present(node.outputs):
            place = _along_one_axis(found[id(tensor)]) if id(tensor) in found else None
            if place is not None:
                values = np.concatenate(rows)[place[1]]
                outputs.append((tensor, Distribution(values, place[0], next(self.variables), told_by)))
        return outputs


def _quantiles(values: Values) -> Values:
    """[C, n, n] at all pairs of points of two independent variables -> [C, points] of one variable."""
    points = _POINTS[_COARSE]
    weights = np.outer(_weights(points), _weights(points)).reshape(-1)
    flat = values.reshape(len(values), -1)
    order = np.argsort(flat, axis=1)
    below = np.cumsum(weights[order], axis=1) - weights[order] / 2
    ordered = np.take_along_axis(flat, order, axis=1)
    return np.stack([np.interp(_BELOW, shares, row) for shares, row in zip(below, ordered, strict=True)])


def _along_one_axis(found: Array) -> tuple[int | None, NDArray[np.intp]] | None:
    """The axis, counted from the end, along which numbers differ, and what they are there.

    None where that is not one axis, where averages have mixed numbers or counted padding, or where there are too many.
    """
    numbers = found.round()
    if numbers.size == 0 or np.abs(numbers - found).max() > _ROUNDING:
        return None
    axes = [axis for axis in range(numbers.ndim) if (numbers != numbers.take([0], axis)).any()]
    first = tuple(slice(None) if axis in axes else 0 for axis in range(numbers.ndim))
    if len(axes) > 1 or numbers[first].size > _MOST_CHANNELS:
        return None
    return (axes[0] - numbers.ndim if axes else None), numbers[first].reshape(-1).astype(np.intp)
