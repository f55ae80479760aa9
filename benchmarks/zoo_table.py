"""Every real model through `fold,calibrate,qdq` for both targets, beside onnxruntime's quantizer: a Markdown table.

    python models/fetch.py && python models/feeds.py
    python benchmarks/zoo_table.py [NAME ...] [--zoo models/zoo] >> docs/results.md

Calibrated on one half of each model's real feeds, scored on the other: SQNR of the worst output. For `ort-cpu` it is
what onnxruntime computes on this machine, with how many times faster than float, measured in turns, beside the fastest
and the most exact of onnxruntime's own files (uint8 activations, min-max and percentile); for `tensorrt` it is the
arithmetic that Q and DQ stand for, beside onnxruntime's symmetric int8, each with the share of MACs that TensorRT's
compiler puts in int8 where it is installed. `MACs in int8` is what lint reads from onnxruntime's optimized graph.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from compare_quantizers import ROOT, Row, Variant, quantize, score

from graphopt.api import lint
from graphopt.data import load_samples
from graphopt.lint import LintReport, Severity
from graphopt.runtime import open_session
from graphopt.targets.int8_share import MACS_IN_INT8

OURS, OURS_TENSORRT = Variant("graphopt", "ort-cpu", ""), Variant("graphopt", "tensorrt", "")
PEERS = tuple(Variant("onnxruntime", "u8", method) for method in ("MinMax", "Percentile"))
PEER_SYMMETRIC = Variant("onnxruntime", "s8", "MinMax")
VARIANTS = (OURS, OURS_TENSORRT, *PEERS, PEER_SYMMETRIC)
SMALL = {
    "fmnist_resnet": "fashion_mnist",
    "fmnist_mbv2": "fashion_mnist",
    "fmnist_srunet": "fashion_mnist_small",
}
SCORED = 128  # samples
COLUMNS = (
    "model",
    "MACs in int8",
    "ort-cpu",
    "onnxruntime u8, fastest",
    "onnxruntime u8, most exact",
    "tensorrt",
    "lint errors",
    "onnxruntime s8",
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


def measure(name: str, zoo: Path, kept: Path | None) -> list[str]:
    """The cells of one model's row."""
    model, calibration, evaluation = places(name, zoo)
    with tempfile.TemporaryDirectory() as folder:
        outs = [_place_of(variant, name, Path(folder), kept) for variant in VARIANTS]
        rows = [
            Row(str(variant)) if out.exists() else quantize(variant, model, calibration, out)
            for variant, out in zip(VARIANTS, outs, strict=True)
        ]
        score(rows, model, outs, load_samples(evaluation, open_session(model).inputs, limit=SCORED))
        ours, tensorrt, *peers, symmetric = rows
        for row in rows:
            if row.failed:
                print(f"{name}: {row.variant} failed: {row.failed}", file=sys.stderr)
        share = "" if ours.failed else _share(lint(outs[0], "ort-cpu"))
        built, built_symmetric = (lint(out, "tensorrt") if out.exists() else None for out in (outs[1], outs[-1]))
    worked = [row for row in peers if not row.failed]
    fastest = max(worked, key=lambda row: row.faster, default=peers[0])
    exact = max(worked, key=lambda row: row.sqnr_db, default=peers[0])
    why = "; ".join(f"{count}: {reason}" for reason, count in Counter(ours.left_float).most_common(2))
    errors = "" if built is None else str(built.count(Severity.ERROR))
    exactly = (_exact(tensorrt, built), errors, _exact(symmetric, built_symmetric))
    return [name, share, *map(_here, (ours, fastest, exact)), *exactly, why]


def _place_of(variant: Variant, name: str, folder: Path, kept: Path | None) -> Path:
    """Where a variant's model goes: peers' may be kept from run to run."""
    within = folder if kept is None or variant in (OURS, OURS_TENSORRT) else kept
    return within / f"{name}.{variant.tool}.{variant.setting}.{variant.method}.onnx"


def _share(found: LintReport) -> str:
    share = found.figures.get(MACS_IN_INT8)
    return "" if share is None else f"{share:.0%}"


def _here(row: Row) -> str:
    return "failed" if row.failed else f"{row.sqnr_db:.1f} dB, {row.faster:.2f} x"


def _exact(row: Row, built: LintReport | None) -> str:
    if row.failed or built is None:
        return "failed"
    share = "refused" if "TRT031" in {finding.rule for finding in built.findings} else _share(built)
    return ", ".join(filter(None, (f"{row.exact_db:.1f} dB", share)))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--zoo", type=Path, default=ROOT / "models" / "zoo")
    parser.add_argument(
        "--keep-peers", type=Path, metavar="FOLDER", help="keep the other tool's models there, and reuse them"
    )
    arguments = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    failed = False
    if arguments.keep_peers is not None:
        arguments.keep_peers.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or model_names(arguments.zoo):
        cells = measure(name, arguments.zoo, arguments.keep_peers)
        failed |= "failed" in (cells[2], cells[5])
        print(f"| {' | '.join(cells)} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
