"""The main job on every real model, for an onnxruntime and a TensorRT target, as a user runs it."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from zoo import NAMES, zoo_feeds, zoo_model

from graphopt.api import lint
from graphopt.cli import OK, main
from graphopt.compare import compare_sessions
from graphopt.data import load_samples
from graphopt.graph import all_graphs, producer
from graphopt.lint_rule import Severity
from graphopt.model_io import load_model
from graphopt.placement import node_label
from graphopt.runtime import open_session

pytestmark = pytest.mark.zoo

PIPELINE = "fold,calibrate,qdq"
OF_ONE_ROW = "oww_hey_jarvis"  # all its products are of vectors, so short ones that they stay float
CALIBRATED_ON, SCORED_ON = 8, 4  # samples
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")

# SQNR in dB of each model's worst output for ort-cpu and tensorrt, on feeds that calibration has not seen, with the
# arithmetic that Q and DQ stand for. 4 dB and more under what was measured, with weights for x86 with and without VNNI,
# on 4, on 8 and on up to 128 feeds: room for other processors, versions of onnxruntime and ways to choose ranges, none
# for a wrong scale, a wrong axis or an operator that should have stayed float. Low by nature: a logarithm of power
# spectra (oww_melspectrogram), states fed back (silero), squeeze-and-excitation with hard activations (ppocrv4_det).
FLOORS: dict[str, tuple[float, float]] = {
    "all_minilm_l6_v2": (10, 7),
    "blazeface_front": (10, 2),
    "captcha_crnn": (19, 21),
    "eeg_seizure_lstm": (54, 64),
    "efficientnet_lite0_bn": (13, 15),
    "espcn_nn_resize_x2": (34, 38),
    "magika_standard_v3_3": (34, 35),
    "mtcnn_onet": (13, 18),
    "oww_embedding_model": (16, 15),
    "oww_hey_jarvis": (15, 26),
    "oww_melspectrogram": (2, 2),
    "ppocr_cls_mobile_v2": (22, 19),
    "ppocrv4_det": (1, 7),
    "ppocrv4_rec": (8, 8),
    "silero_vad_fw_seq": (5, 5),
    "silero_vad_v6": (18, 18),
    "waifu2x_upconv7_x2": (29, 31),
    "yolov8n_doclaynet": (18, 20),
}


class Run(NamedTuple):
    """What one run of the command left."""

    float_path: Path
    path: Path
    report: dict
    warnings: str


@pytest.fixture
def run(tmp_path, capsys):
    """The function that runs the command over a model and asserts what holds of every run."""

    def run_once(name: str, target: str, pipeline: str = PIPELINE) -> Run:
        source, out = zoo_model(name), tmp_path / "quantized.onnx"
        before = hashlib.sha256(source.read_bytes()).digest()
        listed = sorted(source.parent.iterdir())
        command = ["optimize", str(source), "--passes", pipeline, "--target", target, "-o", str(out), "--json"]
        data = ["--data", str(zoo_feeds(name, "calibration")), "--samples", str(CALIBRATED_ON)]
        code = main([*command, *data])
        shown = capsys.readouterr()
        assert code == OK, shown.err
        assert hashlib.sha256(source.read_bytes()).digest() == before
        assert sorted(source.parent.iterdir()) == listed
        assert list(tmp_path.iterdir()) == [out]
        report = json.loads(shown.out)
        assert [each["failure"] for each in report["passes"]] == [None] * len(report["passes"])
        assert onnx.load(out).metadata_props == onnx.load(source).metadata_props
        return Run(source, out, report, shown.err)

    return run_once


def sqnr_on_other_samples(name: str, done: Run) -> float:
    """SQNR of the worst output in dB; asserts that every output is finite."""
    reference, judged = open_session(done.float_path), open_session(done.path, optimize=False)
    samples = load_samples(zoo_feeds(name, "evaluation"), reference.inputs, limit=SCORED_ON)
    outputs = open_session(done.path).run(next(iter(samples)))
    assert all(np.isfinite(value).all() for value in outputs.values())
    return compare_sessions(reference, judged, samples).worst_first()[0].sqnr_db


def unquantized(done: Run) -> set[str]:
    """The linear operators of the result that do not read two dequantized inputs, by label."""

    def reads(node: gs.Node, index: int) -> str:
        before = producer(node.inputs[index])
        return "" if before is None else before.op

    nodes = [node for graph in all_graphs(load_model(done.path).graph) for node in graph.nodes if node.op in LINEAR]
    return {node_label(node) for node in nodes if {reads(node, 0), reads(node, 1)} != {"DequantizeLinear"}}


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt"])
@pytest.mark.parametrize("name", NAMES)
def test_every_model_is_quantized_and_stays_close(name, target, run):
    freeze = "freeze-inputs," if name == "espcn_nn_resize_x2" else ""
    done = run(name, target, freeze + PIPELINE)
    qdq = done.report["passes"][-1]
    assert unquantized(done) <= {skip["where"] for skip in qdq["skipped"]}
    sqnr = sqnr_on_other_samples(name, done)
    assert (qdq["rewrites"] > 0) == (name != OF_ONE_ROW)
    assert sqnr >= FLOORS[name][target == "tensorrt"]


def test_the_table_of_floors_names_every_model():
    assert sorted(FLOORS) == sorted(NAMES)


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt"])
def test_a_net_inside_an_if_is_quantized_in_the_branch_that_samples_take(target, run):
    """silero_vad_v6 has a net for 16 kHz in one branch, one for 8 kHz in the other, and samples of 16 kHz."""
    done = run("silero_vad_v6", target)
    then_branch, else_branch = next(
        node.attrs.values() for node in load_model(done.path).graph.nodes if node.op == "If"
    )
    counts = [sum(node.op == "QuantizeLinear" for node in branch.nodes) for branch in (then_branch, else_branch)]
    assert sorted(counts) == [0, max(counts)] != [0, 0]
    reasons = {skip["reason"] for skip in done.report["passes"][-1]["skipped"]}
    assert any("no sample went through If_0/else_branch" in reason for reason in reasons)
    found = lint(load_model(done.path), target=target).findings
    errors = {finding.rule for finding in found if finding.severity is Severity.ERROR}
    assert errors <= {"TRT031"}  # TensorRT for RTX 1.7 builds the float model no more than this one


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt"])
def test_weights_that_a_caller_may_override_stay_float_and_a_warning_says_how_to_change_that(target, run):
    done = run("espcn_nn_resize_x2", target)
    assert "put freeze-inputs first" in done.warnings
    qdq = done.report["passes"][-1]
    assert qdq["rewrites"] == 0
    assert [skip["reason"].endswith("run freeze-inputs first") for skip in qdq["skipped"]] == [True] * 4
    assert sqnr_on_other_samples("espcn_nn_resize_x2", done) == math.inf
