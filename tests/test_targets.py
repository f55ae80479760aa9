"""What the targets' tables say, held against the installed onnxruntime: which groups really become int8 kernels."""

from dataclasses import replace

import pytest
from texts import model_of

from graphopt.errors import GraphoptError
from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes import Calibrate, InsertQdq
from graphopt.runtime import optimized_ops
from graphopt.targets import Role, Target, target_named, targets
from graphopt.targets.ort_cpu import ORT_CPU, cpu_has_vnni

CONV = "Conv<pads=[1,1,1,1]>"

# an operator between two Convs, `c` in and `d` out, and the kernel that onnxruntime 1.31 makes of it
BETWEEN_CONVS = {
    "Relu": ("d = Relu(c)", None),
    "Clip": ("d = Clip(c, zero, six)", None),
    "Add": ("d = Add(c, x)", "QLinearAdd"),
    "Add and Relu": ("e = Add(c, x) d = Relu(e)", "QLinearAdd"),
    "Add of a constant": ("d = Add(c, k)", "QLinearAdd"),
    "Mul": ("d = Mul(c, x)", "QLinearMul"),
    "SiLU": ("s = Sigmoid(c) d = Mul(c, s)", "QLinearSigmoid"),
    "LeakyRelu": ("d = LeakyRelu(c)", "QLinearLeakyRelu"),
    "PRelu": ("d = PRelu(c, slopes)", "Max"),
    "Sigmoid": ("d = Sigmoid(c)", "QLinearSigmoid"),
    "Softmax": ("d = Softmax<axis=1>(c)", "QLinearSoftmax"),
    "AveragePool": ("d = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(c)", "QLinearMul"),
    "GlobalAveragePool": ("d = GlobalAveragePool(c)", "QLinearGlobalAveragePool"),
    "Concat": ("d = Concat<axis=0>(c, x)", "QLinearConcat"),
    "Split": ("e, f = Split<axis=0, num_outputs=2>(c) d = Add(e, f)", "Split"),
    "Where": ("d = Where(flag, c, x)", "QLinearWhere"),
    "MaxPool": ("d = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(c)", "MaxPool"),
    "Transpose": ("d = Transpose<perm=[0,1,3,2]>(c)", "Transpose"),
    "Reshape": ("d = Reshape(c, swapped)", "Reshape"),
    "Resize": ('d = Resize<mode="nearest">(c, , ones)', "Resize"),
    "Slice": ("d = Slice(c, from, to, axes)", "Slice"),
    "factor": ("d = Mul(c, six)", None),
    "HardSigmoid": ("d = HardSigmoid(c)", "QLinearAdd"),
    "HardSwish": ("d = HardSwish(c)", "QLinearMul"),
    "hard-swish": ("s = Add(c, three) r = Clip(s, zero, six) m = Mul(c, r) d = Div(m, six)", "QLinearMul"),
    "squeeze-excite": (
        "p = GlobalAveragePool(c) e = Conv(p, narrow) r = Relu(e) f = Conv(r, narrow) g = HardSigmoid(f) d = Mul(c, g)",
        "QLinearMul",
    ),
    "Pad": ("d = Pad(c, pads)", "Pad"),
    "Pad along one axis": ("d = Pad(c, below)", "Concat"),
    "Pad by copies": ('d = Pad<mode="edge">(c, pads)', "Pad"),
    "DepthToSpace": ("e = Conv(c, wide) d = DepthToSpace<blocksize=2>(e)", "DepthToSpace"),
}


def operators_after(body, weights=""):
    """Quantize a graph with made-up inputs, and list what onnxruntime makes of it."""
    text = f"""
        <ir_version: 8, opset_import: ["" : 18]>
        g (float[2,16,8,8] x) => (float[A,B,C,D] y)
        <float[16,16,3,3] w, float[16,16,3,3] v, float[64,16,1,1] wide, float[16,1,1] k, float zero = {{0}},
         float[16,16,1,1] narrow, float three = {{3}}, int64[8] pads = {{0,0,1,1,0,0,1,1}},
         float[16,1,1] slopes = {{1,0.5,-0.5,0,-1,0.25,0.3,0.7,1,0.5,-0.5,0,-1,0.25,0.3,0.7}},
         int64[8] below = {{0,0,0,0,0,0,2,0}},
         float six = {{6}}, bool flag = {{1}}, int64[4] swapped = {{0,0,4,16}}, float[4] ones = {{1,1,1,1}},
         int64[1] from = {{1}}, int64[1] to = {{7}}, int64[1] axes = {{2}} {weights}>
        {{ {body} }}"""
    graph = load_model(model_of(text)).graph
    context = Context(target=ORT_CPU)
    Calibrate().apply(graph, context)
    InsertQdq(small_islands=True).apply(graph, context)
    return optimized_ops(load_model(graph).to_proto())


@pytest.mark.parametrize("name", BETWEEN_CONVS)
def test_onnxruntime_runs_the_group_between_two_convs_in_int8(name):
    step, kernel = BETWEEN_CONVS[name]
    found = operators_after(f"c = {CONV}(x, w) {step} y = {CONV}(d, v)")
    assert found["QLinearConv"] >= 2
    assert not {"Conv", "FusedConv", "Relu", "Clip", "Add", "Mul", "Sigmoid"} & set(found)
    if kernel is not None:
        assert any(operator.endswith(kernel) for operator in found), found
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 1), found  # at the input, at the output


@pytest.mark.parametrize(
    ("body", "kernel"),
    [
        ("f = Flatten(x) y0 = Gemm<transB=1>(f, gw, gb) y = Unsqueeze(y0, axes2)", "QGemm"),
        ("f = Flatten(x) m = MatMul(f, mw) y0 = Add(m, gb) y = Unsqueeze(y0, axes2)", "QGemm"),
        ("f = Flatten(x) y0 = MatMul(f, mw) y = Unsqueeze(y0, axes2)", "MatMulIntegerToFloat"),
        ("y = MatMul(x, x)", "MatMulIntegerToFloat"),
        ("m = MatMul(x, x) r = Relu(m) y = Exp(r)", "MatMulIntegerToFloat"),
        ("m = MatMul(x, x) r = Clip(m, zero, six) y = Exp(r)", "MatMulIntegerToFloat"),
        ("m = MatMul(x, x) r = Clip(m, , six) y = Exp(r)", "MatMulIntegerToFloat"),
        ("a = MatMul(x, x) y = MatMul(a, x)", "QLinearMatMul"),
    ],
)
def test_onnxruntime_runs_matrix_products_in_int8(body, kernel):
    weights = ", float[10,1024] gw, float[1024,10] mw, float[10] gb, int64[2] axes2 = {2,3}"
    found = operators_after(body, weights=weights)
    assert found[kernel], found
    assert not {"Gemm", "MatMul"} & set(found), found


def test_the_tables_name_operators_once():
    for name in targets():
        target = target_named(name)
        assert not set(target.rules) & set(target.stays_float)
        assert any(rule.role is Role.GAINS for rule in target.rules.values())


def test_a_wrong_name_lists_the_right_ones():
    with pytest.raises(GraphoptError, match="ort-cpu, ort-arm, tensorrt"):
        target_named("cuda")


@pytest.mark.parametrize(
    ("flags", "expected"), [("sse avx2", False), ("avx2 avx_vnni", True), ("avx512f avx512_vnni", True)]
)
def test_vnni_is_read_from_the_processor_flags(tmp_path, flags, expected):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags\t\t: fpu {flags}\n", encoding="ascii")
    assert cpu_has_vnni(cpuinfo) is expected


def test_an_unknown_processor_is_not_taken_for_one_that_saturates(tmp_path):
    assert cpu_has_vnni(tmp_path / "none") is None
    (tmp_path / "arm").write_text("Features : asimd\n", encoding="ascii")
    assert cpu_has_vnni(tmp_path / "arm") is None


class _EntryPoint:
    """What importlib.metadata gives for a package's entry point."""

    def __init__(self, name, found):
        self.name, self.value, self.found = name, "package:thing", found

    def load(self):
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.fixture
def registering(monkeypatch):
    def register(name, found):
        monkeypatch.setattr("graphopt.targets.entry_points", lambda group: [_EntryPoint(name, found)])
        targets.cache_clear()

    yield register
    monkeypatch.undo()
    targets.cache_clear()


@pytest.mark.parametrize("as_function", [False, True])
def test_an_installed_package_adds_a_target(registering, as_function):
    npu = replace(ORT_CPU, name="npu")
    registering("npu", (lambda: npu) if as_function else npu)
    assert target_named("npu") is npu


@pytest.mark.parametrize(
    ("name", "found", "words"),
    [
        ("npu", ImportError("no such library"), "cannot be imported: no such library"),
        ("tensorrt", ORT_CPU, "takes a name that is taken"),
        ("npu", ORT_CPU, "no graphopt.targets.Target of that name"),
        ("npu", lambda: 3, "no graphopt.targets.Target of that name"),
    ],
)
def test_a_package_that_gives_no_target_is_an_error_that_says_why(registering, name, found, words):
    registering(name, found)
    with pytest.raises(GraphoptError, match=words):
        target_named(name)


def test_a_target_is_data():
    assert all(isinstance(target_named(name), Target) for name in targets())
