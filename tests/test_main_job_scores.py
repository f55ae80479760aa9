"""What quantization costs the three committed nets in the score that they were trained for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import graphopt
from graphopt.runtime import Session, open_session

MODELS = Path(__file__).resolve().parent.parent / "models"


def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(MODELS / f"{name}.npz") as stored:
        return dict(stored)


def top_1(session: Session) -> float:
    """The share of right classes, in points of 100."""
    samples = arrays("fashion_mnist_evaluation")
    found = session.run({"input": samples["input"]})["output"].argmax(1)
    return 100 * float((found == samples["label"]).mean())


def psnr(session: Session) -> float:
    """Peak signal-to-noise ratio of enlarged images in dB, the mean over images."""
    samples = arrays("fashion_mnist_small_evaluation")
    found = session.run({"input": samples["input"]})["output"].clip(0, 1)
    return float((-10 * np.log10(np.square(found - samples["target"]).mean((1, 2, 3)))).mean())


@pytest.mark.parametrize("target", ["ort-cpu", "ort-arm", "tensorrt"])
@pytest.mark.parametrize(
    ("name", "data", "score", "loss"),
    [
        ("fmnist_resnet", "fashion_mnist", top_1, 1),
        ("fmnist_mbv2", "fashion_mnist", top_1, 1),
        ("fmnist_srunet", "fashion_mnist_small", psnr, 0.2),
    ],
)
def test_quantization_costs_less_than_a_point_or_a_fifth_of_a_decibel(name, data, score, loss, target):
    model = MODELS / f"{name}.onnx"
    result = graphopt.optimize(
        model, "fold,calibrate,qdq", data=MODELS / f"{data}_calibration.npz", target=target, verify=False
    )
    assert result.report.passes[-1].rewrites > 0
    # onnxruntime's own kernels are what ort-cpu is for; for other targets, the arithmetic that Q and DQ stand for
    quantized = open_session(result.model, optimize=target == "ort-cpu")
    assert score(open_session(model)) - score(quantized) < loss
