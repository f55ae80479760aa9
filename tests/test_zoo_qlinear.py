"""Real models that onnxruntime has put into QLinear operators come back as float ones."""

from pathlib import Path

import onnxruntime as ort
import pytest
from zoo import zoo_feeds, zoo_model

import graphopt
from graphopt.model_io import load_model
from graphopt.qlinear import computes_with_integers

pytestmark = pytest.mark.zoo


def fused_by_onnxruntime(model, path: Path) -> Path:
    """The file that onnxruntime's optimizer makes of a Q/DQ model."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # no layouts of this CPU
    options.optimized_model_filepath = str(path)
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return path


@pytest.mark.parametrize("name", ["efficientnet_lite0_bn", "ppocr_cls_mobile_v2", "mtcnn_onet", "oww_embedding_model"])
def test_no_integers_are_left_and_outputs_stay_close(name, tmp_path):
    data = {"data": str(zoo_feeds(name, "calibration")), "samples": 4}
    pairs = graphopt.optimize(
        zoo_model(name), "freeze-inputs,fold,calibrate:method=mse,qdq", **data, verify=False
    ).model
    fused = fused_by_onnxruntime(pairs, tmp_path / "fused.onnx")
    assert sum(map(computes_with_integers, load_model(fused).graph.nodes)) > 10
    found = [graphopt.optimize(each, "strip-qdq", **data).optimized for each in (pairs, fused)]
    kept = {node.op for node in found[1].graph.nodes}
    assert not [op for op in kept if op.startswith("QLinear") or op in ("QuantizeLinear", "DequantizeLinear", "QGemm")]
    errors = [graphopt.check(zoo_model(name), each.to_proto(), **data).comparison.outputs[0].sqnr_db for each in found]
    assert errors[1] > errors[0] - 6
