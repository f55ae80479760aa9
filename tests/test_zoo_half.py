"""Real models converted to float16 by onnxruntime's tool, quantized like those in float32."""

from collections import Counter

import onnx
import pytest
from onnxruntime.transformers.float16 import convert_float_to_float16
from zoo import zoo_feeds, zoo_model

import graphopt

pytestmark = pytest.mark.zoo


@pytest.mark.parametrize("keep_io_types", [True, False])
@pytest.mark.parametrize("name", ["silero_vad_v6", "mtcnn_onet", "espcn_nn_resize_x2", "oww_embedding_model"])
def test_half_precision_is_quantized_like_float32(name, keep_io_types, tmp_path):
    converted = tmp_path / "half.onnx"
    onnx.save(convert_float_to_float16(onnx.load(zoo_model(name)), keep_io_types=keep_io_types), converted)
    counts = []
    for model in (zoo_model(name), converted):
        passes = "freeze-inputs,fold,calibrate:method=mse,qdq"
        result = graphopt.optimize(model, passes, data=str(zoo_feeds(name, "calibration")), samples=4)
        assert not [each for each in result.report.passes if each.failure]
        counts.append(Counter(node.op for node in result.optimized.graph.nodes))
    products = ("Conv", "Gemm", "MatMul", "DequantizeLinear")
    assert [counts[1][op] for op in products] == [counts[0][op] for op in products]
