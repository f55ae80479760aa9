import re

import numpy as np
import pytest
from comparing import apply_and_compare, ops

from graphopt.passes.fold_pad import FoldPad
from graphopt.passes.remove_dead_nodes import RemoveDeadNodes

ZEROS_ASIDE = {1: [0, 0, 1, 0, 0, 2], 2: [0, 0, 1, 0, 0, 0, 2, 1], 3: [0, 0, 1, 0, 2, 0, 0, 0, 1, 0]}
CONV = "y = Conv (b, w)"
SIX = np.ones((6, 6, 3, 3), np.float32)
CHANNELS = np.array([0, 0, 0, 0, 0, 4, 0, 0], np.int64)  # 2 become 6


def _pads(rank):
    return np.array(ZEROS_ASIDE[rank], np.int64)


def _apply(step, rank=2, opset=17, **constants):
    """What is left of a step from x to y, and what FoldPad skipped."""
    sizes = ",".join(["N", "2", *["8"] * rank])
    outputs = ",".join("ABCDE"[: rank + 2])
    opsets = f'<ir_version: 8, opset_import: ["" : {opset}]>'
    constants = {"p": _pads(rank), "w": np.ones((3, 2, *[3] * rank), np.float32)} | constants
    used = {name: value for name, value in constants.items() if re.search(rf"\b{name}\b", step)}
    text = f"{opsets} g (float[{sizes}] x) => (float[{outputs}] y) {{ {step} }}"
    result, _ = apply_and_compare(text, FoldPad(), constants=used)
    _, model = apply_and_compare(text, FoldPad(), RemoveDeadNodes(), constants=used)
    return ops(model), [skip.reason for skip in result.skipped]


def _fold(step, rank=2, opset=17, **constants):
    return _apply(step, rank, opset, **constants)[0]


@pytest.mark.parametrize("opset", [11, 13, 17, 21])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("conv", [CONV, "y = Conv <pads = [{}]> (b, w)", 'y = Conv <auto_pad = "VALID"> (b, w)'])
def test_folds_zeros_into_a_conv_of_any_rank(rank, opset, conv):
    conv = conv.replace("{}", ",".join(["1"] * 2 * rank))
    assert _fold(f"b = Pad (x, p) {conv}", rank, opset) == {"Conv": 1}


def test_folds_before_opset_11_where_pads_are_an_attribute():
    pads = ", ".join(map(str, ZEROS_ASIDE[2]))
    assert _fold(f"b = Pad <pads = [{pads}], value = 0.0> (x) {CONV}", opset=10) == {"Conv": 1}


def test_folds_pads_of_named_axes():
    constants = {"p": np.array([1, 2, 3, 4], np.int64), "a": np.array([-1, 2], np.int64), "z": np.float32(0)}
    assert _fold(f"b = Pad (x, p, z, a) {CONV}", opset=18, **constants) == {"Conv": 1}


@pytest.mark.parametrize("conv", [CONV, 'y = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (b, w)'])
@pytest.mark.parametrize(("before", "after"), [(0, 2), (3, 0), (1, 1)])
def test_folds_channels_of_zeros_into_the_weight(before, after, conv):
    weight = np.random.default_rng(0).standard_normal((3, 2 + before + after, 3, 3)).astype(np.float32)
    pads = np.array([0, before, 0, 0, 0, after, 0, 0], np.int64)
    assert _fold(f"b = Pad (x, p) {conv}", p=pads, w=weight) == {"Conv": 1}


def test_folds_channels_and_borders_at_once():
    assert _fold(f"b = Pad (x, p) {CONV}", p=np.array([0, 1, 2, 0, 0, 0, 0, 1]), w=SIX[:, :3]) == {"Conv": 1}


def test_folds_into_an_average_that_counts_its_padding():
    pool = "y = AveragePool <kernel_shape = [3, 3], count_include_pad = 1> (b)"
    assert _fold(f"b = Pad (x, p) {pool}") == {"AveragePool": 1}


def test_keeps_the_pad_for_another_reader():
    assert _fold("b = Pad (x, p) c = Conv (b, w) d = ReduceMax <keepdims = 1> (b) y = Add (c, d)")["Pad"] == 1


@pytest.mark.parametrize(
    ("step", "constants", "words"),
    [
        (f'b = Pad <mode = "edge"> (x, p) {CONV}', {}, "mode is edge"),
        (f"b = Pad (x, p, v) {CONV}", {"v": np.float32(1)}, "writes 1"),
        (f"b = Pad (x, p) {CONV}", {"p": np.array([0, 0, -1, 0, 0, 0, 0, 0], np.int64)}, "crops"),
        (f"b = Pad (x, p) {CONV}", {"p": np.array([1, 0, 0, 0, 0, 0, 0, 0], np.int64)}, "batch"),
        ('b = Pad (x, p) y = Conv <auto_pad = "SAME_UPPER"> (b, w)', {}, "auto_pad SAME_UPPER"),
        ("b = Pad (x, p) y = AveragePool <kernel_shape = [3, 3]> (b)", {}, "count_include_pad"),
        (
            "b = Pad (x, p) y = AveragePool <kernel_shape = [3, 3], count_include_pad = 1, ceil_mode = 1> (b)",
            {},
            "ceil_mode",
        ),
        (f"q = Shape (x) d = Sub (q, q) p2 = Concat <axis = 0> (d, d) b = Pad (x, p2) {CONV}", {}, "at run time"),
        ("b = Pad (w, p) y = Conv (x, b)", {}, "pads the weight"),
        ("b = Pad (x, p) y = Conv <group = 2> (b, w)", {"p": CHANNELS, "w": SIX[:, :3]}, "several groups"),
        ("b = Pad (x, p) k = Exp (w) y = Conv (b, k)", {"p": CHANNELS, "w": SIX}, "computed at run time"),
        ("b = Pad (x, p) c = Conv (b, w) d = Conv (b, w) y = Add (c, d)", {"p": CHANNELS, "w": SIX}, "others read"),
        (
            "b = Pad (x, p) y = AveragePool <kernel_shape = [3, 3], count_include_pad = 1> (b)",
            {"p": CHANNELS},
            "the channel axis",
        ),
    ],
)
def test_refuses_with_a_reason(step, constants, words):
    left, reasons = _apply(step, **constants)
    assert left["Pad"] == 1
    assert words in reasons[0]


POOL = "y = MaxPool <kernel_shape = [3, 3]> (b)"
V = {"v": np.float32(-np.inf)}


@pytest.mark.parametrize("opset", [9, 10, 11, 13, 17, 21])
@pytest.mark.parametrize("own", ["", ", pads = [1, 0, 0, 0]", ", strides = [2, 2]", ', auto_pad = "VALID"'])
def test_folds_zeros_after_a_relu_into_a_max_pool(own, opset):
    pads = ", ".join(map(str, ZEROS_ASIDE[2]))
    pad = "b = Pad (a, p)" if opset >= 11 else f"b = Pad <pads = [{pads}]> (a)"
    steps = f"a = Relu (x) {pad} y = MaxPool <kernel_shape = [3, 3]{own}> (b)"
    assert _fold(steps, opset=opset) == {"Relu": 1, "MaxPool": 1}


@pytest.mark.parametrize("value", [-np.inf, np.finfo(np.float32).min])
def test_folds_the_lowest_value_into_a_max_pool(value):
    assert _fold(f"b = Pad (x, p, v) {POOL}", v=np.float32(value)) == {"MaxPool": 1}


@pytest.mark.parametrize(
    ("steps", "low"),
    [
        ("a = Clip (x, l)", -1.0),
        ("a = Clip (x, l)", 0.5),
        ("r = Sigmoid (x) s = Exp (x) c = Concat <axis = 3> (r, s) a = MaxPool <kernel_shape = [1, 1]> (c)", -1.0),
    ],
)
def test_follows_what_an_input_never_falls_below(steps, low):
    constants = {"l": np.float32(low), "v": np.float32(low)}
    assert "Pad" not in _fold(f"{steps} b = Pad (a, p, v) {POOL}", **constants)


@pytest.mark.parametrize("opset", [9, 11, 13, 18, 21])
@pytest.mark.parametrize("value", [0.0, 2.5])
def test_joins_pads_in_a_row(value, opset):
    if opset < 11:
        pad = f"Pad <pads = [0, 1, 1, 0, 0, 0, 2, 1], value = {value}>"
        steps = f"a = {pad} (x) b = {pad} (a) y = {pad} (b)"
    else:
        steps = "a = Pad (x, p, v) b = Pad (a, q, v) y = Pad (b, p, v)"
    constants = {"p": np.array([0, 1, 1, 0, 0, 0, 2, 1]), "q": np.array([1, 0, 2, 0, 0, 0, 2, 1])}
    assert _fold(steps, opset=opset, v=np.float32(value), **constants) == {"Pad": 1}


def test_joins_pads_of_named_axes():
    constants = {"p": np.array([1, 2]), "a": np.array([2]), "q": np.array([3, 4]), "e": np.array([-1])}
    steps = "b = Pad (x, p, , a) y = Pad (b, q, , e)"
    assert _fold(steps.replace(", ,", ", z,"), opset=18, z=np.float32(0), **constants) == {"Pad": 1}


@pytest.mark.parametrize(
    "steps",
    [
        "b = Pad (x, p, v) c = Pad (b, p, v) r = ReduceMax <keepdims = 1> (b) y = Add (c, r)",
        "b = Pad (x, p) c = Conv (b, w) r = ReduceMax <keepdims = 1> (x) y = Add (c, r)",
    ],
)
def test_another_reader_keeps_a_pad_apart_from_the_next(steps):
    _, reasons = _apply(steps, v=np.float32(0))
    assert reasons == []


@pytest.mark.parametrize(
    ("steps", "constants", "words"),
    [
        (f"b = Pad (x, p) {POOL}", {}, "may fall below"),
        (f"a = LeakyRelu (x) b = Pad (a, p) {POOL}", {}, "may fall below"),
        (f"a = Clip (x, v) b = Pad (a, p) {POOL}", {"v": np.float32(-1)}, "may fall below"),
        (f"a = Relu (x) b = Pad (a, p, v) {POOL}", {"v": np.float32(1)}, "may fall below"),
        (f"a = Relu (x) b = Pad (a, p) {POOL}", {"p": np.array([0, 0, 3, 0, 0, 0, 0, 0])}, "in the padding alone"),
        ("b = Pad (x, p, v) y = MaxPool <kernel_shape = [3, 3], ceil_mode = 1> (b)", V, "ceil_mode"),
        ("b = Pad (x, p, v) y = MaxPool <kernel_shape = [3, 3], dilations = [2, 2]> (b)", V, "dilations"),
        (
            'a = Relu (x) b = Pad (a, p) y = MaxPool <kernel_shape = [3, 3], auto_pad = "SAME_LOWER"> (b)',
            {},
            "auto_pad SAME",
        ),
        (
            "b = Pad (x, p, v) m, i = MaxPool <kernel_shape = [3, 3]> (b) j = Cast <to = 1> (i) y = Add (m, j)",
            V,
            "second",
        ),
        ("b = Pad (x, p) y = Pad (b, p, v)", {"v": np.float32(1)}, "they write 0 and 1"),
        ('b = Pad (x, p) y = Pad <mode = "edge"> (b, p)', {}, "of the other, its mode is edge"),
        ("b = Pad (x, p) y = Pad (b, q)", {"q": np.array([0, 0, -1, 0, 0, 0, 0, 0])}, "a negative pad crops"),
        (
            "b = Pad (x, p) y = AveragePool <kernel_shape = [2, 2], count_include_pad = 1> (b)",
            {"p": np.array([0, 0, 2, 0, 0, 0, 0, 0])},
            "onnxruntime refuses",
        ),
    ],
)
def test_refuses_pooling_and_pads_with_a_reason(steps, constants, words):
    left, reasons = _apply(steps, **constants)
    assert left["Pad"] >= 1
    assert words in reasons[0]
