"""Weights of 4 bits in blocks: what is written, what onnxruntime makes of it, and what is left alone with a reason."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from texts import model_of

import graphopt
from graphopt.cli import OK, WRONG, main
from graphopt.errors import PipelineError
from graphopt.inspection import inspect_model
from graphopt.lint import lint_model
from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes import Calibrate, InsertQdq, StripQdq
from graphopt.passes.insert_qdq import WeightType
from graphopt.runtime import open_session, optimized_ops
from graphopt.targets import target_named
from graphopt.targets.ort_cpu import ORT_ARM, ORT_CPU
from graphopt.targets.tensorrt import TENSORRT

WEIGHTS = (
    "float[64,32] w, float[64,32] u, float[32,64] t, float[70,32] w70, float[8,32] w8, float[2,64,32] stack, "
    "float[32] b, float[1,32] row, float[4,32] full, float[1] one, float[16,16,3,3] k"
)


def model_with(body, inputs="float[4,64] x", outputs="float[A,32] y", weights=WEIGHTS):
    return model_of(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        net ({inputs}) => ({outputs}) <{weights}> {{ {body} }}""")


def in_blocks(model, target=ORT_CPU, context=None, **options):
    """The model with weights in blocks, as a protobuf, and what the pass reports."""
    loaded = load_model(model)
    chosen = InsertQdq(weights=WeightType.INT4, **options)
    result = chosen.apply(loaded.graph, context or Context(target=target))
    proto = loaded.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    return proto, result


def sqnr_db(model, other, feed=None, *, optimize=True):
    session = open_session(model)
    rng = np.random.default_rng(0)
    feed = feed or {each.name: rng.normal(size=each.shape).astype(np.float32) for each in session.inputs}
    (expected,), (found,) = (each.run(feed).values() for each in (session, open_session(other, optimize=optimize)))
    return 10 * np.log10((expected**2).sum() / ((expected - found) ** 2).sum())


def stored(proto):
    return {each.name: each for each in proto.graph.initializer}


# a product of a float x and a constant w that onnxruntime 1.32 makes one MatMulNBits of
FUSED = {
    "MatMul": ("y = MatMul(x, w)", {}),
    "MatMul and bias": ("m = MatMul(x, w) y = Add(m, b)", {}),
    "MatMul and a bias of two axes": ("m = MatMul(x, w) y = Add(row, m)", {}),
    "MatMul and a scalar": ("m = MatMul(x, w) y = Add(m, one)", {}),
    "MatMul and an Add of a matrix": ("m = MatMul(x, w) y = Add(m, full)", {}),
    "MatMul and a residual": ("m = MatMul(x, w) y = Add(r, m)", {"inputs": "float[4,64] x, float[4,32] r"}),
    "MatMul that is an output": ("y = MatMul(x, w) z = Relu(y)", {"outputs": "float[A,32] y, float[A,32] z"}),
    "stacked": ("m = MatMul(x, w) y = Add(m, b)", {"inputs": "float[2,4,64] x", "outputs": "float[A,B,32] y"}),
    "stacked, of open sizes": (
        "m = MatMul(x, w) y = Add(m, b)",
        {"inputs": "float[A,B,64] x", "outputs": "float[A,B,32] y"},
    ),
    "a vector": ("m = MatMul(x, w) y = Add(m, row)", {"inputs": "float[64] x", "outputs": "float[A,32] y"}),
    "Gemm": ("y = Gemm(x, w)", {}),
    "Gemm and bias": ("y = Gemm(x, w, b)", {}),
    "Gemm and a bias of two axes": ("y = Gemm(x, w, row)", {}),
    "Gemm, transposed": ("y = Gemm<transB=1>(x, t, b)", {}),
    "the transpose of what others read": (
        "v = Transpose<perm=[1,0]>(t) y = MatMul(x, v) z = Add(t, t)",
        {"outputs": "float[A,32] y, float[32,64] z"},
    ),
    "a last block that is shorter": ("y = MatMul(x, w70)", {"inputs": "float[4,70] x"}),
}


@pytest.mark.parametrize("name", FUSED)
def test_onnxruntime_reads_the_weight_in_blocks(name):
    body, form = FUSED[name]
    model = model_with(body, **form)
    proto, result = in_blocks(model)
    assert result.parts["weights in blocks"] == 1
    assert proto.opset_import[0].version == 21
    found = optimized_ops(proto)
    assert found["MatMulNBits"] == 1
    assert not {"MatMul", "Gemm", "DequantizeLinear"} & set(found), found
    assert lint_model(load_model(proto), ORT_CPU).findings == ()


@pytest.mark.parametrize("name", ["MatMul", "Gemm, transposed", "MatMul and a residual", "a vector"])
def test_the_result_is_close_to_the_float_product(name):
    body, form = FUSED[name]
    model = model_with(body, **form)
    proto, _ = in_blocks(model)
    assert sqnr_db(model, proto) > 17
    assert sqnr_db(model, proto, optimize=False) > 17


@settings(deadline=None, max_examples=40)
@given(
    inner=st.integers(16, 100),
    columns=st.integers(1, 40),
    leading=st.lists(st.integers(1, 3), max_size=3),
    bias=st.sampled_from(["", "vector", "row", "matrix"]),
    gemm=st.booleans(),
    transposed=st.booleans(),
)
def test_any_product_of_a_matrix_is_fused_and_close(inner, columns, leading, bias, gemm, transposed):
    gemm = gemm and len(leading) == 1
    shape, bias = [*leading, inner], "" if gemm and bias == "matrix" else bias
    sizes = {"vector": [columns], "row": [1, columns], "matrix": [3, columns]}
    weight = [columns, inner] if gemm and transposed else [inner, columns]
    declared = {"w": weight, **({"c": sizes[bias]} if bias else {})}
    if gemm:
        body = f"y = Gemm<transB={int(transposed)}>(x, w{', c' if bias else ''})"
    else:
        body = "m = MatMul(x, w) y = Add(m, c)" if bias else "y = MatMul(x, w)"
    if bias == "matrix" and leading[-1:] != [3]:
        shape = [*leading[:-1], 3, inner]
    model = model_of(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float{shape} x) => (float[] y) <{", ".join(f"float{size} {name}" for name, size in declared.items())}>
        {{ {body} }}""")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    proto, _ = in_blocks(model, block_size=16)
    assert optimized_ops(proto)["MatMulNBits"] == 1
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    expected, found = (open_session(each).run({"x": x})["y"] for each in (model, proto))
    assert found.shape == expected.shape
    # Cauchy and Schwarz: an error of the weights of at most 15 %, and of the activations, which the kernel rounds
    weights = numpy_helper.to_array(stored(model)["w"])
    assert np.linalg.norm(found - expected) <= 0.17 * np.linalg.norm(x) * np.linalg.norm(weights)


@pytest.mark.parametrize("size", ORT_CPU.block_weights["int4"].sizes)
def test_onnxruntime_reads_blocks_of_every_size_that_the_table_names(size):
    model = model_with("y = MatMul(x, v)", inputs="float[4,300] x", weights="float[300,32] v")
    proto, _ = in_blocks(model, block_size=size)
    assert optimized_ops(proto)["MatMulNBits"] == 1
    (node,) = [node for node in proto.graph.node if node.op_type == "DequantizeLinear"]
    assert {each.name: each.i for each in node.attribute} == {"axis": 0, "block_size": size}


def test_two_values_share_a_byte_in_the_file_and_in_every_count():
    model = model_with("y = MatMul(x, w)")
    proto, _ = in_blocks(model)
    weight = stored(proto)["w_quantized"]
    assert weight.data_type == onnx.TensorProto.UINT4
    assert len(weight.raw_data) == 64 * 32 // 2
    expected = 64 * 32 // 2 + 2 * 32 * 4 + 2 * 32 // 2  # weights, scales, zero points
    loaded = load_model(proto)
    assert loaded.nbytes == expected
    found = inspect_model(loaded)
    assert found.weight_nbytes == expected
    assert found.weight_dtypes["uint4"].nbytes == 64 * 32 // 2 + 32
    assert found.macs == 4 * 64 * 32
    assert numpy_helper.to_array(weight).shape == (64, 32)


def test_tensorrt_gets_symmetric_int4_without_zero_points():
    model = model_with("y = MatMul(x, v)", inputs="float[4,256] x", weights="float[256,32] v")
    proto, _ = in_blocks(model, TENSORRT)
    assert stored(proto)["v_quantized"].data_type == onnx.TensorProto.INT4
    assert set(stored(proto)) == {"v_quantized", "v_scale"}
    assert list(stored(proto)["v_scale"].dims) == [2, 32]
    report = lint_model(load_model(proto), TENSORRT)
    assert {finding.rule for finding in report.findings} - {"TRT033"} == {"TRT027"}


def test_products_that_share_a_weight_quantize_it_once_and_onnxruntime_reads_each():
    model = model_with("a = MatMul(x, w) c = Neg(x) d = MatMul(c, w) y = Sub(a, d)")
    proto, result = in_blocks(model)
    assert result.parts["weights in blocks"] == 2
    assert optimized_ops(proto)["MatMulNBits"] == 2
    one, other = (numpy_helper.to_array(stored(proto)[name]) for name in ("w_quantized", "w_quantized_1"))
    np.testing.assert_array_equal(one, other)


def test_tensorrt_shares_one_dequantize_linear():
    model = model_with("a = MatMul(x, w) c = Neg(x) d = MatMul(c, w) y = Sub(a, d)")
    proto, _ = in_blocks(model, TENSORRT, block_size=64)
    assert [node.op_type for node in proto.graph.node].count("DequantizeLinear") == 1


def test_a_weight_that_many_products_share_stays_where_copies_would_be_larger():
    steps = " ".join(f"c{index} = MatMul(c{index - 1}, s)" for index in range(1, 9))
    model = model_with(f"c0 = Relu(x) {steps} y = Relu(c8)", outputs="float[A,64] y", weights="float[64,64] s")
    proto, result = in_blocks(model)
    assert "s" in stored(proto)
    assert {skip.reason for skip in result.skipped if "no weights in blocks" in skip.reason} == {
        "no weights in blocks: 8 products read s, and each would store its own"
    }
    assert in_blocks(model, TENSORRT, block_size=64)[1].parts["weights in blocks"] == 8


def test_an_embedding_that_shares_the_weight_keeps_its_float():
    body = "e = Gather(s, ids) h = MatMul(e, s) y = Relu(h)"
    model = model_with(body, inputs="int64[4] ids", outputs="float[A,64] y", weights="float[64,64] s")
    proto, _ = in_blocks(model)
    gather = next(node for node in proto.graph.node if node.op_type == "Gather")
    assert stored(proto)[gather.input[0]].data_type == onnx.TensorProto.FLOAT


def test_products_in_branches_read_blocks_too():
    model = model_of("""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[4,64] x, bool c) => (float[4,32] y) <float[64,32] w>
        { y = If (c) <
            then_branch = yes () => (float[4,32] a) { a = MatMul(x, w) },
            else_branch = no () => (float[4,32] b) { n = Neg(x) b = MatMul(n, w) }> }""")
    proto, result = in_blocks(model)
    assert result.parts["weights in blocks"] == 2
    assert optimized_ops(proto)["MatMulNBits"] == 2
    feed = {"x": np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32), "c": np.array(False)}
    assert sqnr_db(model, proto, feed) > 17


@pytest.mark.parametrize(
    ("body", "form", "reason"),
    [
        ("y = MatMul(x, r)", {"inputs": "float[4,64] x, float[64,32] r"}, "computed at run time"),
        ("y = MatMul(x, stack)", {"inputs": "float[2,4,64] x", "outputs": "float[A,B,32] y"}, "has 3 axes"),
        ("y = MatMul(x, w8)", {"inputs": "float[4,8] x"}, "8 terms, fewer than the 32 weights of a block"),
        ("y = Gemm<alpha=0.5>(x, w, b)", {}, "alpha = 1"),
        ("y = Gemm<beta=0.5>(x, w, b)", {}, "beta = 1"),
        ("y = Gemm<transA=1>(x, w, b)", {"inputs": "float[64,4] x"}, "transA = 0"),
        ("y = Gemm(x, w, full)", {}, "its bias full is no vector of 32 values"),
        ("m = MatMul(w, t) y = MatMul(x, m)", {"outputs": "float[A,64] y"}, "both inputs are constant: run fold"),
        ("y = MatMul(x, huge)", {"weights": "float[64,32] huge"}, "not finite"),
    ],
)
def test_what_kernels_cannot_read_is_left_alone_with_the_reason(body, form, reason):
    model = model_with(body, **form)
    for each in model.graph.initializer:
        if each.name == "huge":
            each.CopyFrom(numpy_helper.from_array(np.full((64, 32), np.inf, np.float32), "huge"))
    _, result = in_blocks(model)
    assert any(skip.reason.startswith("no weights in blocks") and reason in skip.reason for skip in result.skipped)
    assert result.parts["weights in blocks"] == 0


def test_a_gemm_whose_bias_is_a_matrix_would_stay_float_in_onnxruntime():
    """What the guard rests on: the MatMul of a residual is written as a Gemm because onnxruntime makes such a Gemm."""
    model = model_with("m = MatMul(x, w) y = Add(m, full)")
    proto, _ = in_blocks(model)
    (gemm,) = [node for node in proto.graph.node if node.op_type == "Gemm"]
    gemm.op_type = "MatMul"
    assert optimized_ops(proto)["MatMulNBits"] == 0


def test_a_width_that_blocks_do_not_divide_is_refused_where_kernels_ask_for_it():
    model = model_with("y = MatMul(x, v)", inputs="float[4,200] x", weights="float[200,32] v")
    _, result = in_blocks(model, TENSORRT)
    assert "blocks of 128 do not divide" in result.skipped[0].reason


def test_excluded_products_keep_their_weights():
    model = model_with("a = MatMul(x, w) c = MatMul(x, u) y = Sub(a, c)")
    proto, result = in_blocks(model, exclude=("MatMul -> a",))
    assert result.parts["weights in blocks"] == 1
    assert "w" in stored(proto)


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        (replace(ORT_CPU, block_weights={}), {}, "ort-cpu has no kernels for int4 weights; ort-cpu, ort-arm, tensorrt"),
        (ORT_CPU, {"block_size": 48}, "reads blocks of 16, 32, 64, 128, 256, not of 48"),
        (TENSORRT, {"block_size": 32}, "reads blocks of 64, 128, not of 32"),
    ],
)
def test_what_a_target_has_no_kernel_for_is_refused(target, options, words):
    with pytest.raises(PipelineError, match=words):
        in_blocks(model_with("y = MatMul(x, w)"), target, **options)


def test_a_block_size_without_blocks_is_refused():
    with pytest.raises(PipelineError, match="add weights=int4"):
        InsertQdq(block_size=32).apply(load_model(model_with("y = MatMul(x, w)")).graph, Context(target=ORT_CPU))


CONV_AND_MATMUL = (
    "c = Conv<pads=[1,1,1,1]>(x, k) f = Flatten(c) y = MatMul(f, v)",
    {"inputs": "float[2,16,8,8] x", "weights": "float[16,16,3,3] k, float[1024,32] v"},
)


def test_without_ranges_only_weights_are_quantized_and_the_report_says_what_others_need():
    body, form = CONV_AND_MATMUL
    proto, result = in_blocks(model_with(body, **form))
    assert not any(node.op_type == "QuantizeLinear" for node in proto.graph.node)
    assert [skip.reason for skip in result.skipped] == ["to run in int8 it needs ranges: put calibrate before qdq"]
    assert any("no ranges" in note for note in result.notes)


def test_factors_between_operators_that_lack_ranges_are_none_of_these():
    body, form = CONV_AND_MATMUL
    form = form | {"weights": f"{form['weights']}, float two = {{2.0}}"}
    body = body.replace("f = Flatten(c)", "d = Div(c, two) e = Conv<pads=[1,1,1,1]>(d, k) f = Flatten(e)")
    _, result = in_blocks(model_with(body, **form))
    assert len(result.skipped) == 2


def test_with_ranges_the_other_operators_run_in_int8():
    body, form = CONV_AND_MATMUL
    model = model_with(body, **form)
    loaded, context = load_model(model), Context(target=ORT_CPU)
    Calibrate().apply(loaded.graph, context)
    proto, result = in_blocks(loaded.to_proto(), context=context, small_islands=True)
    found = optimized_ops(proto)
    assert (found["QLinearConv"], found["MatMulNBits"]) == (1, 1), found
    assert result.skipped == ()
    assert sqnr_db(model, proto) > 15


def test_a_model_with_weights_in_blocks_is_not_quantized_twice():
    proto, _ = in_blocks(model_with("y = MatMul(x, w)"))
    with pytest.raises(PipelineError, match=r"quantized already \(1 DequantizeLinear nodes\).*strip-qdq"):
        in_blocks(proto)


def dequantized_name(proto):
    return next(node.output[0] for node in proto.graph.node if node.op_type == "DequantizeLinear")


@pytest.mark.parametrize("name", ["MatMul", "Gemm, transposed", "a last block that is shorter"])
def test_strip_qdq_makes_the_weights_float_again(name):
    body, form = FUSED[name]
    model = model_with(body, **form)
    proto, _ = in_blocks(model)
    loaded = load_model(proto)
    result = StripQdq().apply(loaded.graph, Context())
    assert result.parts["weights"] == 1
    assert not any(node.op == "DequantizeLinear" for node in loaded.graph.nodes)
    (weight,) = [each for each in loaded.to_proto().graph.initializer if each.name.endswith("/float")]
    before = open_session(proto, optimize=False, extra_outputs=[dequantized_name(proto)])
    feed = {each.name: np.zeros(each.shape, np.float32) for each in before.inputs}
    np.testing.assert_allclose(numpy_helper.to_array(weight), before.run(feed)[dequantized_name(proto)], rtol=1e-6)
    assert sqnr_db(model, loaded.to_proto()) > 17


@pytest.mark.parametrize("target", [ORT_CPU, ORT_ARM], ids=lambda target: target.name)
def test_lint_counts_macs_of_weights_in_blocks_apart(target):
    proto, _ = in_blocks(model_with("y = MatMul(x, w)"))
    report = lint_model(load_model(proto), target)
    assert report.findings == ()
    assert report.figures["share of MACs with weights in blocks"] == 1
    assert report.figures["share of MACs in int8"] == 0


def test_lint_knows_the_operator_that_onnxruntimes_tool_writes():
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        net (float[4,64] x) => (float[4,32] y)
        { y = com.microsoft.MatMulNBits<K=64, N=32, bits=4, block_size=32>(x, q, s) }""")
    for name, values in {"q": np.full((32, 2, 16), 0x97, np.uint8), "s": np.ones(64, np.float32)}.items():
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    report = graphopt.lint(model)
    assert report.findings == ()
    assert report.figures["share of MACs with weights in blocks"] == 1
    result = StripQdq().apply(load_model(model).graph, Context())
    assert "MatMulNBits computes with integers itself" in result.skipped[0].reason


BROKEN_FORMS = {
    "a transposed Gemm": (
        "d = DequantizeLinear<axis=1, block_size=32>(qt, st) y = Gemm<transB=1>(x, d)",
        "stored as [K, N]",
    ),
    "blocks along the outputs": (
        "d = DequantizeLinear<axis=1, block_size=32>(q, so) y = MatMul(x, d)",
        "stored as [K, N]",
    ),
    "a shared weight": (
        "d = DequantizeLinear<axis=0, block_size=32>(q, s) a = MatMul(x, d) n = Neg(x) c = MatMul(n, d) y = Sub(a, c)",
        "several nodes read",
    ),
    "alpha": ("d = DequantizeLinear<axis=0, block_size=32>(q, s) y = Gemm<alpha=0.5>(x, d)", "alpha = 1"),
    "a bias of two axes": ("d = DequantizeLinear<axis=0, block_size=32>(q, s) y = Gemm(x, d, row)", "must be a vector"),
}


@pytest.mark.parametrize("name", BROKEN_FORMS)
def test_lint_says_why_a_weight_in_blocks_is_read_in_float(name):
    body, words = BROKEN_FORMS[name]
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21]> g (float[4,64] x) => (float[4,32] y) {{ {body} }}'
    )
    int4 = TENSORRT.block_weights["int4"].quant_type.dtype
    constants = {
        "q": np.ones((64, 32)).astype(int4),
        "qt": np.ones((32, 64)).astype(int4),
        "s": np.ones((2, 32), np.float32),
        "st": np.ones((32, 2), np.float32),
        "so": np.ones((64, 1), np.float32),
        "row": np.ones((1, 32), np.float32),
    }
    read = {each for node in model.graph.node for each in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(constants[each], each) for each in constants.keys() & read)
    assert optimized_ops(model)["MatMulNBits"] == 0
    for target in ("ort-cpu", "ort-arm"):
        found = lint_model(load_model(model), target_named(target)).findings
        assert {finding.rule for finding in found} == {"ORT023"}
        assert all(words in finding.message for finding in found)


def test_the_command_needs_no_calibrate_for_weights_alone(tmp_path, capsys):
    source, out = tmp_path / "net.onnx", tmp_path / "int4.onnx"
    onnx.save(model_with("y = MatMul(x, w)"), source)
    assert main(["optimize", str(source), "--passes", "fold,qdq:weights=int4", "-o", str(out)]) == OK
    assert "weights in blocks 1" in capsys.readouterr().out
    wrong = ["optimize", str(source), "--passes", "qdq:weights=int4:block_size=24", "-o", str(tmp_path / "other.onnx")]
    assert main(wrong) == WRONG
    assert "reads blocks of 16, 32, 64, 128, 256, not of 24" in capsys.readouterr().err
