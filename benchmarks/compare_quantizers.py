"""Quantize a model with graphopt and with onnxruntime.quantization, and score all results in one process.

    python benchmarks/compare_quantizers.py MODEL --data CALIBRATION [--evaluation HELD_OUT] [--json]
    python benchmarks/compare_quantizers.py --smoke          # a small committed model, a few samples

Each tool runs in a process of its own (seconds, peak memory). Then all results are compared with the float model on
the evaluation samples, and latency is measured in turns; `faster` is the float model's median over the result's.
`calibration / inference` is the tool's whole time over plain float inference of the same calibration samples.
SQNR is that of the worst output, as onnxruntime computes here and with the exact arithmetic that Q and DQ stand for:
what VNNI and TensorRT compute, and what a CPU without VNNI misses where int8 sums saturate.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from graphopt.compare import compare_sessions
from graphopt.data import load_samples
from graphopt.errors import GraphoptError
from graphopt.feeds import Samples
from graphopt.runtime import measure_latency, open_session

ROOT = Path(__file__).resolve().parent.parent
SMOKE_MODEL = ROOT / "models" / "fmnist_resnet.onnx"
SMOKE_DATA = ROOT / "models" / "fashion_mnist_evaluation.npz"


@dataclass(frozen=True)
class Variant:
    """One tool with one setting: for graphopt a target and options of qdq, for onnxruntime the type of activations."""

    tool: str
    setting: str
    method: str

    def __str__(self) -> str:
        return f"{self.tool} {self.setting} {self.method or 'default'}"


VARIANTS = (
    Variant("graphopt", "ort-cpu", ""),
    Variant("graphopt", "ort-cpu", "minmax"),
    Variant("graphopt", "ort-cpu", "entropy"),
    Variant("graphopt", "ort-cpu:reduce_range=off", ""),
    Variant("graphopt", "tensorrt", ""),
    Variant("graphopt", "tensorrt", "minmax"),
    Variant("graphopt", "tensorrt", "entropy"),
    *(Variant("onnxruntime", kind, method) for kind in ("u8", "s8") for method in ("MinMax", "Entropy", "Percentile")),
)


@dataclass
class Row:
    """What was measured of one variant."""

    variant: str
    failed: str = ""
    seconds: float = 0.0
    over_inference: float = 0.0
    peak_mb: float = 0.0
    sqnr_db: float = 0.0
    exact_db: float = 0.0
    agreement: float | None = None
    mb: float = 0.0
    faster: float = 0.0
    operators: int | None = None  # that run in int8, and why others do not: graphopt tells
    left_float: list[str] = field(default_factory=list)


def quantize(variant: Variant, model: Path, data: str, out: Path) -> Row:
    """Run one variant in its own process."""
    row = Row(str(variant))
    try:
        measured = run_once(variant.tool, model, data, out, variant.setting, variant.method)
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.strip()]
        row.failed = lines[-1] if lines else f"exit code {error.returncode}"
        return row
    row.seconds, row.peak_mb = measured["seconds"], measured["peak_mb"]
    row.operators, row.left_float = measured.get("operators"), measured.get("left_float", [])
    row.mb = out.stat().st_size / 1e6
    return row


def run_once(tool: str, model: Path, data: str, out: Path, setting: str, method: str) -> dict[str, Any]:
    """What quantize_once.py measured in one run."""
    command = [sys.executable, str(Path(__file__).with_name("quantize_once.py"))]
    done = subprocess.run(
        [*command, tool, str(model), data, str(out), setting, method], check=True, text=True, capture_output=True
    )
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def score(rows: list[Row], model: Path, outs: list[Path], samples: Samples) -> None:
    """Fill in SQNR, agreement and latency of every variant that gave a model."""
    reference = open_session(model)
    sessions = [reference]
    timed: list[Row] = []
    for row, out in zip(rows, outs, strict=True):
        if row.failed:
            continue
        try:
            session, exact = open_session(out), open_session(out, exact=True)
            outputs = compare_sessions(reference, session, samples).outputs
            exact_outputs = compare_sessions(reference, exact, samples).outputs
        except GraphoptError as error:
            row.failed = str(error)
            continue
        sessions.append(session)
        row.sqnr_db = min(output.sqnr_db for output in outputs)
        row.exact_db = min(output.sqnr_db for output in exact_outputs)
        row.agreement = next((output.agreement for output in outputs if output.agreement is not None), None)
        timed.append(row)
    latencies = measure_latency(sessions, next(iter(samples)), seconds=1.5 * len(sessions))
    for row, latency in zip(timed, latencies[1:], strict=True):
        row.faster = latencies[0] / latency


def show(rows: list[Row], title: str, console: Console) -> None:
    """Print one table."""
    table = Table(title=title, title_justify="left")
    table.add_column("variant", no_wrap=True)
    for column in ("seconds", "/ inference", "peak MB", "SQNR dB", "exact dB", "agreement", "MB", "faster"):
        table.add_column(column, justify="right")
    for row in rows:
        if row.failed:
            table.add_row(row.variant, "failed", row.failed[:40])
            continue
        agreement = "" if row.agreement is None else f"{row.agreement:.4f}"
        figures = (row.seconds, row.over_inference)
        table.add_row(
            row.variant,
            *(f"{figure:.2f}" for figure in figures),
            f"{row.peak_mb:.0f}",
            f"{row.sqnr_db:.2f}",
            f"{row.exact_db:.2f}",
            agreement,
            f"{row.mb:.2f}",
            f"{row.faster:.2f}",
        )
    console.print(table)


def main() -> int:
    """Run the comparison; exit code 1 when a graphopt variant failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--data", help="calibration samples, in any form that graphopt takes")
    parser.add_argument("--evaluation", help="samples to score on; default: those of --data")
    parser.add_argument("--samples", type=int, help="score on at most this many")
    parser.add_argument("--only", default="", help="only variants whose name holds this text")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a small model and few samples: does it run?")
    arguments = parser.parse_args()
    model, data = arguments.model, arguments.data
    if arguments.smoke:
        model, data, arguments.samples = SMOKE_MODEL, str(SMOKE_DATA), 16
    if model is None or data is None:
        parser.error("give MODEL and --data, or --smoke")
    variants = [variant for variant in VARIANTS if arguments.only in str(variant)]
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"{number}.onnx" for number in range(len(variants))]
        inference = run_once("inference", model, data, Path(folder) / "none", "", "")["seconds"]
        rows = [quantize(variant, model, data, out) for variant, out in zip(variants, outs, strict=True)]
        for row in rows:
            row.over_inference = row.seconds / inference
        samples = load_samples(arguments.evaluation or data, open_session(model).inputs)
        if arguments.samples:
            few = list(islice(samples, arguments.samples))
            samples = load_samples(few, open_session(model).inputs)
        score(rows, model, outs, samples)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        show(
            rows,
            f"{model.name}, plain inference of the calibration samples {inference:.2f} s",
            Console(width=None if sys.stdout.isatty() else 120),
        )
    return int(any(row.failed and row.variant.startswith("graphopt") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
