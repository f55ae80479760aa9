"""What the manager promises: clones, verification, rollback, records."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from graphopt.errors import OutputError, PipelineError
from graphopt.model_io import load_model
from graphopt.pass_base import Effect, Pass, PassResult, Skip
from graphopt.pass_manager import PassManager

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
        node = graph.nodes[0]
        node.inputs[1] = gs.Constant("k2", node.inputs[1].values * np.float32(self.by))
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
    assert np.load(folder / "feeds" / "00000.npz")["x"].dtype == np.float32


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
