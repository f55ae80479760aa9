"""One int8 quantization by NVIDIA's Model Optimizer, in a process of its own; prints one JSON line.

    python modelopt_once.py MODEL SAMPLES.npz OUT METHOD

Runs where `nvidia-modelopt[onnx]` is installed; it asks for older versions of onnx than graphopt, so graphopt is not
needed there. The model is copied first.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import modelopt.onnx.quantization as modelopt
import numpy as np


def main() -> None:
    """Quantize, and print seconds (imports not counted) and peak resident memory in MB."""
    model, samples, out, method = sys.argv[1:]
    with np.load(samples) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    with tempfile.TemporaryDirectory() as folder:
        copied = shutil.copy(model, Path(folder, "model.onnx"))
        start = time.perf_counter()
        modelopt.quantize(
            onnx_path=str(copied),
            quantize_mode="int8",
            calibration_data=data,
            calibration_method=method,
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",
            output_path=out,
        )
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mb": peak}))


if __name__ == "__main__":
    main()
