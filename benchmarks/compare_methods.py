"""SQNR of every calibration method on every real model, for two targets: a Markdown table.

    python models/fetch.py && python models/feeds.py
    python benchmarks/compare_methods.py [NAME ...] [--zoo models/zoo]

Each model is calibrated once, on one half of its feeds, with histograms; the ranges of the other methods are chosen
from these. Scored on up to 32 feeds of the other half: SQNR of the worst output in dB, in the exact arithmetic that Q
and DQ stand for, weights in 8 bits. `lost` is what the default lacks to the best of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from zoo_table import ROOT, model_names, places

import graphopt
from graphopt.api import calibrate
from graphopt.passes.calibrate import DEFAULT_METHOD
from graphopt.targets import target_named
from graphopt.thresholds import Method

PASSES = "freeze-inputs,fold"
METHODS = (Method.MSE, Method.AUTO, Method.MINMAX, Method.PERCENTILE, Method.ENTROPY)
TARGETS = {"ort-cpu": "qdq:reduce_range=off", "tensorrt": "qdq"}
SCORED = 32


def measure(name: str, zoo: Path, target: str) -> dict[Method, float]:
    """SQNR in dB by method."""
    model, calibration, evaluation = places(name, zoo)
    kept, _ = calibrate(model, calibration, passes=PASSES, target=target, histograms=True)
    found: dict[Method, float] = {}
    for method in METHODS:
        ranges = kept.rechosen(method, percent=99.99, target=target_named(target))
        if not ranges.tensors:
            return {}
        passes = f"{PASSES},{TARGETS[target]}"
        quantized = graphopt.optimize(model, passes, ranges=ranges, target=target, verify=False)
        compared = graphopt.check(model, quantized.model, data=evaluation, samples=SCORED, exact=True)
        found[method] = min(each.sqnr_db for each in compared.comparison.outputs if each.sqnr_db is not None)
    return found


def line(name: str, target: str, found: dict[Method, float]) -> str:
    """One row of the table."""
    if not found:
        return f"| {name} | {target} | nothing is quantized |" + " |" * len(METHODS)
    lost = max(found.values()) - found[DEFAULT_METHOD]
    return f"| {name} | {target} | " + " | ".join(f"{found[method]:.1f}" for method in METHODS) + f" | {lost:.1f} |"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--zoo", type=Path, default=ROOT / "models" / "zoo")
    arguments = parser.parse_args()
    print(f"| model | target | {' | '.join(method.value for method in METHODS)} | lost |")
    print("|---|---|" + "---|" * (len(METHODS) + 1))
    losses: list[float] = []
    for name in arguments.names or model_names(arguments.zoo):
        for target in TARGETS:
            found = measure(name, arguments.zoo, target)
            losses += [max(found.values()) - found[DEFAULT_METHOD]] if found else []
            print(line(name, target, found), flush=True)
    within = sum(lost <= 0.3 for lost in losses)
    print(f"\n{DEFAULT_METHOD.value} is within 0.3 dB of the best single method in {within} of {len(losses)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
