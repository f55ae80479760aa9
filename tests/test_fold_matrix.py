"""Fold case by case: for each model, the operators that must be left, and what must stay as it is.

A case is a few lines of ONNX text from x to y. Constants are seeded numbers of the shapes that the case gives, in the
dtype of x. The tests of the single passes hold their details; these hold what all of them make of a model together.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle, product
from typing import Any

import numpy as np
import onnx
import pytest
from comparing import apply_and_compare, assert_equal_outputs, build, ops
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from graphopt.graph import all_graphs
from graphopt.model_io import load_model
from graphopt.pass_base import Context, PassResult
from graphopt.passes.fold import Fold

_TYPES = {"float": np.float32, "float16": np.float16, "int32": np.int32}
_TOLERANCES = {"float": 1e-5, "float16": 2e-3, "int32": 0}
_NORM = "BatchNormalization ({}, scale, shift, mean, var)"


@dataclass(frozen=True)
class Case:
    """A model and what Fold must leave of it.

    Attributes:
        body: nodes from x to y; `constants` are what it reads besides, arrays or shapes.
        left: how many nodes of each operator are left, "Add|Sub" counting both; Constant nodes do not count.
        reason: words of the reason for which something was left alone.
    """

    body: str
    left: Mapping[str, int]
    constants: Mapping[str, Any] = field(default_factory=dict)
    x: str = "N,4,6,6"
    rank: int = 4  # of y
    opset: int = 17
    dtype: str = "float"
    reason: str = ""

    def values(self) -> dict[str, np.ndarray]:
        rng, dtype = np.random.default_rng(3), _TYPES[self.dtype]
        return {
            name: value if isinstance(value, np.ndarray | np.generic) else _numbers(rng, name, value, dtype)
            for name, value in self.constants.items()
        }

    def model(self) -> onnx.ModelProto:
        sizes = ",".join("ABCDEF"[: self.rank])
        header = f'<ir_version: 8, opset_import: ["" : {self.opset}, "com.microsoft" : 1]>'
        signature = f"agraph ({self.dtype}[{self.x}] x) => ({self.dtype}[{sizes}] y)"
        return build(f"{header} {signature} {{ {self.body} }}", self.values())


def _numbers(rng: np.random.Generator, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Weights of about unit gain; factors and variances, named `k...`, `scale`, `var`, are away from zero."""
    if name.startswith(("k", "scale", "var")):
        return np.asarray(rng.uniform(0.5, 2, shape)).astype(dtype)
    fan_in = max(1, int(np.prod(shape[1:])))
    return np.asarray(rng.standard_normal(shape) / np.sqrt(fan_in)).astype(dtype)


def _norm(channels: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(("scale", "shift", "mean", "var"), (channels,))


def _fold(case: Case) -> tuple[PassResult, onnx.ModelProto]:
    result, model = apply_and_compare(case.model(), Fold(), tolerance=_TOLERANCES[case.dtype])
    found = ops(model)
    del found["Constant"]
    for alternatives in (key for key in case.left if "|" in key):
        found[alternatives] = sum(found.pop(op, 0) for op in alternatives.split("|"))
    assert +found == Counter(case.left)
    assert any(case.reason in skip.reason for skip in result.skipped) or not case.reason, result.skipped
    return result, model


def _named(cases: Iterable[tuple[str, Case]]) -> list[Any]:
    return [pytest.param(case, id=name) for name, case in cases]


# ---------------------------------------------------------------------------------------------------------------------
# BatchNormalization
# ---------------------------------------------------------------------------------------------------------------------


def _convolutions() -> Iterator[tuple[str, Case]]:
    """BatchNormalization after a Conv of every rank, grouping and bias; opsets and dtypes take turns."""
    opsets, dtypes = cycle([9, 13, 17, 21, 23]), cycle(["float", "float", "float16"])
    for rank, group, bias in product([1, 2, 3], [1, 2, 4], [False, True]):
        opset, dtype, spatial = next(opsets), next(dtypes), ",".join(["5"] * rank)
        constants = {"w": (8, 4 // group, *[3] * rank), "b": (8,), **_norm(8)}
        if not bias:
            del constants["b"]
        body = f"c = Conv <group = {group}> (x, w{', b' if bias else ''}) y = {_NORM.format('c')}"
        name = f"after Conv {rank}d, group {group}{', bias' if bias else ''}, opset {opset}, {dtype}"
        yield name, Case(body, {"Conv": 1}, constants, f"N,4,{spatial}", rank + 2, opset, dtype)


def _transposed_convolutions() -> Iterator[tuple[str, Case]]:
    for rank, group, dtype in [(1, 1, "float"), (2, 1, "float16"), (2, 2, "float"), (3, 2, "float"), (2, 4, "float")]:
        constants = {"w": (4, 8 // group, *[3] * rank), "b": (8,), **_norm(8)}
        body = f"c = ConvTranspose <group = {group}> (x, w, b) y = {_NORM.format('c')}"
        case = Case(body, {"ConvTranspose": 1}, constants, f"N,4,{','.join(['5'] * rank)}", rank + 2, 17, dtype)
        yield f"after ConvTranspose {rank}d, group {group}, {dtype}", case


def _matrix_products() -> Iterator[tuple[str, Case]]:
    flat = {"x": "N,6", "rank": 2}
    for attributes, shape, opset in [
        ("", (6, 5), 9),
        ("<transB = 1>", (5, 6), 13),
        ("<alpha = 0.5, beta = 2.0>", (6, 5), 17),
        ("<alpha = 0.5, beta = 2.0, transB = 1>", (5, 6), 23),
    ]:
        body = f"g = Gemm {attributes} (x, w, b) y = {_NORM.format('g')}"
        constants = {"w": shape, "b": (5,), **_norm(5)}
        yield f"after Gemm {attributes}", Case(body, {"Gemm": 1}, constants, opset=opset, **flat)
    body = f"g = Gemm (x, w) y = {_NORM.format('g')}"
    yield "after Gemm without bias", Case(body, {"Gemm": 1}, {"w": (6, 5), **_norm(5)}, **flat)
    body = f"g = MatMul (x, w) y = {_NORM.format('g')}"
    yield "after MatMul", Case(body, {"Gemm": 1}, {"w": (6, 5), **_norm(5)}, **flat)
    for add in ("Add (g, b)", "Add (b, g)"):
        body = f"g = MatMul (x, w) h = {add} y = {_NORM.format('h')}"
        yield f"after MatMul and {add}", Case(body, {"Gemm": 1}, {"w": (6, 5), "b": (5,), **_norm(5)}, **flat)
    body = f"g = {_NORM.format('x')} y = Gemm (g, w, b)"
    yield "before Gemm", Case(body, {"Gemm": 1}, {"w": (6, 5), "b": (5,), **_norm(6)}, **flat)
    body = f"g = {_NORM.format('x')} y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (g, w, b)"
    yield "before Gemm with attributes", Case(body, {"Gemm": 1}, {"w": (5, 6), "b": (5,), **_norm(6)}, **flat)
    body = f"g = {_NORM.format('x')} y = MatMul (g, w)"
    yield "before MatMul", Case(body, {"Gemm": 1}, {"w": (6, 5), **_norm(6)}, **flat)


def _other_norms() -> Iterator[tuple[str, Case]]:
    conv, padded = {"w": (6, 4, 3, 3), "b": (6,)}, "<pads = [1, 1, 1, 1]>"
    before = f"n = {_NORM.format('x')}"
    yield (
        "two in a row",
        Case(f"c = Conv (x, w) n = {_NORM.format('c')} y = {_NORM.format('n')}", {"Conv": 1}, {**conv, **_norm(6)}),
    )
    yield "before Conv", Case(f"{before} y = Conv (n, w, b)", {"Conv": 1}, {**conv, **_norm(4)})
    yield (
        "before Conv in groups",
        Case(f"{before} y = Conv <group = 2> (n, w)", {"Conv": 1}, {"w": (6, 2, 3, 3), **_norm(4)}),
    )
    yield "before Conv 1d", Case(f"{before} y = Conv (n, w)", {"Conv": 1}, {"w": (6, 4, 3), **_norm(4)}, "N,4,6", 3)
    yield (
        "before depthwise Conv",
        Case(f"{before} y = Conv <group = 4> (n, w)", {"Conv": 1}, {"w": (4, 1, 3, 3), **_norm(4)}),
    )
    zero = {"shift": np.zeros(4, np.float32), "mean": np.zeros(4, np.float32)}
    yield (
        "before padded Conv, no shift",
        Case(f"{before} y = Conv {padded} (n, w, b)", {"Conv": 1}, {**conv, **_norm(4), **zero}),
    )
    for attribute in ("pads = [1, 1, 1, 1]", 'auto_pad = "SAME_UPPER"', "pads = [0, 0, 0, 1]"):
        case = Case(f"{before} y = Conv <{attribute}> (n, w, b)", {"Conv": 1, "Add|Sub": 1}, {**conv, **_norm(4)})
        yield f"before Conv <{attribute}>, with a shift", case
    yield "alone", Case(f"{before} y = Relu (n)", {"Mul": 1, "Add": 1, "Relu": 1}, _norm(4))
    yield "alone, float16", Case(f"{before} y = Relu (n)", {"Mul": 1, "Add": 1, "Relu": 1}, _norm(4), dtype="float16")
    yield "alone, 2 axes", Case(f"{before} y = Relu (n)", {"Mul": 1, "Add": 1, "Relu": 1}, _norm(4), "N,4", 2)
    quantized = {"q": np.random.default_rng(0).integers(-90, 90, (6, 4, 3, 3)).astype(np.int8)}
    for name, axis, steps in [
        ("a channel", "<axis = 0>", np.linspace(0.01, 0.02, 6)),
        ("a tensor", "", np.array(0.01)),
    ]:
        body = f"w = DequantizeLinear {axis} (q, steps) c = Conv (x, w) y = {_NORM.format('c')}"
        constants = {**quantized, "steps": steps.astype(np.float32), **_norm(6)}
        yield (
            f"after a Conv quantized with a scale for {name}",
            Case(body, {"Conv": 1, "DequantizeLinear": 1}, constants),
        )
    body = f"w = Identity (w0) b = Identity (b0) c = Conv (x, w, b) y = {_NORM.format('c')}"
    yield "weights behind Identity", Case(body, {"Conv": 1}, {"w0": (6, 4, 3, 3), "b0": (6,), **_norm(6)})
    body = (
        "w = Constant <value = float[3,4,1,1] {1,2,3,4,5,6,7,8,9,1,2,3}> ()"
        f" b = Constant <value_floats = [1.0, 2.0, 3.0]> () c = Conv (x, w, b) y = {_NORM.format('c')}"
    )
    yield "weights in Constant nodes", Case(body, {"Conv": 1}, _norm(3))
    body = f"c = Conv (x, w) d = Dropout (c) i = Identity (d) y = {_NORM.format('i')}"
    yield "behind Dropout and Identity", Case(body, {"Conv": 1}, {"w": (6, 4, 3, 3), **_norm(6)})
    body = "c = Conv (x, w) y = BatchNormalization <epsilon = 0.1> (c, scale, shift, mean, var)"
    yield "with a large epsilon", Case(body, {"Conv": 1}, {"w": (6, 4, 3, 3), **_norm(6)})


@pytest.mark.parametrize(
    "case", _named([*_convolutions(), *_transposed_convolutions(), *_matrix_products(), *_other_norms()])
)
def test_folds_batch_normalization(case):
    _fold(case)


def _weight_is(model: onnx.ModelProto, weight: np.ndarray) -> bool:
    """Whether the first Conv of a model still reads this weight."""
    (name,) = [node.input[1] for node in model.graph.node if node.op_type == "Conv"][:1]
    return any(
        each.name == name and np.array_equal(numpy_helper.to_array(each), weight) for each in model.graph.initializer
    )


@pytest.mark.parametrize("outputs", ["float[A,B,C,D] y", "float[A,B,C,D] y, float[E,F,G,H] c"])
def test_a_conv_that_others_read_keeps_its_weights(outputs):
    body = f"c = Conv (x, w) n = {_NORM.format('c')} r = Relu (c) y = Add (n, r)"
    case = Case(body, {}, {"w": (6, 4, 3, 3), **_norm(6)})
    text = f'<ir_version: 8, opset_import: ["" : 17]> agraph (float[N,4,6,6] x) => ({outputs}) {{ {body} }}'
    _, model = apply_and_compare(text, Fold(), constants=case.values())
    found = ops(model)
    assert (found["Conv"], found["Relu"]) == (1, 1)
    assert (found["BatchNormalization"], found["Mul"]) in [(0, 1), (1, 0)]
    assert _weight_is(model, case.values()["w"])


def test_a_conv_that_is_a_graph_output_keeps_its_weights():
    case = Case("", {}, {"w": (6, 4, 3, 3), **_norm(6)})
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> agraph (float[N,4,6,6] x) => (float[A,B,C,D] y, float[E,F,G,H] c)'
        f" {{ c = Conv (x, w) y = {_NORM.format('c')} }}"
    )
    _, model = apply_and_compare(text, Fold(), constants=case.values())
    assert ops(model)["Conv"] == 1
    assert _weight_is(model, case.values()["w"])


def test_a_weight_that_two_convs_share_is_duplicated_and_the_bytes_are_noted():
    body = f"c = Conv (x, w) n = {_NORM.format('c')} e = Exp (x) d = Conv (e, w) r = Relu (d) y = Add (n, r)"
    result, model = _fold(Case(body, {"Conv": 2, "Exp": 1, "Relu": 1, "Add": 1}, {"w": (6, 4, 3, 3), **_norm(6)}))
    weights = [each for each in model.graph.initializer if list(each.dims) == [6, 4, 3, 3]]
    assert len(weights) == 2
    assert any(str(6 * 4 * 3 * 3 * 4) in note for note in result.notes), result.notes


def test_bfloat16_stays_right():
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> agraph (bfloat16[2,4] x) => (bfloat16[2,4] y)'
        " { m = Mul (x, k) a = Add (m, k) i = Identity (a) y = Relu (i) }"
    )
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(helper.make_tensor("k", TensorProto.BFLOAT16, [4], [1.0, 2.0, 3.0, 4.0]))
    after = _folded(model)
    assert ops(after)["Identity"] == 0
    x = numpy_helper.to_array(helper.make_tensor("x", TensorProto.BFLOAT16, [2, 4], list(range(-4, 4))))
    expected, found = (ReferenceEvaluator(each).run(None, {"x": x})[0].astype(np.float32) for each in (model, after))
    np.testing.assert_allclose(found, expected, rtol=2**-7)


def _folded(model: onnx.ModelProto) -> onnx.ModelProto:
    loaded = load_model(model)
    Fold().apply(loaded.graph, Context(frame=loaded.frame))
    after = loaded.to_proto()
    onnx.checker.check_model(after, full_check=True)
    return after


# ---------------------------------------------------------------------------------------------------------------------
# Chains of Mul, Div, Add and Sub
# ---------------------------------------------------------------------------------------------------------------------


def _chains_after_conv() -> Iterator[tuple[str, Case]]:
    forms = ["Mul (c, k)", "Mul (k, c)", "Add (c, k)", "Add (k, c)", "Sub (c, k)", "Sub (k, c)", "Div (c, k)"]
    ranks, opsets, dtypes = cycle([2, 1, 2, 3]), cycle([9, 13, 17, 21, 23]), cycle(["float", "float", "float16"])
    for form, kind, bias in product(forms, ["[1,C,1,1]", "[C,1,1]", "scalar"], [False, True]):
        rank, opset, dtype = next(ranks), next(opsets), next(dtypes)
        shape = {"[1,C,1,1]": (1, 6, *[1] * rank), "[C,1,1]": (6, *[1] * rank), "scalar": ()}[kind]
        constants = {"w": (6, 4, *[3] * rank), "k": shape} | ({"b": (6,)} if bias else {})
        body = f"c = Conv (x, w{', b' if bias else ''}) y = {form}"
        case = Case(body, {"Conv": 1}, constants, f"N,4,{','.join(['6'] * rank)}", rank + 2, opset, dtype)
        yield f"{form} after Conv {rank}d{', bias' if bias else ''}, {kind}, opset {opset}, {dtype}", case


def _chains_before_conv() -> Iterator[tuple[str, Case]]:
    constants = {"w": (6, 4, 3, 3), "b": (6,), "k": (1, 4, 1, 1), "k2": (4, 1, 1)}
    for form in ("Mul (x, k)", "Mul (k2, x)", "Div (x, k)", "Add (x, k)", "Add (k2, x)", "Sub (x, k)", "Sub (k, x)"):
        yield f"{form} before Conv", Case(f"a = {form} y = Conv (a, w, b)", {"Conv": 1}, constants)
    for form in ("Mul (x, k)", "Div (x, k2)"):
        body = f"a = {form} y = Conv <pads = [1, 1, 1, 1]> (a, w)"
        yield f"{form} before padded Conv", Case(body, {"Conv": 1}, constants)
    body = "a = Add (x, k) y = Conv <pads = [1, 1, 1, 1]> (a, w)"
    yield "Add before padded Conv", Case(body, {"Conv": 1, "Add": 1}, constants)
    for opset in (13, 17, 23):
        body = "a = Sub (x, m) c = Div (a, k) y = Conv <pads = [1, 1, 1, 1]> (c, w, b)"
        left = {"Conv": 1, "Add|Sub": 1}
        yield (
            f"(x - mean) / std before padded Conv, opset {opset}",
            Case(body, left, {**constants, "m": (4, 1, 1)}, opset=opset),
        )
    body = "a = Sub (x, m) c = Div (a, k) y = Conv (c, w, b)"
    yield "(x - mean) / std before Conv", Case(body, {"Conv": 1}, {**constants, "m": (4, 1, 1)})


def _chains_alone() -> Iterator[tuple[str, Case]]:
    constants, two = {"k": (1, 4, 1, 1), "k2": (4, 1, 1), "k3": ()}, np.float32(2)
    for dtype in ("float", "float16"):
        body = "a = Mul (x, k) b = Mul (k2, a) y = Relu (b)"
        yield f"x * k * k2, {dtype}", Case(body, {"Mul": 1, "Relu": 1}, constants, dtype=dtype)
    yield "x * k / k2", Case("a = Mul (x, k) b = Div (a, k2) y = Relu (b)", {"Mul|Div": 1, "Relu": 1}, constants)
    yield "x + k - k2", Case("a = Add (x, k) b = Sub (a, k2) y = Relu (b)", {"Add|Sub": 1, "Relu": 1}, constants)
    body = "a = Mul (x, k) b = Add (a, k2) c = Mul (b, two) y = Div (c, two)"
    yield "(x * k + k2) * 2 / 2", Case(body, {"Mul": 1, "Add": 1}, {**constants, "two": two})
    body = "a = Mul (x, k) b = Add (a, k2) c = Sub (k3, b) d = Div (c, k) y = Relu (d)"
    yield "a chain of four", Case(body, {"Mul": 1, "Add": 1, "Relu": 1}, constants)
    body = "g = MatMul (x, w) a = Mul (g, k3) y = Div (a, k4)"
    case = Case(body, {"MatMul": 1}, {"w": (6, 5), "k3": (), "k4": ()}, "N,3,6", 3)
    yield "scales after a MatMul of 3 axes", case
    body = "g = MatMul (x, w) h = Add (g, b) y = Mul (h, k)"
    yield "along the last axis", Case(body, {"MatMul": 1, "Add": 1}, {"w": (6, 5), "b": (5,), "k": (5,)}, "N,3,6", 3)


def _chains_that_stay() -> Iterator[tuple[str, Case]]:
    conv = {"w": (6, 4, 3, 3)}
    yield (
        "k / Conv",
        Case("c = Conv (x, w) d = Div (k, c) y = Relu (d)", {"Conv": 1, "Div": 1, "Relu": 1}, {**conv, "k": (6, 1, 1)}),
    )
    for op, shape in product(("Mul", "Add", "Div"), ((6,), (1, 6), (6, 6), (1, 6, 6, 6), (6, 1))):
        case = Case(f"c = Conv (x, w) y = {op} (c, k)", {"Conv": 1, op: 1}, {**conv, "k": shape}, "N,4,8,8")
        yield f"Conv {op} a constant of {list(shape)} where W is C", case
    case = Case("c = Mul (x, k) y = Conv (c, w)", {"Conv": 1, "Mul": 1}, {**conv, "k": (4,)}, "N,4,4,4")
    yield "a constant along W before Conv where W is C", case
    grown = {"w": (1, 4, 3, 3), "k": (1, 5, 1, 1)}
    yield "a constant that makes 5 channels of 1", Case("c = Conv (x, w) y = Mul (c, k)", {"Conv": 1, "Mul": 1}, grown)
    grown = {**conv, "k": (3, 6, 1, 1)}
    yield (
        "a constant that makes a batch of 3 of 1",
        Case("c = Conv (x, w) y = Mul (c, k)", {"Conv": 1, "Mul": 1}, grown, "1,4,6,6"),
    )
    whole = {"k": np.int32([3]), "k2": np.int32([2])}
    yield "integers", Case("a = Mul (x, k) y = Div (a, k2)", {"Mul": 1, "Div": 1}, whole, dtype="int32")
    body = "c = Conv (x, w) m = Mul (c, k) y = Add (m, c)"
    yield "a Conv that another reads", Case(body, {"Conv": 1, "Mul": 1, "Add": 1}, {**conv, "k": (6, 1, 1)})
    body = "c = Conv (x, w) r = Relu (c) y = Mul (r, k)"
    negative = {**conv, "k": np.linspace(-1, 1, 6, dtype=np.float32).reshape(6, 1, 1)}
    yield "a negative factor behind Relu", Case(body, {"Conv": 1, "Relu": 1, "Mul": 1}, negative)
    body = "c = Conv (x, w) r = Sigmoid (c) y = Mul (r, k)"
    yield "behind Sigmoid", Case(body, {"Conv": 1, "Sigmoid": 1, "Mul": 1}, {**conv, "k": (6, 1, 1)})


@pytest.mark.parametrize(
    "case", _named([*_chains_after_conv(), *_chains_before_conv(), *_chains_alone(), *_chains_that_stay()])
)
def test_folds_affine_chains(case):
    _fold(case)


# ---------------------------------------------------------------------------------------------------------------------
# Constants
# ---------------------------------------------------------------------------------------------------------------------

_SHAPE = {"zero": np.int64([0]), "one": np.int64([1]), "minus": np.int64([-1])}
_HEADS = {"heads": np.int64([3, 4])}


def _constants() -> Iterator[tuple[str, Case]]:
    small = {"k": (4, 1, 1)}
    yield "Constant nodes", Case("k = Constant <value_float = 2.0> () a = Exp (k) y = Add (x, a)", {"Add": 1})
    yield "a chain", Case("a = Exp (k) b = Neg (a) c = Sqrt (a) d = Max (b, c) y = Min (x, d)", {"Min": 1}, small)
    yield "float16", Case("a = Exp (k) b = Neg (a) y = Max (x, b)", {"Max": 1}, small, dtype="float16")
    branches = "then_branch = t () => (p) { p = Exp (x) }, else_branch = e () => (q) { q = Neg (x) }"
    body = f"e = If (yes) <{branches}> y = Tanh (e)"
    yield "an If that is always taken", Case(body, {"Exp": 1, "Tanh": 1}, {"yes": np.array(True)})
    yield "an If that is never taken", Case(body, {"Neg": 1, "Tanh": 1}, {"yes": np.array(False)})
    branch = (
        "m = ReduceMax <keepdims = 0> (x) c = Greater (m, zero) y = If (c) <then_branch = t () => (float[A,B,C,D] p)"
    )
    body = f"{branch} {{ e = Exp (k) p = Max (x, e) }}, else_branch = e () => (float[A,B,C,D] q) {{ q = Neg (x) }}>"
    left = {"ReduceMax": 1, "Greater": 1, "If": 1, "Max": 1, "Neg": 1}
    yield "in a branch", Case(body, left, {**small, "zero": np.float32(0)})
    body = (
        "y = Loop (n, yes, x) <body = l (int64 i, bool go, float[A,B,C,D] s) => (bool on, float[A,B,C,D] t)"
        " { on = Identity (go) e = Exp (k) f = Neg (e) t = Max (s, f) }>"
    )
    case = Case(body, {"Loop": 1, "Identity": 1, "Max": 1}, {**small, "n": np.array(3), "yes": np.array(True)})
    yield "in a body", case
    body = "a = Tile (k, times) b = Slice (a, zero, one, axis) y = Add (x, b)"
    tile = {"k": (1, 4, 6, 6), "times": np.int64([9999, 1, 1, 1]), "axis": np.int64([0]), **_SHAPE}
    yield "a Tile that is sliced afterwards", Case(body, {"Add": 1}, tile)
    body = (
        "s = Shape (x) b = Gather (s, first) u = Unsqueeze (b, zero)"
        " t = Concat <axis = 0> (u, minus) y = Reshape (x, t)"
    )
    for opset in (13, 17, 21, 23):
        constants = {**_SHAPE, "first": np.array(0)}
        yield f"shape arithmetic, opset {opset}", Case(body, {"Reshape": 1}, constants, rank=2, opset=opset)
    old = body.replace("Unsqueeze (b, zero)", "Unsqueeze <axes = [0]> (b)")
    yield "shape arithmetic, opset 9", Case(old, {"Reshape": 1}, {**_SHAPE, "first": np.array(0)}, rank=2, opset=9)
    body = (
        "s = Shape (x) n = Gather (s, zero) p = Shape (x) l = Gather (p, one)"
        " t = Concat <axis = 0> (n, l, heads) y = Reshape (x, t)"
    )
    yield "shape arithmetic, batch and sequence", Case(body, {"Reshape": 1}, {**_SHAPE, **_HEADS}, "N,S,12")
    body = "s = Shape (x) n = Slice (s, zero, one) t = Concat <axis = 0> (n, minus, heads) y = Reshape (x, t)"
    yield "shape arithmetic with a Slice", Case(body, {"Reshape": 1}, {**_SHAPE, **_HEADS}, "N,S,12")
    body = "s = Shape (x) h = Gather (s, two) d = Mul (h, half) t = Concat <axis = 0> (minus, d) y = Reshape (x, t)"
    scaled = {"two": np.int64([2]), "half": np.int64([2]), "minus": np.int64([-1])}
    yield "shape arithmetic of known sizes", Case(body, {"Reshape": 1}, scaled, rank=2)


def _constants_that_stay() -> Iterator[tuple[str, Case]]:
    shape, like = "shape = [1, 4, 6, 6], seed = 1.0", "<seed = 1.0> (k)"
    full = {"k": (1, 4, 6, 6)}
    for op, source in [
        ("RandomNormal", f"RandomNormal <{shape}> ()"),
        ("RandomUniform", f"RandomUniform <{shape}> ()"),
        ("RandomNormalLike", f"RandomNormalLike {like}"),
        ("RandomUniformLike", f"RandomUniformLike {like}"),
        ("Bernoulli", f"Bernoulli {like}"),
    ]:
        constants = {} if "Like" not in op and op != "Bernoulli" else {"k": np.full((1, 4, 6, 6), 0.5, np.float32)}
        yield op, Case(f"r = {source} y = Add (x, r)", {op: 1, "Add": 1}, constants)
    body = "r = Multinomial <seed = 1.0, sample_size = 6> (k) f = Cast <to = 1> (r) y = Add (x, f)"
    yield "Multinomial", Case(body, {"Multinomial": 1, "Cast": 1, "Add": 1}, {"k": (6, 3)})
    body = "r = Dropout <seed = 1> (k, ratio, training) y = Add (x, r)"
    training = {**full, "ratio": np.float32(0.5), "training": np.array(True)}
    yield "training Dropout", Case(body, {"Dropout": 1, "Add": 1}, training)
    body = "r = Dropout <seed = 1> (x, ratio, training) y = Neg (r)"
    yield (
        "training Dropout of x",
        Case(body, {"Dropout": 1, "Neg": 1}, {**training, "ratio": np.float32(0.5)} | {"k": ()}),
    )
    body = "r = com.microsoft.Gelu (k) y = Add (x, r)"
    yield "an operator of another domain", Case(body, {"Gelu": 1, "Add": 1}, full)
    quantized = {"q": np.arange(144).reshape(1, 4, 6, 6).astype(np.int8), "step": np.float32(0.1), "z": np.int8(0)}
    body = "r = DequantizeLinear (q, step, z) y = MatMul (x, r)"
    yield "DequantizeLinear", Case(body, {"DequantizeLinear": 1, "MatMul": 1}, quantized)
    body = "r = QuantizeLinear (k, step, z) d = DequantizeLinear (r, step, z) y = MatMul (x, d)"
    left = {"QuantizeLinear": 1, "DequantizeLinear": 1, "MatMul": 1}
    yield "QuantizeLinear", Case(body, left, {**quantized, **full} | {"q": np.int8(0)})
    body = "o = ConstantOfShape <value = float[1] {3.0}> (size) m = Mul (o, k) y = MatMul (x, m)"
    grown = {"size": np.int64([1, 4, 512, 512]), "k": (4, 1, 512)}
    left = {"ConstantOfShape": 1, "Mul": 1, "MatMul": 1}
    yield "what would grow to 4 MB", Case(body, left, grown, "1,4,2,512", reason="grow the model")


@pytest.mark.parametrize("case", _named([*_constants(), *_constants_that_stay()]))
def test_folds_constants(case):
    _fold(case)


@pytest.mark.parametrize("opset", [13, 17])
def test_shapes_that_folding_reveals_are_known_in_branches_too(opset):
    text = (
        f'<ir_version: 8, opset_import: ["" : {opset}]> agraph (float[N,4,6] x) => (float[N,24] y) {{'
        " s = Shape (x) b = Gather (s, first) u = Unsqueeze (b, zero) t = Concat <axis = 0> (u, minus)"
        " r = Reshape (x, t) m = ReduceMax <keepdims = 0> (r) c = Greater (m, half) y = If (c) <"
        " then_branch = t () => (float[N,24] p) { a = Add (r, k) p = Add (a, k2) },"
        " else_branch = e () => (float[N,24] q) { q = Neg (r) }> }"
    )
    line = np.arange(24, dtype=np.float32)
    constants = {**_SHAPE, "first": np.array(0), "half": np.float32(0.5), "k": line, "k2": -2 * line}
    del constants["one"]
    _, model = apply_and_compare(text, Fold(), constants=constants)
    assert ops(model) == {"Reshape": 1, "ReduceMax": 1, "Greater": 1, "If": 1, "Add": 1, "Neg": 1}


def test_a_constant_graph_output_keeps_its_name():
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> agraph (float[N] x) => (float[N] y, float[4] z)'
        " { e = Exp (k) z = Neg (e) y = Relu (x) }"
    )
    _, model = apply_and_compare(text, Fold(), constants={"k": np.ones(4, np.float32)})
    assert [each.name for each in model.graph.output] == ["y", "z"]
    assert ops(model)["Exp"] == ops(model)["Neg"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Identities and other clean-up
# ---------------------------------------------------------------------------------------------------------------------


def _identities() -> Iterator[tuple[str, Case]]:
    left = {"Relu": 1}
    for form in (
        "Mul (x, k)",
        "Mul (k, x)",
        "Div (x, k)",
        "Identity (x)",
        "Dropout (x)",
        "Cast <to = 1> (x)",
        "Sum (x)",
    ):
        yield form, Case(f"a = {form} y = Relu (a)", left, {"k": np.float32([1])})
    for form in ("Add (x, k)", "Add (k, x)", "Sub (x, k)"):
        yield form, Case(f"a = {form} y = Relu (a)", left, {"k": np.zeros((4, 1, 1), np.float32)})
    for opset in (9, 11):
        yield f"Dropout, opset {opset}", Case("a = Dropout <ratio = 0.3> (x) y = Relu (a)", left, opset=opset)
    yield "Cast float16", Case("a = Cast <to = 10> (x) y = Relu (a)", left, dtype="float16")
    body = "a = Transpose <perm = [0, 2, 3, 1]> (x) b = Transpose <perm = [0, 3, 1, 2]> (a) y = Relu (b)"
    yield "Transpose pair", Case(body, left)
    body = "a = Transpose <perm = [0, 2, 3, 1]> (x) b = Transpose <perm = [0, 2, 1, 3]> (a) y = Relu (b)"
    yield "Transposes that leave one", Case(body, {"Transpose": 1, "Relu": 1})
    body = (
        "a = Transpose <perm = [0, 2, 3, 1]> (x) b = Add (a, k) c = Exp (b)"
        " d = Transpose <perm = [0, 3, 1, 2]> (c) y = Tanh (d)"
    )
    yield "Transpose pair around operators", Case(body, {"Add": 1, "Exp": 1, "Tanh": 1}, {"k": (4,)})
    body = "a = Reshape (x, s) b = Reshape (a, t) y = Relu (b)"
    shapes = {"s": np.int64([-1, 2, 72]), "t": np.int64([-1, 4, 36])}
    yield "Reshape of Reshape", Case(body, {"Reshape": 1, "Relu": 1}, shapes, rank=3)
    back = {"s": np.int64([-1, 144]), "t": np.int64([-1, 4, 6, 6])}
    yield "Reshape there and back", Case(body, left, back)
    yield "Flatten and Reshape", Case("a = Flatten (x) b = Reshape (a, t) y = Relu (b)", left, back)
    pair = "a = Unsqueeze (x, s) b = Squeeze (a, s) y = Relu (b)"
    yield "Unsqueeze and Squeeze", Case(pair, left, {"s": np.int64([2])})
    yield "Pad by nothing", Case("a = Pad (x, p) y = Relu (a)", left, {"p": np.zeros(8, np.int64)})
    slices = {"s": np.int64([0]), "e": np.int64([2**31 - 1]), "axis": np.int64([1])}
    yield "Slice of everything", Case("a = Slice (x, s, e, axis) y = Relu (a)", left, slices)
    yield "Concat of one", Case("a = Concat <axis = 1> (x) y = Relu (a)", left)
    yield "Expand to the same shape", Case("a = Expand (x, s) y = Relu (a)", left, {"s": np.int64([1, 4, 1, 6])})
    yield "Expand to 1s", Case("a = Expand (x, s) y = Relu (a)", left, {"s": np.int64([1])})
    body = "a = Exp (x) b = Exp (x) y = Add (a, b)"
    yield "the same twice", Case(body, {"Exp": 1, "Add": 1})
    body = "a = Conv (x, w) b = Relu (a) c = Conv (x, w) d = Relu (c) y = Mul (b, d)"
    yield "the same subgraph twice", Case(body, {"Conv": 1, "Relu": 1, "Mul": 1}, {"w": (6, 4, 3, 3)})
    pads = {"p": np.int64([0, 0, 1, 1, 0, 0, 1, 1]), "w": (6, 4, 3, 3)}
    yield "zeros padded before Conv", Case("a = Pad (x, p) y = Conv (a, w)", {"Conv": 1}, pads)
    pool = "y = AveragePool <kernel_shape = [3, 3], count_include_pad = 1> (a)"
    yield "zeros padded before AveragePool", Case(f"a = Pad (x, p) {pool}", {"AveragePool": 1}, pads)
    for name, pad in [("ones", "Pad (x, p, one)"), ("a reflection", 'Pad <mode = "reflect"> (x, p)')]:
        case = Case(f"a = {pad} y = Conv (a, w)", {"Pad": 1, "Conv": 1}, {**pads, "one": np.float32(1)})
        yield f"{name} padded before Conv", case
        body = f"n = {_NORM.format('x')} a = {pad.replace('x', 'n')} y = Conv (a, w)"
        left_over = {"Pad": 1, "Conv": 1, "Mul": 1, "Add": 1}
        if name == "a reflection":
            continue  # both may stay before the Pad or pass it: a reflection of a sum is the sum of reflections
        yield f"BatchNormalization before {name}", Case(body, left_over, {**pads, "one": np.float32(1), **_norm(4)})
    for opset in (8, 13, 23):
        yield f"Sum of two, opset {opset}", Case("a = Exp (x) y = Sum (a, x)", {"Exp": 1, "Add": 1}, opset=opset)
    body = "m = MatMul (x, w) a = Add (m, b) y = Relu (a)"
    for opset, dtype in [(9, "float"), (13, "float16"), (23, "float")]:
        case = Case(body, {"Gemm": 1, "Relu": 1}, {"w": (6, 5), "b": (5,)}, "N,6", 2, opset, dtype)
        yield f"MatMul and Add of a matrix, opset {opset}, {dtype}", case
    body = "z = ConstantOfShape (s) a = Concat <axis = 1> (x, z) y = Relu (a)"
    yield "zeros concatenated", Case(body, {"Pad": 1, "Relu": 1}, {"s": np.int64([2, 3, 6, 6])}, "2,4,6,6")
    body = 'z = ConstantOfShape (s) o, h, c = LSTM <hidden_size = 5> (x, w, r, b, "", z, z) y = Squeeze (o, one)'
    weights = {"w": (1, 20, 4), "r": (1, 20, 5), "b": (1, 40), "s": np.int64([1, 2, 5]), "one": np.int64([1])}
    yield "an LSTM that starts with zeros", Case(body, {"LSTM": 1, "Squeeze": 1}, weights, "3,2,4", 3)


@pytest.mark.parametrize("case", _named(_identities()))
def test_cleans_up(case):
    _fold(case)


def test_the_zeros_that_an_lstm_starts_with_are_left_out():
    body = 'z = ConstantOfShape (s) o, h, c = LSTM <hidden_size = 5> (x, w, r, b, "", z, z) y = Squeeze (o, one)'
    weights = {"w": (1, 20, 4), "r": (1, 20, 5), "b": (1, 40), "s": np.int64([1, 2, 5]), "one": np.int64([1])}
    _, model = _fold(Case(body, {"LSTM": 1, "Squeeze": 1}, weights, "3,2,4", 3))
    (lstm,) = [node for node in model.graph.node if node.op_type == "LSTM"]
    assert len(lstm.input) == 4


def test_duplicate_initializers_become_one():
    body = "a = Max (x, k) b = Exp (a) c = Max (b, k2) d = Neg (c) y = Max (d, k3)"
    values = dict.fromkeys(("k", "k2", "k3"), np.arange(4, dtype=np.float32).reshape(4, 1, 1))
    _, model = _fold(Case(body, {"Max": 3, "Exp": 1, "Neg": 1}, values))
    assert len(model.graph.initializer) == 1


def test_a_repvgg_block_becomes_one_conv():
    norm = {f"{name}{branch}": (4,) for branch in "abc" for name in ("scale", "shift", "mean", "var")}
    body = (
        "p = Conv <pads = [1, 1, 1, 1]> (x, w) a = BatchNormalization (p, scalea, shifta, meana, vara)"
        " q = Conv (x, v) b = BatchNormalization (q, scaleb, shiftb, meanb, varb)"
        " c = BatchNormalization (x, scalec, shiftc, meanc, varc) s = Add (a, b) t = Add (s, c) y = Relu (t)"
    )
    _fold(Case(body, {"Conv": 1, "Relu": 1}, {"w": (4, 4, 3, 3), "v": (4, 4, 1, 1), **norm}))


def test_local_functions_are_inlined():
    text = (
        '<ir_version: 9, opset_import: ["" : 17, "local" : 1]> agraph (float[N,4] x) => (float[N,4] y)'
        ' { a = local.f (x) y = local.f (a) } <domain: "local", opset_import: ["" : 17]>'
        " f (a) => (b) { i = Identity (a) b = Relu (i) }"
    )
    _, model = apply_and_compare(text, Fold())
    assert not model.functions
    assert ops(model) in ({"Relu": 1}, {"Relu": 2})


# ---------------------------------------------------------------------------------------------------------------------
# Wrong results that other simplifiers were seen to give
# ---------------------------------------------------------------------------------------------------------------------


def test_a_constant_along_the_width_is_not_taken_for_one_along_the_channels():
    case = Case("c = Conv (x, w) y = Mul (c, k)", {"Conv": 1, "Mul": 1}, {"w": (6, 4, 3, 3), "k": (6,)}, "N,4,8,8")
    _fold(case)


@pytest.mark.parametrize("opset", [14, 15, 17, 21])
def test_a_batch_normalization_in_training_mode_is_not_folded(opset):
    body = "c = Conv (x, w) y, m, v = BatchNormalization <training_mode = 1> (c, scale, shift, mean, var)"
    case = Case(
        body, {"Conv": 1, "BatchNormalization": 1}, {"w": (6, 4, 3, 3), **_norm(6)}, opset=opset, reason="training"
    )
    model = case.model()
    after = _folded(model)
    assert ops(after) == {"Conv": 1, "BatchNormalization": 1}
    assert_equal_outputs(model, after)


def test_a_batch_normalization_that_returns_statistics_is_not_folded():
    body = "c = Conv (x, w) y, m, v, a, b = BatchNormalization (c, scale, shift, mean, var)"
    after = _folded(Case(body, {}, {"w": (6, 4, 3, 3), **_norm(6)}, opset=9).model())
    assert ops(after) == {"Conv": 1, "BatchNormalization": 1}


@pytest.mark.parametrize("op", ["RandomNormalLike", "RandomUniformLike"])
def test_random_numbers_are_not_frozen(op):
    after = _folded(Case(f"r = {op} (k) y = Add (x, r)", {}, {"k": (1, 4, 6, 6)}).model())
    assert ops(after) == {op: 1, "Add": 1}


def test_two_random_operators_are_not_merged():
    after = _folded(Case("r = RandomNormalLike (x) s = RandomNormalLike (x) y = Sub (r, s)", {}).model())
    assert ops(after) == {"RandomNormalLike": 2, "Sub": 1}


@pytest.mark.parametrize("name", ["w", "scale", "shift", "mean", "var"])
def test_an_initializer_that_a_caller_may_override_is_not_folded(name):
    case = Case(f"c = Conv (x, w) y = {_NORM.format('c')}", {}, {"w": (6, 4, 3, 3), **_norm(6)})
    model, values = case.model(), case.values()
    model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, values[name].shape))
    after = _folded(model)
    assert [each.name for each in after.graph.input] == ["x", name]
    rng = np.random.default_rng(1)
    x, other = rng.standard_normal((2, 4, 6, 6)).astype(np.float32), rng.uniform(1, 2, values[name].shape)
    feed = {"x": x, name: other.astype(np.float32)}
    expected, found = (ReferenceEvaluator(each).run(None, feed)[0] for each in (model, after))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_an_initializer_that_a_caller_may_override_is_no_neutral_element():
    model = Case("a = Mul (x, k) y = Relu (a)", {}, {"k": np.float32([1])}).model()
    model.graph.input.append(helper.make_tensor_value_info("k", TensorProto.FLOAT, [1]))
    assert ops(_folded(model)) == {"Mul": 1, "Relu": 1}


def test_nested_graphs_are_folded_like_the_main_graph():
    norm = _NORM.format("c")
    body = (
        "m = ReduceMax <keepdims = 0> (x) g = Greater (m, zero) y = If (g) <"
        f" then_branch = t () => (float[A,B,C,D] p) {{ c = Conv (x, w) n = {norm} p = Mul (n, k) }},"
        " else_branch = e () => (float[A,B,C,D] q) { d = Conv (x, w) q = Add (k, d) } >"
    )
    constants = {"w": (6, 4, 3, 3), "k": (6, 1, 1), "zero": np.float32(0), **_norm(6)}
    _, model = _fold(Case(body, {"ReduceMax": 1, "Greater": 1, "If": 1, "Conv": 2}, constants))
    assert sum(1 for _ in all_graphs(load_model(model).graph)) == 3
