"""Weights of 4 bits and float8 on real models, as a user runs them."""

from __future__ import annotations

import json

import pytest
from zoo import zoo_feeds, zoo_model

from graphopt.cli import OK, main
from graphopt.model_io import load_model
from graphopt.runtime import optimized_ops

pytestmark = pytest.mark.zoo

SAMPLES = 4
# the lowest SQNR in dB on feeds that nothing was chosen on: some 3 dB under what was measured
INT4 = {"all_minilm_l6_v2": (36, 10), "magika_standard_v3_3": (2, 20), "ppocrv4_rec": (9, 13)}
FLOAT8 = {"all_minilm_l6_v2": 15, "efficientnet_lite0_bn": 9}


def optimized(name, passes, out, capsys, *options):
    data = ["--data", str(zoo_feeds(name, "calibration")), "--samples", "8"] if "calibrate" in passes else []
    command = ["optimize", str(zoo_model(name)), "--passes", passes, "-o", str(out), "--json", *data, *options]
    assert main(command) == OK, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def sqnr_db(name, out, capsys, *options):
    data = ["--data", str(zoo_feeds(name, "evaluation")), "--samples", str(SAMPLES)]
    assert main(["check", str(zoo_model(name)), str(out), *data, "--json", *options]) == OK
    report = json.loads(capsys.readouterr().out)
    return min(output["sqnr_db"] for output in report["comparison"]["outputs"])


@pytest.mark.parametrize("name", INT4)
def test_weights_of_four_bits_need_no_data_and_onnxruntime_reads_them(name, tmp_path, capsys):
    count, floor = INT4[name]
    report = optimized(name, "fold,qdq:weights=int4", tmp_path / "int4.onnx", capsys)
    assert report["passes"][-1]["parts"]["weights in blocks"] == count
    loaded = load_model(tmp_path / "int4.onnx")
    assert optimized_ops(loaded.to_proto())["MatMulNBits"] == count
    assert loaded.nbytes < 0.9 * load_model(zoo_model(name)).nbytes
    assert sqnr_db(name, tmp_path / "int4.onnx", capsys) > floor


def test_other_operators_run_in_int8_beside_weights_of_four_bits(tmp_path, capsys):
    name = "ppocrv4_rec"
    optimized(name, "fold,calibrate,qdq:weights=int4", tmp_path / "int4.onnx", capsys)
    found = optimized_ops(load_model(tmp_path / "int4.onnx").to_proto())
    assert found["MatMulNBits"] == INT4[name][0]
    assert found["QLinearConv"] > 10


@pytest.mark.parametrize("name", FLOAT8)
def test_float8_stays_close_to_the_float_model(name, tmp_path, capsys):
    passes = "fold,calibrate,qdq:activations=float8e4m3"
    report = optimized(name, passes, tmp_path / "float8.onnx", capsys, "--target", "tensorrt")
    assert not any(finding["severity"] == "error" for finding in report["lint"]["findings"])
    assert sqnr_db(name, tmp_path / "float8.onnx", capsys, "--exact") > FLOAT8[name]
