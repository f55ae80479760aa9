"""Fold on random networks: valid by construction, so whatever Fold makes of them must be valid and do the same."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.printer
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from graphopt.graph import all_graphs
from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes.fold import Fold
from graphopt.runtime import open_session

_LARGEST = 2000  # elements of a tensor for one sample
_TOLERANCE = 1e-4  # of the largest magnitude in an output


class _Value(NamedTuple):
    name: str
    shape: tuple[int, ...]  # without the batch, which is axis 0 of every tensor


class _Network:
    """A network that grows by one operator, or a few that belong together, at a time."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw = draw
        self.opset = draw(st.sampled_from([13, 17, 21, 23]))
        self.rng = np.random.default_rng(draw(st.integers(0, 2**16)))
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.values = [_Value("x", draw(st.sampled_from([(4, 6, 6), (3, 6, 5), (4, 8), (3, 2, 4, 4), (6,)])))]

    def any_value(self) -> _Value:
        """Mostly the newest, so that chains arise, but older ones too, so that tensors have several readers."""
        back = self.draw(st.sampled_from([0, 0, 0, 0, 1, 2, 3]))
        return self.values[max(0, len(self.values) - 1 - back)]

    def weight(self, values: np.ndarray, dtype: type = np.float32) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = np.asarray(values, dtype)
        return name

    def linear_weight(self, shape: tuple[int, ...], inputs: int) -> str:
        """A weight that another operator reads already, or a new one."""
        same = [name for name, values in self.weights.items() if values.shape == shape]
        if same and self.draw(st.booleans()):
            return same[0]
        return self.weight(self.rng.standard_normal(shape) / np.sqrt(inputs))

    def factor(self, shape: tuple[int, ...]) -> str:
        return self.weight(self.rng.uniform(0.5, 2, shape) * self.rng.choice([-1, 1], shape))

    def add(self, op: str, inputs: list[str], shape: tuple[int, ...] | None = None, **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        if shape is not None:
            self.values.append(_Value(name, shape))
        return name

    def model(self, outputs: list[_Value]) -> ModelProto:
        infos = [helper.make_tensor_value_info(each.name, TensorProto.FLOAT, ["N", *each.shape]) for each in outputs]
        first = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *self.values[0].shape])
        weights = [numpy_helper.from_array(values, name) for name, values in self.weights.items()]
        graph = helper.make_graph(self.nodes, "random", [first], infos, weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)


def _conv(net: _Network, value: _Value) -> None:
    if len(value.shape) < 2:
        return
    channels, *sizes = value.shape
    kernel, pad = net.draw(st.sampled_from([(1, 0), (3, 0), (3, 1), (2, 0)]))
    group = net.draw(st.sampled_from([1, 1, channels]))
    made = net.draw(st.sampled_from([channels, 2 * channels] if group == channels else [channels, 3, 1]))
    result = (made, *(size + 2 * pad - kernel + 1 for size in sizes))
    if min(result) >= 1 and np.prod(result) <= _LARGEST:
        _add_conv(net, value, kernel, pad, group, result)


def _add_conv(net: _Network, value: _Value, kernel: int, pad: int, group: int, result: tuple[int, ...]) -> str:
    spatial, inputs = len(result) - 1, value.shape[0] // group
    weight = net.linear_weight((result[0], inputs, *[kernel] * spatial), inputs * kernel**spatial)
    bias = [net.weight(net.rng.standard_normal(result[0]))] if net.draw(st.booleans()) else []
    return net.add("Conv", [value.name, weight, *bias], result, group=group, pads=[pad] * 2 * spatial)


def _parallel_convs(net: _Network, value: _Value) -> None:
    """A sum of Convs of one input, and of the input itself."""
    if len(value.shape) < 2:
        return
    kinds = net.draw(st.lists(st.sampled_from([(3, 1), (1, 0), None]), min_size=2, max_size=3))
    names = []
    for kind in kinds:
        name = value.name if kind is None else _add_conv(net, value, *kind, 1, value.shape)
        if net.draw(st.booleans()):
            _norm(net, _Value(name, value.shape))
            name = net.values[-1].name
        names.append(name)
    for name in names[1:]:
        names[0] = net.add("Add", [names[0], name], value.shape)


def _norm(net: _Network, value: _Value) -> None:
    channels = value.shape[0]
    scale, shift, mean = (net.rng.uniform(-1.5, 1.5, channels) for _ in range(3))
    if net.draw(st.booleans()):
        shift, mean = np.zeros(channels), np.zeros(channels)
    names = [net.weight(each) for each in (scale, shift, mean, net.rng.uniform(0.5, 2, channels))]
    net.add("BatchNormalization", [value.name, *names], value.shape)


def _affine(net: _Network, value: _Value) -> None:
    op = net.draw(st.sampled_from(["Mul", "Add", "Sub", "Div"]))
    net.add(op, _operands(net, op, value), value.shape)


def _operands(net: _Network, op: str, value: _Value) -> list[str]:
    whole = (1, *value.shape)
    if net.draw(st.booleans()):  # along the channels, as exporters write it
        shape = (value.shape[0], *[1] * (len(value.shape) - 1))
    else:
        rank = net.draw(st.integers(0, len(whole)))
        shape = tuple(size if net.draw(st.booleans()) else 1 for size in whole[len(whole) - rank :])
    operands = [value.name, net.factor(shape)]
    if op != "Div" and net.draw(st.booleans()):  # a quotient of a constant may be of any size
        operands.reverse()
    return operands


def _neutral(net: _Network, value: _Value) -> None:
    """An operator that returns its input, unless its constant repeats that along an axis of size 1."""
    op, element = net.draw(st.sampled_from([("Mul", 1), ("Add", 0), ("Sub", 0), ("Div", 1)]))
    shape = net.draw(st.sampled_from([(), (1,), value.shape]))
    if 1 in value.shape:
        shape = tuple(2 if size == 1 else size for size in value.shape)
    result = np.broadcast_shapes(shape, value.shape)
    net.add(op, [value.name, net.weight(np.full(shape, element))], result)


def _unary(net: _Network, value: _Value) -> None:
    net.add(net.draw(st.sampled_from(["Relu", "Identity", "Dropout", "Tanh", "Neg"])), [value.name], value.shape)


def _reciprocal(net: _Network, value: _Value) -> None:
    positive = net.add("Sigmoid", [value.name], value.shape)
    away = net.add("Add", [positive, net.weight(np.array(0.5))], value.shape)
    net.add("Div", [net.factor(()), away], value.shape)


def _padded(net: _Network, value: _Value) -> None:
    """A Pad, and mostly what pads too or pools next."""
    if len(value.shape) < 2:
        return
    pads = [0, 0, *(net.draw(st.integers(0, 1)) for _ in value.shape[1:])]
    result = (value.shape[0], *(size + 2 * pad for size, pad in zip(value.shape[1:], pads[2:], strict=True)))
    if np.prod(result) > _LARGEST:
        return
    inputs = [value.name, net.weight(np.array(pads * 2), np.int64)]
    mode = net.draw(st.sampled_from(["constant", "constant", "constant", "edge"]))
    if mode == "constant" and net.draw(st.booleans()):
        inputs.append(net.weight(np.array(net.draw(st.sampled_from([0.0, 0.0, 1.0])))))
    padded = _Value(net.add("Pad", inputs, result, mode=mode), result)
    net.draw(st.sampled_from([_conv, _conv, _pool, _norm]))(net, padded)


def _pool(net: _Network, value: _Value) -> None:
    if len(value.shape) < 2 or min(value.shape[1:]) < 2:
        return
    result = (value.shape[0], *(size - 1 for size in value.shape[1:]))
    op = net.draw(st.sampled_from(["AveragePool", "MaxPool"]))
    counting = {"count_include_pad": 1} if op == "AveragePool" else {}
    net.add(op, [value.name], result, kernel_shape=[2] * len(value.shape[1:]), **counting)


def _transpose(net: _Network, value: _Value) -> None:
    order = net.draw(st.permutations(range(1, len(value.shape) + 1)))
    shape = tuple(value.shape[axis - 1] for axis in order)
    net.add("Transpose", [value.name], shape, perm=[0, *order])
    if net.draw(st.booleans()):
        net.draw(st.sampled_from([_affine, _unary, _neutral]))(net, net.values[-1])
        newest, back = net.values[-1], [order.index(axis) for axis in sorted(order)]
        shape = tuple(newest.shape[axis] for axis in back)
        net.add("Transpose", [newest.name], shape, perm=[0, *(1 + axis for axis in back)])


def _reshape(net: _Network, value: _Value) -> None:
    """A Reshape to a constant shape, or to one that the model computes from the batch size; perhaps another."""
    elements = int(np.prod(value.shape))
    size = net.draw(st.sampled_from([each for each in range(1, elements + 1) if elements % each == 0]))
    result = net.draw(st.sampled_from([(elements,), (size, elements // size)]))
    if net.draw(st.booleans()):
        net.add("Reshape", [value.name, net.weight(np.array([-1, *result]), np.int64)], result)
        if net.draw(st.booleans()):
            back = net.weight(np.array([0, *value.shape] if len(value.shape) > 1 else [0, -1]), np.int64)
            net.add("Reshape", [net.values[-1].name, back], value.shape)
        return
    axis = net.weight(np.array([0]), np.int64)
    batch = net.add("Gather", [net.add("Shape", [value.name]), net.weight(np.array(0), np.int64)])
    sizes = [net.add("Unsqueeze", [batch, axis]), net.weight(np.array([*result[:-1], -1]), np.int64)]
    net.add("Reshape", [value.name, net.add("Concat", sizes, axis=0)], result)


def _flatten(net: _Network, value: _Value) -> None:
    net.add("Flatten", [value.name], (int(np.prod(value.shape)),))


def _concat(net: _Network, value: _Value) -> None:
    others = [each for each in net.values if each.shape[1:] == value.shape[1:]]
    other = net.draw(st.sampled_from(others))
    result = (value.shape[0] + other.shape[0], *value.shape[1:])
    if np.prod(result) <= _LARGEST:
        net.add("Concat", [value.name, other.name], result, axis=1)


def _sum(net: _Network, value: _Value) -> None:
    other = net.draw(st.sampled_from([each for each in net.values if each.shape == value.shape]))
    net.add(net.draw(st.sampled_from(["Sum", "Add", "Mul"])), [value.name, other.name], value.shape)


def _matmul(net: _Network, value: _Value) -> None:
    if len(value.shape) > 2 or value.shape[-1] > 200:
        return
    made = net.draw(st.integers(1, 6))
    weight = net.linear_weight((value.shape[-1], made), value.shape[-1])
    name = net.add("MatMul", [value.name, weight], (*value.shape[:-1], made))
    if net.draw(st.booleans()):
        bias = [name, net.weight(net.rng.standard_normal(made))]
        net.add("Add", bias if net.draw(st.booleans()) else bias[::-1], (*value.shape[:-1], made))


def _gemm(net: _Network, value: _Value) -> None:
    if len(value.shape) > 1 or value.shape[-1] > 200:
        return
    made, turned = net.draw(st.integers(1, 6)), net.draw(st.booleans())
    shape = (made, value.shape[0]) if turned else (value.shape[0], made)
    bias = [net.weight(net.rng.standard_normal(made))] if net.draw(st.booleans()) else []
    inputs = [value.name, net.linear_weight(shape, value.shape[0]), *bias]
    net.add("Gemm", inputs, (made,), transB=int(turned), alpha=net.draw(st.sampled_from([1.0, 0.5])), beta=2.0)


def _twice(net: _Network, value: _Value) -> None:
    op = net.draw(st.sampled_from(["Tanh", "Relu"]))
    names = [net.add(op, [value.name], value.shape) for _ in range(2)]
    net.add("Add", names, value.shape)


def _branches(net: _Network, value: _Value) -> None:
    if net.draw(st.booleans()):
        condition = f"b{len(net.weights)}"
        net.weights[condition] = np.array(net.draw(st.booleans()))
    else:
        largest = net.add("ReduceMax", [value.name], keepdims=0)
        condition = net.add("Greater", [largest, net.weight(np.array(0.5))])
    bodies = {branch: _body(net, value, branch) for branch in ("then_branch", "else_branch")}
    net.add("If", [condition], value.shape, **bodies)


def _body(net: _Network, value: _Value, branch: str) -> GraphProto:
    outer, net.nodes = net.nodes, []
    known = len(net.values)
    names = [f"{branch}{len(outer)}_{index}" for index in range(3)]
    nodes, newest = [], value.name
    for name in names[: net.draw(st.integers(1, 3))]:
        op = net.draw(st.sampled_from(["Mul", "Add", "Relu", "Identity"]))
        inputs = [newest] if op in ("Relu", "Identity") else _operands(net, op, _Value(newest, value.shape))
        nodes.append(helper.make_node(op, inputs, [name]))
        newest = name
    net.nodes = outer
    del net.values[known:]
    output = helper.make_tensor_value_info(newest, TensorProto.FLOAT, ["N", *value.shape])
    return helper.make_graph(nodes, branch, [], [output])


def _layer(net: _Network, value: _Value) -> None:
    """A linear operator between scales, shifts and activations, each reading the one before."""
    for _ in range(net.draw(st.integers(0, 2))):
        net.draw(st.sampled_from([_norm, _affine, _relu]))(net, net.values[-1])
    net.draw(st.sampled_from([_conv, _conv, _padded, _matmul, _gemm]))(net, net.values[-1])
    for _ in range(net.draw(st.integers(1, 4))):
        net.draw(st.sampled_from([_norm, _affine, _affine, _relu, _pool]))(net, net.values[-1])


def _relu(net: _Network, value: _Value) -> None:
    net.add("Relu", [value.name], value.shape)


_STEPS = [  # what is named more often is drawn more often
    *(
        _layer,
        _layer,
        _layer,
        _layer,
        _conv,
        _conv,
        _parallel_convs,
        _norm,
        _affine,
        _affine,
        _affine,
        _neutral,
        _unary,
        _unary,
    ),
    *(_padded, _padded, _pool, _transpose, _transpose, _reshape, _flatten, _concat, _sum, _matmul, _matmul, _gemm),
    *(_reciprocal, _twice, _branches),
]


@st.composite
def _networks(draw: Callable[[Any], Any]) -> ModelProto:
    net = _Network(draw)
    least = draw(st.integers(5, 25))
    for _ in range(25):
        if len(net.nodes) >= least:
            break
        draw(st.sampled_from(_STEPS))(net, net.any_value())
    if len(net.values) == 1:
        net.add("Relu", ["x"], net.values[0].shape)
    inner = draw(st.lists(st.sampled_from(net.values[1:]), max_size=2))
    return net.model(list(dict.fromkeys([*inner, net.values[-1]])))


def _check(model: ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    note(onnx.printer.to_text(model))
    folded, _ = _fold(model)
    onnx.checker.check_model(folded, full_check=True)
    assert folded.graph.input == model.graph.input
    assert folded.graph.output == model.graph.output
    again, rewrites = _fold(folded)
    assert rewrites == 0, f"a second run changes {onnx.printer.to_text(folded)} to {onnx.printer.to_text(again)}"
    norms, before, after = _count(model, "BatchNormalization"), _count(model), _count(folded)
    assert after <= before + norms
    _compare(model, folded)


def _fold(model: ModelProto) -> tuple[ModelProto, int]:
    loaded = load_model(model)
    result = Fold().apply(loaded.graph, Context(frame=loaded.frame))
    return loaded.to_proto(), result.rewrites


def _count(model: ModelProto, op: str | None = None) -> int:
    """How many nodes a model has, of one operator or of all but Constant."""
    nodes = [node.op for graph in all_graphs(load_model(model).graph) for node in graph.nodes]
    return sum(each == op if op else each != "Constant" for each in nodes)


def _compare(model: ModelProto, folded: ModelProto) -> None:
    sessions = [open_session(each, optimize=False, threads=1) for each in (model, folded)]
    sizes = [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    for batch in (1, 3):
        x = np.random.default_rng(batch).standard_normal((batch, *sizes)).astype(np.float32)
        before, after = (session.run({"x": x}) for session in sessions)
        if all(_is_close(after[name], value, 0.0) for name, value in before.items()):
            continue
        # float32 may lose as much in the model itself, where large numbers cancel: ask float64 which is nearer
        exact = dict(
            zip(before, ReferenceEvaluator(_in_float64(model)).run(None, {"x": x.astype(np.float64)}), strict=True)
        )
        for name, value in before.items():
            error = np.abs(value - exact[name]).max(initial=0)
            assert _is_close(after[name], exact[name], 10 * error), f"{name}: {after[name]} is not {exact[name]}"


def _is_close(found: np.ndarray, expected: np.ndarray, more: float) -> bool:
    limit = _TOLERANCE * np.abs(expected).max(initial=0) + 1e-6 + more
    return found.shape == expected.shape and bool(np.all(np.abs(found - expected) <= limit))


def _in_float64(model: ModelProto) -> ModelProto:
    copy = ModelProto.FromString(model.SerializeToString())
    for tensor in copy.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for info in (*copy.graph.input, *copy.graph.output):
        info.type.tensor_type.elem_type = TensorProto.DOUBLE
    return copy


_settings = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@settings(_settings, max_examples=60, phases=[Phase.generate])  # to shrink a failure takes minutes: the slow test does
@given(_networks())
def test_random_networks_stay_valid_and_right(model):
    _check(model)


@pytest.mark.slow
@settings(_settings, max_examples=1000)
@given(_networks())
def test_a_thousand_random_networks_stay_valid_and_right(model):
    _check(model)
