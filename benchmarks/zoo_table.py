"""Every real model through `fold,calibrate,qdq` for both targets, beside onnxruntime's quantizer: a Markdown table.

    python models/fetch.py && python models/feeds.py
    python benchmarks/zoo_table.py [NAME ...] [--zoo models/zoo] >> docs/results.md

Calibrated on one half of each model's real feeds, scored on the other: SQNR of the worst output. `here` is what
onnxruntime computes on this machine, with how many times faster than float, measured in turns; `exact` is the
arithmetic that Q and DQ stand for, with weights in 8 bits: what a CPU with VNNI computes.
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
    Variant("graphopt", "ort-cpu:reduce_range=off", ""),
    Variant("graphopt", "tensorrt", ""),
    Variant("onnxruntime", "s8", "MinMax"),
)
SMALL = {
    "fmnist_resnet": "fashion_mnist",
    "fmnist_mbv2": "fashion_mnist",
    "fmnist_srunet": "fashion_mnist_small",
}
SCORED = 16  # samples
COLUMNS = (
    "model",
    "int8 operators",
    "ort-cpu here",
    "onnxruntime u8 here",
    "ort-cpu exact",
    "onnxruntime u8 exact",
    "int8 operators",
    "tensorrt exact",
    "onnxruntime s8 exact",
    "left in float on ort-cpu",
)


def model_names(zoo: Path) -> list[str]:
    """All real models: those of this repository, and those that were fetched."""
    return [*SMALL, *sorted(path.stem for path in (zoo / "models").glob("*.onnx"))]


def places(name: str, zoo: Path) -> tuple[Path, str, str]:
    """Where a model is, and the halves of its data: to calibrate on, and to score on."""
    if name in SMALL:
        halves = [str(ROOT / "models" / f"{SMALL[name]}_{half}.npz") for half in ("calibration", "evaluation")]
        return ROOT / "models" / f"{name}.onnx", halves[0], halves[1]
    halves = [str(zoo / "feeds" / name / half) for half in ("calibration", "evaluation")]
    return zoo / "models" / f"{name}.onnx", halves[0], halves[1]


def measure(name: str, zoo: Path) -> list[Row]:
    """All variants of one model."""
    model, calibration, evaluation = places(name, zoo)
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"{number}.onnx" for number in range(len(VARIANTS))]
        rows = [quantize(variant, model, calibration, out) for variant, out in zip(VARIANTS, outs, strict=True)]
        score(rows, model, outs, load_samples(evaluation, open_session(model).inputs, limit=SCORED))
    return rows


def line(name: str, rows: list[Row]) -> str:
    """One row of the table."""
    ours, theirs, ours_8_bits, ours_trt, theirs_trt = rows
    reasons = Counter(ours.left_float).most_common(2)
    why = "; ".join(f"{count}: {reason}" for reason, count in reasons)
    cells = [name, str(ours.operators), *map(_here, (ours, theirs)), *map(_exact, (ours_8_bits, theirs))]
    return "| " + " | ".join([*cells, str(ours_trt.operators), *map(_exact, (ours_trt, theirs_trt)), why]) + " |"


def _here(row: Row) -> str:
    return "failed" if row.failed else f"{row.sqnr_db:.1f} dB, {row.faster:.2f} x"


def _exact(row: Row) -> str:
    return "failed" if row.failed else f"{row.exact_db:.1f} dB"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--zoo", type=Path, default=ROOT / "models" / "zoo")
    arguments = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    failed = False
    for name in arguments.names or model_names(arguments.zoo):
        rows = measure(name, arguments.zoo)
        failed |= any(row.failed for row in rows if row.variant.startswith("graphopt"))
        print(line(name, rows), flush=True)
        for row in rows:
            if row.failed:
                print(f"{name}: {row.variant} failed: {row.failed}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
