"""What the manager promises: clones, verification, rollback, records."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from graphopt.data import load_samples
from graphopt.errors import OutputError, PipelineError
from graphopt.graph import constant_of
from graphopt.model_io import load_model
from graphopt.pass_base import Context, Effect, Pass, PassResult, Skip
from graphopt.pass_manager import PassManager
from graphopt.runtime import open_session

TEXT = """
    <ir_version: 8, opset_import: ["" : 17]>
    example (float[N,4] x) => (float[N,4] y)
    <float[4] k = {1, 2, 3, 4}>
    { a = Mul(x, k)  y = Relu(a) }
"""


def model():
    return onnx.parser.parse_model(TEXT)


@dataclass(frozen=True, kw_only=True)
class Scale(Pass):
    """Multiply the constant; a change of the outputs whose size a test chooses."""

    name: ClassVar[str] = "scale"
    effect: ClassVar[Effect] = Effect.EXACT
    by: float = 1.0

    def apply(self, graph, context):
        node = next(node for node in graph.nodes if node.op == "Mul")
        node.inputs[1] = gs.Constant("k2", constant_of(node.inputs[1]) * np.float32(self.by))
        return PassResult(rewrites=1, skipped=(Skip("y", "for the test"),))


@dataclass(frozen=True, kw_only=True)
class Lossy(Scale):
    """The same, declared lossy."""

    name: ClassVar[str] = "lossy"
    effect: ClassVar[Effect] = Effect.LOSSY


@dataclass(frozen=True, kw_only=True)
class Break(Pass):
    """Make an invalid graph."""

    name: ClassVar[str] = "break"
    effect: ClassVar[Effect] = Effect.LOSSY

    def apply(self, graph, context):
        graph.nodes[0].op = "NoSuchOperator"
        return PassResult(rewrites=1)


@dataclass(frozen=True, kw_only=True)
class Crash(Pass):
    """Raise what no pass should."""

    name: ClassVar[str] = "crash"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, graph, context):
        raise KeyError("oops")


@dataclass(frozen=True, kw_only=True)
class Refuse(Pass):
    """Say that the request cannot be honoured."""

    name: ClassVar[str] = "refuse"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, graph, context):
        raise PipelineError("not like this")


def constant(result):
    return onnx.numpy_helper.to_array(result.model.graph.initializer[0]).tolist()


def test_the_source_is_never_changed():
    source = load_model(model())
    before = source.to_proto().SerializeToString()
    result = PassManager([Lossy(by=2.0)]).run(source)
    assert source.to_proto().SerializeToString() == before
    assert constant(result) == [2, 4, 6, 8]


def test_a_graph_of_the_caller_is_never_changed():
    graph = gs.import_onnx(model())
    PassManager([Lossy(by=2.0)]).run(graph)
    assert graph.nodes[0].inputs[1].name == "k"


def test_each_pass_has_a_record():
    result = PassManager([Scale(), Lossy(by=2.0)]).run(model())
    first, second = result.report.passes
    assert (first.text, first.rewrites, first.skipped) == ("scale", 1, (Skip("y", "for the test"),))
    assert (second.text, second.nodes, second.failure) == ("lossy:by=2.0", 2, None)
    assert first.seconds > 0
    assert second.nbytes == 16
    assert result.report.pipeline == "scale,lossy:by=2.0"


@pytest.mark.parametrize("broken", [Scale(by=1.01), Break(), Crash()], ids=lambda item: item.name)
def test_a_pass_that_breaks_the_model_is_rolled_back_and_the_run_goes_on(broken):
    result = PassManager([broken, Lossy(by=2.0)]).run(model())
    first, second = result.report.passes
    assert first.failure
    assert first.rewrites == 0
    assert second.failure is None
    assert result.report.failed
    assert constant(result) == [2, 4, 6, 8]


def test_a_difference_within_float_noise_is_no_failure():
    assert not PassManager([Scale(by=1 + 1e-7)]).run(model()).report.failed


def test_a_failure_leaves_a_folder_that_shows_it_again(tmp_path):
    PassManager([Scale(by=3.0)]).run(model(), failure_folder=tmp_path)
    folder = tmp_path / "0-scale"
    assert "--passes scale:by=3.0" in (folder / "README.txt").read_text(encoding="utf-8")
    assert onnx.load(folder / "before.onnx").graph.node[0].op_type == "Mul"
    again = PassManager([Scale(by=3.0)]).run(
        folder / "before.onnx", Context(samples=load_samples(str(folder / "feeds"), open_session(model()).inputs))
    )
    assert again.report.passes[0].failure


def test_a_failure_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    result = PassManager([Scale(by=3.0)]).run(model(), failure_folder=tmp_path / "file")
    (warning,) = result.report.warnings
    assert "could not be written" in warning


def test_feeds_of_any_type_and_name_reproduce_a_failure(tmp_path):
    text = TEXT.replace("(float[N,4] x)", "(float[N,4] x, string[N] file)").replace(
        "(float[N,4] y)", "(float[N,4] y, string[N] z)"
    )
    text = text.replace("y = Relu(a)", "y = Relu(a) z = Identity(file)")
    proto = onnx.parser.parse_model(text)
    PassManager([Scale(by=3.0)]).run(proto, failure_folder=tmp_path)
    samples = load_samples(str(tmp_path / "0-scale" / "feeds"), open_session(proto).inputs)
    assert [set(feed) for feed in samples] == [{"x", "file"}] * 2


def test_a_change_that_a_pass_does_not_count_is_dropped():
    @dataclass(frozen=True, kw_only=True)
    class Silent(Scale):
        def apply(self, graph, context):
            super().apply(graph, context)
            return PassResult()

    result = PassManager([Silent(by=3.0)]).run(model())
    assert not result.report.failed
    assert constant(result) == [1, 2, 3, 4]


def test_constants_that_a_pass_left_unread_go():
    text = TEXT.replace("<float[4] k = {1, 2, 3, 4}>", "").replace(
        "{ a", "{ k = Constant <value_floats = [1.0, 2.0, 3.0, 4.0]> ()  a"
    )
    result = PassManager([Scale(by=1.0)]).run(onnx.parser.parse_model(text))
    assert [node.op_type for node in result.model.graph.node] == ["Mul", "Relu"]


def test_a_lossy_pass_that_changes_nothing_is_warned_about():
    @dataclass(frozen=True, kw_only=True)
    class Idle(Lossy):
        def apply(self, graph, context):
            return PassResult(skipped=(Skip("y", "for the test"),))

    (warning,) = PassManager([Idle()]).run(model()).report.warnings
    assert warning.startswith("pass lossy changed nothing: the places that it left alone")


def test_the_result_is_never_the_graph_of_the_caller():
    graph = gs.import_onnx(model())
    assert PassManager([]).run(graph).optimized.graph is not graph


def test_what_is_no_pass_is_refused():
    with pytest.raises(PipelineError, match="is no pass: give instances"):
        PassManager([Scale])


def test_an_error_names_the_pass_that_was_rolled_back_before():
    with pytest.raises(PipelineError, match=r"not like this; before that, crash was rolled back: .*crashed"):
        PassManager([Crash(), Refuse()]).run(model())


def test_a_model_that_runs_on_no_made_up_input_is_not_verified_and_says_so():
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (int64[1] n) => (float[1] y) <float[3] table = {1, 2, 3}, int64[1] three = {3}>
        { index = Add(n, three) y = Gather(table, index) }"""
    result = PassManager([]).run(onnx.parser.parse_model(text))
    (warning,) = result.report.warnings
    assert "outputs are not verified: the model runs with none of the made-up inputs" in warning
    assert "out of data bounds" in warning


def test_outputs_that_are_sequences_are_verified():
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[2,4] x) => (seq(float[1,4]) y) <float[4] k = {1, 2, 3, 4}>
        { a = Mul(x, k)  y = SplitToSequence<axis = 0>(a) }"""
    same, changed = (PassManager([Scale(by=by)]).run(onnx.parser.parse_model(text)) for by in (1.0, 2.0))
    assert not same.report.failed
    assert "differs" in changed.report.passes[0].failure


def test_without_verification_nothing_is_rolled_back():
    result = PassManager([Scale(by=3.0)], verify=False).run(model())
    assert not result.report.failed
    assert constant(result) == [3, 6, 9, 12]


def test_a_request_that_cannot_be_honoured_stops_the_run():
    with pytest.raises(PipelineError, match="not like this"):
        PassManager([Refuse()]).run(model())


def test_a_model_that_the_checker_refuses_but_onnxruntime_runs_is_accepted_with_a_warning():
    refused = model()
    refused.ir_version = 3  # before 4 every initializer must be an input too
    result = PassManager([Lossy(by=2.0)]).run(refused)
    assert not result.report.failed


def test_saving_refuses_the_input_file_and_an_existing_one(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(model(), path)
    before = path.read_bytes()
    result = PassManager([Lossy(by=2.0)]).run(path)
    with pytest.raises(OutputError, match="input"):
        result.save(path, overwrite=True)
    result.save(tmp_path / "out.onnx")
    with pytest.raises(OutputError, match="exists"):
        result.save(tmp_path / "out.onnx")
    result.save(tmp_path / "out.onnx", overwrite=True)
    assert path.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.onnx", "out.onnx"]
