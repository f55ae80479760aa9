import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from comparing import apply_and_compare, assert_equal_outputs, ops
from onnx import TensorProto, helper, numpy_helper
from zoo import NAMES, zoo_feed, zoo_model

from graphopt.errors import PipelineError
from graphopt.graph import all_graphs
from graphopt.model_io import load_model
from graphopt.pass_base import Context, Effect, Pass, PassResult
from graphopt.passes import fold
from graphopt.passes.fold import Fold
from graphopt.passes.replace_sum import ReplaceSum
from graphopt.runtime import open_session

_LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"

_TEXT = """
<ir_version: 8, opset_import: ["" : 17]> agraph (float[N,3,8,8] x) => (float[N,4] y) {
  w2 = Identity (w)
  c = Conv (x, w2)
  i = Identity (c)
  n = BatchNormalization (i, one, zero, zero, one)
  k = Constant <value_float = 1.0> ()
  m = Mul (n, k)
  p = GlobalAveragePool (m)
  s = Shape (p)
  b = Gather (s, first)
  t = Concat <axis = 0> (b, minus)
  y = Reshape (p, t)
  dead = Exp (m)
}
"""
_CONSTANTS = {
    "w": np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32),
    "one": np.full(4, 1.5, np.float32),
    "zero": np.full(4, 0.25, np.float32),
    "first": np.zeros(1, np.int64),
    "minus": np.full(1, 4, np.int64),
}


def test_members_make_work_for_each_other():
    result, model = apply_and_compare(_TEXT, Fold(), constants=_CONSTANTS)
    assert ops(model) == {"Conv": 1, "GlobalAveragePool": 1, "Reshape": 1}
    assert result.parts["fold-batch-norm"] == 1
    assert result.rewrites == sum(result.parts.values())


def test_members_that_have_nothing_to_do_before_shapes_are_known_get_another_turn():
    """The Slice's end is computed: its size is known once it is folded, and that nothing is moved by the Transpose."""
    text = """
        <ir_version: 8, opset_import: ["" : 17]> g (float[1,1,48] x) => (float[1,4,A,B] y) {
            all = Shape <start = 2> (x)  half = Div (all, two)  s = Slice (x, zero, half, two)
            r = Reshape (s, heads)  y = Transpose <perm = [0, 2, 1, 3]> (r)
        }
    """
    sizes = {"zero": [0], "two": [2], "heads": [1, -1, 4, 6]}
    constants = {name: np.array(values, np.int64) for name, values in sizes.items()}
    _, model = apply_and_compare(text, Fold(), constants=constants)
    assert ops(model) == {"Slice": 1, "Reshape": 1}


def test_a_second_run_finds_nothing():
    result, _ = apply_and_compare(_TEXT, Fold(), Fold(), constants=_CONSTANTS)
    assert result.rewrites == 0


@pytest.mark.parametrize(
    ("member", "op"),
    [
        ("fold-batch-norm", "BatchNormalization"),
        ("fold-constants", "Shape"),
        ("remove-identities", "Identity"),
        ("remove-dead-nodes", "Exp"),
    ],
)
def test_leaves_out_a_member(member, op):
    result, model = apply_and_compare(_TEXT, Fold(skip=(member,)), constants=_CONSTANTS)
    assert ops(model)[op]
    assert member not in result.parts


def test_refuses_to_skip_what_is_no_member():
    with pytest.raises(PipelineError, match=r"skip=fold-conv is none of its members; they are forget-unknown-sizes, "):
        Fold(skip=("fold-conv",))


@dataclass(frozen=True, kw_only=True)
class _WriteSum(Pass):
    """Undo replace-sum."""

    name = "write-sum"
    effect = Effect.EXACT

    def apply(self, graph, context):
        adds = [node for node in graph.nodes if node.op == "Add"]
        for node in adds:
            node.op = "Sum"
        return PassResult(rewrites=len(adds))


@dataclass(frozen=True, kw_only=True)
class _RenameOutput(Pass):
    """Change something in every turn."""

    name = "rename-output"
    effect = Effect.EXACT

    def apply(self, graph, context):
        graph.nodes[0].outputs[0].name += "_"
        return PassResult(rewrites=1)


_TWO_ADDS = '<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] y) { a = Add (x, x) y = Add (a, x) }'


def test_stops_when_members_undo_each_other(monkeypatch):
    monkeypatch.setattr(fold, "MEMBERS", (ReplaceSum, _WriteSum))
    result, model = apply_and_compare(_TWO_ADDS, Fold())
    assert "its members undo each other's changes (replace-sum, write-sum)" in result.notes[0]
    assert ops(model).total() == 2


def test_stops_after_a_bounded_number_of_rounds(monkeypatch):
    monkeypatch.setattr(fold, "MEMBERS", (_RenameOutput,))
    result, _ = apply_and_compare(_TWO_ADDS, Fold())
    assert "100 rounds were not enough" in result.notes[0]
    assert result.rewrites == 100


def test_folding_again_changes_nothing():
    _, model = apply_and_compare(_TEXT, Fold(), constants=_CONSTANTS)
    result, _ = apply_and_compare(model, Fold())
    assert result.rewrites == 0


def test_hands_max_growth_on():
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> agraph (float[N] x) => (float[A] y)'
        " { f = ConstantOfShape (shape) s = ReduceSum <keepdims = 0> (x) y = Add (s, f) }"
    )
    constants = {"shape": np.full(1, 9000, np.int64)}
    result, model = apply_and_compare(text, Fold(), constants=constants)
    assert ops(model)["ConstantOfShape"] == 1
    assert len(result.skipped) == 1
    _, model = apply_and_compare(text, Fold(max_growth=40_000), constants=constants)
    assert ops(model)["ConstantOfShape"] == 0


@pytest.mark.parametrize("name", ["resnet50", "densenet121", "shufflenet"])
def test_weights_that_are_filled_at_run_time_stay_so(name):
    path = _LIGHT / f"light_{name}.onnx"
    model = load_model(path)
    result = Fold().apply(model.graph, Context())
    assert model.to_proto().ByteSize() <= path.stat().st_size + Fold().max_growth  # folded blindly: 100 to 1000 times
    assert any("would grow the model" in skip.reason for skip in result.skipped)


@pytest.mark.zoo
@pytest.mark.parametrize("name", NAMES)
def test_real_models_keep_their_outputs(name, capsys):
    path = zoo_model(name)
    model = load_model(path)
    before = sum(len(graph.nodes) for graph in all_graphs(model.graph))
    start = time.perf_counter()
    result = Fold().apply(model.graph, Context(frame=model.frame))
    seconds = time.perf_counter() - start
    after = sum(len(graph.nodes) for graph in all_graphs(model.graph))
    with capsys.disabled():
        print(f"\n{name}: {before} nodes, {after} after {seconds:.2f} s; {dict(result.parts)}")
    folded = model.to_proto()
    assert folded.ByteSize() <= path.stat().st_size + Fold().max_growth
    assert Fold().apply(model.graph, Context(frame=model.frame)).rewrites == 0
    original = open_session(path, optimize=False, threads=1)
    feed = zoo_feed(name, original)
    found = open_session(folded, optimize=False, threads=1).run(feed)
    for output, value in original.run(feed).items():
        # probabilities near 0 have no better relative precision than the logits that they come from
        limit = 1e-4 * np.abs(value).max(initial=0) + 1e-6
        np.testing.assert_allclose(found[output], value, rtol=0, atol=limit, err_msg=output)


@pytest.mark.zoo
def test_static_pads_of_efficientnet_fold_and_its_batch_stays_dynamic():
    path = zoo_model("efficientnet_lite0_bn")
    model = load_model(path)
    result = Fold().apply(model.graph, Context())
    assert result.parts["fold-batch-norm"] == 49
    folded = model.to_proto()
    assert len(folded.graph.node) <= 160
    assert result.parts["fold-pad"] == 17
    assert ops(folded)["Pad"] == 0
    assert ops(folded)["Shape"] <= 1  # of the batch, for the Flatten before the classifier
    image = np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
    assert_equal_outputs(onnx.load(path), folded, {folded.graph.input[0].name: image}, tolerance=1e-5)


def test_lines_run_grow_with_the_number_of_nodes_and_no_faster():
    lines = {}
    for blocks in (50, 500):
        model = load_model(_chain(blocks))
        result, lines[blocks] = _lines_run(lambda graph=model.graph: Fold().apply(graph, Context()))
        assert result.parts["fold-batch-norm"] == blocks
        assert sum(len(graph.nodes) for graph in all_graphs(model.graph)) == 2 * blocks
    assert lines[500] < 12 * lines[50]


def _lines_run(call):
    """What `call` returns, and how many lines of graphopt it ran: a measure of time that no other process disturbs."""
    count = 0

    def trace(frame, event, _argument):
        nonlocal count
        if frame.f_globals.get("__name__", "").partition(".")[0] != "graphopt":
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return call(), count
    finally:
        sys.settrace(before)


def _chain(blocks: int) -> onnx.ModelProto:
    """Conv, BatchNormalization, Relu and a dead Shape, over and over."""
    nodes, previous = [], "x"
    for index in range(blocks):
        nodes += [
            helper.make_node("Conv", [previous, "w"], [f"c{index}"]),
            helper.make_node("BatchNormalization", [f"c{index}", "s", "s", "s", "s"], [f"n{index}"]),
            helper.make_node("Relu", [f"n{index}"], [f"r{index}"]),
            helper.make_node("Shape", [f"r{index}"], [f"s{index}"]),
        ]
        previous = f"r{index}"
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 4, 4])],
        [helper.make_tensor_value_info(previous, TensorProto.FLOAT, ["N", 3, 4, 4])],
        [
            numpy_helper.from_array(np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1), "w"),
            numpy_helper.from_array(np.ones(3, np.float32), "s"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
