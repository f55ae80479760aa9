"""What operators are replaced by equals them, and the ranges of new tensors hold their values."""

import numpy as np
import onnx
import pytest
from test_insert_qdq import ranges_of
from texts import model_of

from graphopt.decompositions import decompose, is_decomposed, write_clips_as_limits
from graphopt.model_io import load_model
from graphopt.runtime import open_session

VALUES = np.linspace(-6, 6, 4096, dtype=np.float32).reshape(1, -1)


@pytest.mark.parametrize(
    "operator",
    ["HardSwish(x)", "HardSigmoid(x)", "HardSigmoid<alpha=0.16666667, beta=0.5>(x)", "HardSigmoid<beta=0.0>(x)"],
)
def test_the_decomposition_equals_the_operator_and_its_ranges_hold(operator):
    text = f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1,4096] x) => (float[1,4096] y) {{ y = {operator} }}
    """
    (expected,) = open_session(model_of(text)).run({"x": VALUES}).values()
    model = load_model(model_of(text))
    ranges = ranges_of(x=(-6, 6), y=(float(expected.min()), float(expected.max())))
    found = decompose(model.graph, list(model.graph.nodes), ranges)
    assert not {"HardSwish", "HardSigmoid"} & {node.op for node in model.graph.nodes}
    new = [name for name in found.tensors if name not in ranges.tensors]
    values = open_session(model.to_proto(), extra_outputs=new, optimize=False).run({"x": VALUES})
    np.testing.assert_allclose(values["y"], expected, atol=1e-6)
    assert new
    for name in new:
        assert found.tensors[name].minimum <= values[name].min() + 1e-6
        assert found.tensors[name].maximum >= values[name].max() - 1e-6


POOL = "AveragePool<kernel_shape=[3,3]{}>"


def pool_of(attributes, sizes="8,9,7", result="C,D"):
    text = f"""
        <ir_version: 8, opset_import: ["" : 19]>
        g (float[N,{sizes}] x) => (float[A,B,{result}] y) {{ y = {POOL.format(attributes)}(x) }}
    """
    return load_model(model_of(text))


@pytest.mark.parametrize(
    ("attributes", "operators"),
    [
        ("", ["Conv"]),
        (", strides=[2,1]", ["Conv"]),
        (", dilations=[2,2]", ["Conv"]),
        (", pads=[0,1,2,1], count_include_pad=1", ["Conv"]),
        (', auto_pad="VALID", strides=[2,2]', ["Conv"]),
        (', auto_pad="SAME_UPPER", count_include_pad=1', ["Conv"]),
        (", pads=[0,1,2,1], strides=[2,1]", ["Conv", "Mul"]),
        (', auto_pad="SAME_LOWER", strides=[2,2]', ["Conv", "Mul"]),
        (", dilations=[1,3]", ["Conv"]),
    ],
)
def test_an_average_pool_equals_what_stands_for_it(attributes, operators):
    model = pool_of(attributes)
    (node,) = model.graph.nodes
    assert is_decomposed(node)
    x = np.random.default_rng(0).standard_normal((2, 8, 9, 7)).astype(np.float32)
    (expected,) = open_session(model.to_proto()).run({"x": x}).values()
    found = decompose(model.graph, [node], ranges_of(x=(-4, 4), y=(-2, 2)))
    assert [each.op for each in model.graph.nodes] == operators
    computed = {name for each in model.graph.nodes for name in (tensor.name for tensor in each.outputs)}
    assert computed <= set(found.tensors)
    (values,) = open_session(model.to_proto()).run({"x": x}).values()
    np.testing.assert_allclose(values, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("attributes", "sizes"),
    [
        (", ceil_mode=1", "8,9,7"),
        ("", "C,9,7"),
        (", pads=[1,1,1,1]", "8,H,W"),
        ("", "8,9,W"),  # of two columns a pool takes the mean, and a Conv fails
        (", pads=[0,1,0,0], count_include_pad=1", "8,9,W"),
        (", dilations=[1,4]", "8,9,7"),
    ],
)
def test_an_average_pool_that_no_conv_stands_for_stays(attributes, sizes):
    model = pool_of(attributes, sizes)
    (node,) = model.graph.nodes
    assert not is_decomposed(node)


def test_an_average_pool_over_the_whole_picture_has_a_fast_kernel_and_stays():
    model = pool_of("", "8,3,3", "1,1")
    (node,) = model.graph.nodes
    assert not is_decomposed(node)


@pytest.mark.parametrize(
    ("clip", "operators"),
    [
        ("Relu(m)", ["Max"]),
        ("Clip(m, low, high)", ["Max", "Min"]),
        ("Clip(m, high, low)", ["Max", "Min"]),
        ("Clip(m, , high)", ["Min"]),
        ("Clip(m, low)", ["Max"]),
    ],
)
@pytest.mark.parametrize("output", ["y", "c"])
def test_limits_equal_the_clip_that_hides_a_product(clip, operators, output):
    model = product_before(clip, "y = Exp(c)", output)
    x = {"x": np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)}
    (expected,) = open_session(model.to_proto()).run(x).values()
    write_clips_as_limits(model.graph, model.graph.nodes[:1])
    assert [node.op for node in model.graph.nodes] == ["MatMul", *operators, "Exp"]
    onnx.checker.check_model(model.to_proto(), full_check=True)
    (found,) = open_session(model.to_proto()).run(x).values()
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("clip", "after"),
    [
        ("Relu(m)", "q = QuantizeLinear(c, s, z) y = DequantizeLinear(q, s, z)"),  # the product takes that Q
        ("Relu(m)", "e = Exp(c) y = Mul(e, c)"),
        ("Relu(m)", "y = Add(c, m)"),
        ("Clip(m)", "y = Exp(c)"),
    ],
)
def test_a_clip_that_hides_nothing_stays(clip, after):
    model = product_before(clip, after)
    write_clips_as_limits(model.graph, model.graph.nodes[:1])
    assert model.graph.nodes[1].op == clip[:4]


def product_before(clip, after, output="y"):
    text = f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[A,4] x) => (float[A,3] {output})
        <float[4,3] w, float low = {{-0.5}}, float high = {{0.5}}, float s = {{0.1}}, uint8 z = {{0}}>
        {{ m = MatMul(x, w) c = {clip} {after} }}
    """
    return load_model(model_of(text))
