import re

import numpy as np
import pytest
from comparing import apply_and_compare, ops

from graphopt.passes.fold_pad import FoldPad
from graphopt.passes.remove_dead_nodes import RemoveDeadNodes

ZEROS_ASIDE = {1: [0, 0, 1, 0, 0, 2], 2: [0, 0, 1, 0, 0, 0, 2, 1], 3: [0, 0, 1, 0, 2, 0, 0, 0, 1, 0]}
CONV = "y = Conv (b, w)"


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
    ],
)
def test_refuses_with_a_reason(step, constants, words):
    left, reasons = _apply(step, **constants)
    assert left["Pad"] == 1
    assert words in reasons[0]


def test_a_max_pool_keeps_its_pad():
    assert _fold("b = Pad (x, p) y = MaxPool <kernel_shape = [3, 3]> (b)")["Pad"] == 1
