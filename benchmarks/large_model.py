"""Peak memory of `graphopt optimize --passes fold` on a model with gigabytes of weights in a file beside it.

    python benchmarks/large_model.py [--gigabytes 3] [--verify] [--folder DIR]

The model is made tensor by tensor from a seed, a row of layers of 4096 x 4096: MatMul and Mul, Gemm and
BatchNormalization, Transpose and MatMul, Gemm and Relu. All but the last fold into other weights. Twice its size must
be free in DIR; the files are deleted in the end. Linux only.

    peak       resident memory at its highest, pages of mapped files among it, which the system takes back when it must
    anonymous  the same without those pages: what the process really needs

Exit code 1 where graphopt fails or the peak passes twice the model's bytes and 200 MB.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

SEED = 0
WIDTH = 4096
LAYER_BYTES = WIDTH * WIDTH * 4
ALLOWED_RATIO, ALLOWED_MB = 2, 200
POLL_SECONDS = 0.05


def make_model(path: Path, layers: int) -> None:
    """Write a model, whose weights are never in memory together."""
    rng = np.random.default_rng(SEED)
    nodes: list[NodeProto] = []
    weights: list[TensorProto] = []
    with path.with_suffix(".data").open("wb") as file:
        for number in range(layers):
            values = (rng.random((WIDTH, WIDTH), np.float32) - np.float32(0.5)) * np.float32(np.sqrt(12 / WIDTH))
            weights += [stored(values, f"w{number}", file), *vectors(number, rng)]
            nodes += layer(number)
    shapes = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", WIDTH]) for name in ("x0", f"x{layers}")
    }
    graph = helper.make_graph(nodes, "large", [shapes["x0"]], [shapes[f"x{layers}"]], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def stored(values: NDArray[np.float32], name: str, file: BinaryIO) -> TensorProto:
    """Append values to the file and return the tensor that points there."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=values.shape, data_location=TensorProto.EXTERNAL)
    place = {"location": Path(file.name).name, "offset": file.tell(), "length": values.nbytes}
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    file.write(values.data)
    return tensor


def vectors(number: int, rng: np.random.Generator) -> Iterator[TensorProto]:
    """Yield what may be small in a layer: a scale and a variance near 1, a bias and a mean near 0."""
    for kind, middle in (("scale", 1.0), ("variance", 1.0), ("bias", 0.0), ("mean", 0.0)):
        values = (middle + 0.1 * rng.uniform(-1, 1, WIDTH)).astype(np.float32)
        yield numpy_helper.from_array(values, f"{kind}{number}")


def layer(number: int) -> list[NodeProto]:
    """Return one of the four kinds of layers, from x<number> to the next."""
    x, y, weight, scale, bias = (f"{kind}{number}" for kind in ("x", "y", "w", "scale", "bias"))
    out = f"x{number + 1}"
    kinds = (
        [("MatMul", [x, weight], y), ("Mul", [y, scale], out)],
        [
            ("Gemm", [x, weight, bias], y),
            ("BatchNormalization", [y, scale, bias, f"mean{number}", f"variance{number}"], out),
        ],
        [("Transpose", [weight], y), ("MatMul", [x, y], out)],
        [("Gemm", [x, weight, bias], y), ("Relu", [y], out)],
    )
    return [helper.make_node(op, inputs, [output]) for op, inputs, output in kinds[number % len(kinds)]]


def optimize(model: Path, out: Path, verify: bool) -> tuple[int, float, float, float]:
    """Run graphopt; return its exit code, seconds, peak MB and the highest anonymous MB that was seen."""
    command = [str(Path(sysconfig.get_path("scripts")) / "graphopt"), "optimize", str(model), "--passes", "fold"]
    start, anonymous = time.perf_counter(), 0.0
    with subprocess.Popen([*command, "-o", str(out), *([] if verify else ["--no-verify"])]) as process:
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            anonymous = max(anonymous, anonymous_mb(process.pid))
            time.sleep(POLL_SECONDS)
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, time.perf_counter() - start, usage.ru_maxrss / 1024, anonymous


def anonymous_mb(pid: int) -> float:
    """Resident memory of a process that is no file's; 0 once it has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:")), 0.0)


def main() -> int:
    """Make, optimize, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--verify", action="store_true", help="run the model before and after, too")
    parser.add_argument("--folder", type=Path, help="where the files go; default: the folder for temporary files")
    arguments = parser.parse_args()
    layers = max(1, round(arguments.gigabytes * 1e9 / LAYER_BYTES))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if shutil.disk_usage(folder).free < 2.1 * layers * LAYER_BYTES:
            parser.error(
                f"{folder}: not enough room for two models of {layers * LAYER_BYTES / 1e9:.1f} GB; give --folder"
            )
        model, out = Path(folder) / "large.onnx", Path(folder) / "folded.onnx"
        make_model(model, layers)
        model_mb = sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20
        print(f"made {model_mb:.0f} MB in {layers} layers", flush=True)
        code, seconds, peak, anonymous = optimize(model, out, arguments.verify)
    allowed = ALLOWED_RATIO * model_mb + ALLOWED_MB
    print(f"exit code {code}, {seconds:.1f} s")
    print(f"peak {peak:.0f} MB = {peak / model_mb:.2f} x the model, at most {allowed:.0f} MB")
    print(f"anonymous {anonymous:.0f} MB = {anonymous / model_mb:.2f} x the model")
    return int(code != 0 or peak > allowed)


if __name__ == "__main__":
    sys.exit(main())
