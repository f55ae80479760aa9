"""Every real model through `fold,calibrate,qdq` for both targets, beside onnxruntime's quantizer: a Markdown table.

    python models/fetch.py && python models/feeds.py
    python benchmarks/zoo_table.py [NAME ...] [--zoo models/zoo] >> docs/results.md

Calibrated on one half of each model's real feeds, scored on the other with the arithmetic that Q and DQ stand for (SQNR
of the worst output); `faster` is float latency over int8 latency in onnxruntime on this machine, measured in turns.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from compare_quantizers import ROOT, Row, Variant, quantize, score

from graphopt.data import load_samples
from graphopt.runtime import open_session

VARIANTS = (
    Variant("graphopt", "ort-cpu", ""),
    Variant("onnxruntime", "u8", "MinMax"),
    Variant("graphopt", "tensorrt", ""),
    Variant("onnxruntime", "s8", "MinMax"),
)
SMALL = {
    "fmnist_resnet": "fashion_mnist",
    "fmnist_mbv2": "fashion_mnist",
    "fmnist_srunet": "fashion_mnist_small",
}
SCORED = 40  # samples
COLUMNS = (
    "model",
    "int8 operators",
    "ort-cpu",
    "onnxruntime u8",
    "int8 operators",
    "tensorrt",
    "onnxruntime s8",
    "left in float on ort-cpu",
)


def measure(name: str, zoo: Path) -> list[Row]:
    """All variants of one model."""
    if name in SMALL:
        model = ROOT / "models" / f"{name}.onnx"
        halves = [str(ROOT / "models" / f"{SMALL[name]}_{half}.npz") for half in ("calibration", "evaluation")]
    else:
        model = zoo / "models" / f"{name}.onnx"
        halves = [str(zoo / "feeds" / name / half) for half in ("calibration", "evaluation")]
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"{number}.onnx" for number in range(len(VARIANTS))]
        rows = [quantize(variant, model, halves[0], out) for variant, out in zip(VARIANTS, outs, strict=True)]
        score(rows, model, outs, load_samples(halves[1], open_session(model).inputs, limit=SCORED), exact=True)
    return rows


def line(name: str, rows: list[Row]) -> str:
    """One row of the table."""
    ours, theirs, ours_trt, theirs_trt = rows
    reasons = Counter(ours.left_float).most_common(2)
    why = "; ".join(f"{count}: {reason}" for reason, count in reasons)
    cells = [name, str(ours.operators), *map(_figures, (ours, theirs)), str(ours_trt.operators)]
    return "| " + " | ".join([*cells, *map(_quality, (ours_trt, theirs_trt)), why]) + " |"


def _figures(row: Row) -> str:
    return row.failed[:30] if row.failed else f"{row.sqnr_db:.1f} dB, x{row.faster:.2f}"


def _quality(row: Row) -> str:
    return row.failed[:30] if row.failed else f"{row.sqnr_db:.1f} dB"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--zoo", type=Path, default=ROOT / "models" / "zoo")
    arguments = parser.parse_args()
    names = arguments.names or [*SMALL, *sorted(path.stem for path in (arguments.zoo / "models").glob("*.onnx"))]
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    failed = False
    for name in names:
        rows = measure(name, arguments.zoo)
        failed |= bool(rows[0].failed or rows[2].failed)
        print(line(name, rows), flush=True)
        print(name, [row.failed for row in rows if row.failed], file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
