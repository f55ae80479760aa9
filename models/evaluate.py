"""Score the Fashion-MNIST nets, or any optimized variant of them, on the 10,000 test images.

    python models/evaluate.py MODEL.onnx [MODEL.onnx ...] [--native]

A model with an input of 28 x 28 is a classifier: its score is top-1, the share of images whose largest
output is the right class. One with 14 x 14 is the super-resolution net: it gets the 2 x 2 means of the
images, and its score is the peak signal-to-noise ratio, -10 log10(mean squared error) dB of values in 0..1,
averaged over the images. The task is told by the input's size, so a quantized file is scored like its float
original. The data is fetched into models/zoo if it is absent.

On x64 processors without VNNI, onnxruntime's products of uint8 activations and int8 weights saturate at
16 bits and cost accuracy. Scores are taken without that, so that they are the same everywhere; --native lets
it happen.

Exit status: 0 scored, 2 a model or the data cannot be read.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import fashion_mnist
import fetch
import numpy as np
import onnxruntime as ort

BATCH = 500
SMALLEST_ERROR = 1e-12  # keeps the logarithm finite


class EvaluationError(Exception):
    """A model cannot be scored; the message is one line."""


def open_model(path: Path, native: bool) -> Any:
    """Open a model on one thread; `native` is explained above. Raises EvaluationError."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # what matters reaches the user as an exception
    if not native:
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no common base class of its errors
        raise EvaluationError(f"onnxruntime refuses it: {str(error).splitlines()[0]}") from error


def batches(values: np.ndarray[Any, Any], size: int) -> list[np.ndarray[Any, Any]]:
    """Cut along axis 0."""
    return [values[start : start + size] for start in range(0, len(values), size)]


def run_all(model: Any, images: fashion_mnist.Floats) -> fashion_mnist.Floats:
    """Return the first output for all images, in batches of what the model allows. Raises EvaluationError."""
    (value,) = model.get_inputs()
    size = value.shape[0] if isinstance(value.shape[0], int) else BATCH
    try:
        return np.concatenate([model.run(None, {value.name: batch})[0] for batch in batches(images, size)])
    except Exception as error:  # as above
        raise EvaluationError(f"onnxruntime cannot run it: {str(error).splitlines()[0]}") from error


def psnr(first: fashion_mnist.Floats, second: fashion_mnist.Floats) -> float:
    """Return the mean over images of the peak signal-to-noise ratio in dB; both N x 1 x H x W in 0..1."""
    error = np.square(first - second).mean((1, 2, 3))
    return float((-10 * np.log10(error + SMALLEST_ERROR)).mean())


def score(model: Any, images: fashion_mnist.Floats, labels: fashion_mnist.Labels) -> str:
    """Score a model by the task that its input size tells. Raises EvaluationError."""
    shapes = [value.shape for value in model.get_inputs()]
    side = shapes[0][-1] if len(shapes) == 1 and len(shapes[0]) == 4 else None
    if side == fashion_mnist.SIDE:
        right = int((run_all(model, images).argmax(1) == labels).sum())
        return f"top-1 {right / len(images):.4f} ({right} of {len(images)})"
    if side == fashion_mnist.SIDE // 2:
        enlarged = run_all(model, fashion_mnist.halve(images)).clip(0, 1)
        return f"PSNR {psnr(enlarged, images):.3f} dB ({len(images)} images)"
    raise EvaluationError(f"it wants inputs of {shapes}, not one of N x 1 x 28 x 28 or N x 1 x 14 x 14")


def main() -> int:
    """Score every model given, one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL.onnx", type=Path)
    parser.add_argument("--native", action="store_true", help="let 8-bit products saturate on x64 without VNNI")
    parser.add_argument("--zoo", type=Path, default=fetch.ZOO, help="default: models/zoo")
    arguments = parser.parse_args()
    try:
        images, labels = fashion_mnist.load_split("t10k", arguments.zoo)
    except fetch.FetchError as error:
        parser.error(f"no data: {error}")
    status = 0
    for path in arguments.models:
        started = time.perf_counter()
        try:
            result = score(open_model(path, arguments.native), images, labels)
        except EvaluationError as error:
            print(f"error: {path}: {error}", file=sys.stderr)
            status = 2
            continue
        print(f"{path}: {result}, {time.perf_counter() - started:.1f} s", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
