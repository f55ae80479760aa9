"""Every real model for TensorRT beside NVIDIA's Model Optimizer: a Markdown table.

    python3 -m venv modelopt && modelopt/bin/pip install torch==2.13.0 'nvidia-modelopt[onnx]==0.47.*'
    python models/fetch.py && python models/feeds.py
    python benchmarks/compare_modelopt.py --modelopt modelopt/bin/python [NAME ...] [--zoo models/zoo]

Both quantize on one half of each model's feeds and are scored on the other: SQNR of the worst output in exact
arithmetic; the share of MACs that TensorRT's compiler puts in int8 (graphopt[tensorrt]); the file in MB; seconds of the
whole tool. Model Optimizer takes each input as one array, so models whose feeds vary in shape are left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from compare_quantizers import ROOT, Row, Variant, quantize, score
from zoo_table import SCORED, model_names, places

from graphopt.api import lint
from graphopt.data import load_samples
from graphopt.lint import Severity
from graphopt.runtime import open_session
from graphopt.targets.int8_share import MACS_IN_INT8

METHODS = ("max", "entropy")
OURS = Variant("graphopt", "tensorrt", "")


def stacked(model: Path, data: str, out: Path) -> bool:
    """Write all feeds as one array an input; whether their shapes allow that."""
    feeds = list(load_samples(data, open_session(model).inputs))
    columns = {name: [feed[name] for feed in feeds] for name in feeds[0]}
    if any(len({array.shape[1:] for array in arrays}) > 1 for arrays in columns.values()):
        return False
    joined = {name: (np.concatenate if arrays[0].ndim else np.stack)(arrays) for name, arrays in columns.items()}
    np.savez(out, **joined)
    return True


def run_modelopt(python: Path, model: Path, samples: Path, out: Path, method: str) -> Row:
    """Run Model Optimizer in its own environment."""
    row = Row(f"Model Optimizer {method}")
    script = Path(__file__).with_name("modelopt_once.py")
    command = [str(python), str(script), str(model), str(samples), str(out), method]
    done = subprocess.run(command, check=False, text=True, capture_output=True)
    if done.returncode:
        row.failed = (done.stderr.strip().splitlines() or ["?"])[-1]
        return row
    row.seconds = json.loads(done.stdout.splitlines()[-1])["seconds"]
    row.mb = out.stat().st_size / 1e6
    return row


def measure(name: str, zoo: Path, python: Path) -> list[str]:
    """The cells of one model's row."""
    model, calibration, evaluation = places(name, zoo)
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder, "samples.npz")
        outs = [Path(folder, f"{method}.onnx") for method in (*METHODS, "ours")]
        rows = [Row(f"Model Optimizer {method}", failed="shapes vary") for method in METHODS]
        if stacked(model, calibration, samples):
            rows = [run_modelopt(python, model, samples, *each) for each in zip(outs, METHODS, strict=False)]
        rows.append(quantize(OURS, model, calibration, outs[-1]))
        score(rows, model, outs, load_samples(evaluation, open_session(model).inputs, limit=SCORED))
        return [name, *(cell(row, out) for row, out in zip(rows, outs, strict=True))]


def cell(row: Row, out: Path) -> str:
    """What is said of one result."""
    if row.failed:
        return "shapes vary" if row.failed == "shapes vary" else "failed"
    found = lint(out, "tensorrt")
    share = found.figures.get(MACS_IN_INT8)
    built = "refused" if found.count(Severity.ERROR) else "" if share is None else f"{share:.0%}"
    return ", ".join(filter(None, (f"{row.exact_db:.1f} dB", built, f"{row.mb:.1f} MB", f"{row.seconds:.1f} s")))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--zoo", type=Path, default=ROOT / "models" / "zoo")
    parser.add_argument(
        "--modelopt", type=Path, required=True, metavar="PYTHON", help="of Model Optimizer's environment"
    )
    arguments = parser.parse_args()
    columns = ("model", *(f"Model Optimizer, {method}" for method in METHODS), "graphopt")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in arguments.names or model_names(arguments.zoo):
        print(f"| {' | '.join(measure(name, arguments.zoo, arguments.modelopt))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
