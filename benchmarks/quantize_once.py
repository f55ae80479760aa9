"""One quantization by one tool, in a process of its own so that its peak memory is its own.

Prints one JSON line: seconds (imports not counted), peak resident memory in MB and, for graphopt, how many operators
run in int8 and why others do not. `compare_quantizers.py` runs it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from simplify_once import peak_mb

from graphopt.data import load_samples
from graphopt.feeds import Feed
from graphopt.runtime import open_session

Measured = dict[str, Any]


class Reader:
    """Feeds in the form that onnxruntime's calibrators ask for."""

    def __init__(self, feeds: Iterable[Feed]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        """The next feed, None behind the last."""
        return next(self._feeds, None)


def run_graphopt(model: Path, data: str, out: Path, setting: str, method: str) -> Measured:
    """`graphopt optimize MODEL --passes fold,calibrate,qdq`; seconds without the verification and the final check.

    `setting` is a target, with options of `qdq` behind a colon.
    """
    import graphopt

    start = time.perf_counter()
    target, colon, options = setting.partition(":")
    passes = f"freeze-inputs,fold,calibrate{method and f':method={method}'},qdq{colon}{options}"
    result = graphopt.optimize(model, passes, data=data, target=target, verify=False)
    result.save(out, overwrite=True)
    last = result.report.passes[-1]
    return {
        "seconds": time.perf_counter() - start,
        "operators": last.parts.get("operators", 0),
        "left_float": [skip.reason for skip in last.skipped],
    }


def run_onnxruntime(model: Path, data: str, out: Path, activations: str, method: str) -> Measured:
    """Onnxruntime's static quantization with its own preparation step, weights per channel.

    `activations` is u8 (asymmetric, what its documentation advises on x86) or s8 (symmetric, what TensorRT takes).
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    samples = load_samples(data, open_session(model).inputs)
    unsigned = activations == "u8"

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        raised, prepared = Path(folder) / "raised.onnx", Path(folder) / "prepared.onnx"
        proto = onnx.load(model)
        if proto.opset_import[0].version < 13:  # its per-channel Q/DQ would not load under a lower opset
            proto.ir_version = max(proto.ir_version, 7)
            proto = onnx.version_converter.convert_version(proto, 13)
        onnx.save(proto, raised)
        quant_pre_process(raised, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            out,
            Reader(samples),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8 if unsigned else QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[method],
            extra_options={"ActivationSymmetric": not unsigned},
        )
    return {"seconds": time.perf_counter() - start}


def run_inference(model: Path, data: str) -> Measured:
    """Plain float inference of the same samples: what calibration costs at least."""
    session = open_session(model)
    samples = load_samples(data, session.inputs)
    start = time.perf_counter()
    for feed in samples:
        session.run(feed)
    return {"seconds": time.perf_counter() - start}


def main() -> None:
    """Run what the arguments ask for: TOOL MODEL DATA OUT SETTING METHOD."""
    tool, model, data, out, setting, method = sys.argv[1:]
    if tool == "graphopt":
        measured = run_graphopt(Path(model), data, Path(out), setting, method)
    elif tool == "onnxruntime":
        measured = run_onnxruntime(Path(model), data, Path(out), setting, method)
    else:
        measured = run_inference(Path(model), data)
    print(json.dumps(measured | {"peak_mb": peak_mb()}))


if __name__ == "__main__":
    main()
