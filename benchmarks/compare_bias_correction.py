"""What `correct-bias` gives every real model, for two targets and two calibration methods: a Markdown table.

    python models/fetch.py && python models/feeds.py
    python benchmarks/compare_bias_correction.py [NAME ...] [--zoo models/zoo]

Calibrated and corrected on one half of each model's feeds, scored on up to 128 feeds of the other half: SQNR of the
worst output in dB, in the exact arithmetic that Q and DQ stand for, weights in 8 bits. `kept` says what the held-out
samples decided; `seconds` are those of `correct-bias` itself.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from compare_methods import PASSES, SCORED, TARGETS
from zoo_table import ROOT, model_names, places

import graphopt
from graphopt.api import calibrate
from graphopt.pass_manager import Result
from graphopt.targets import target_named
from graphopt.thresholds import Method

METHODS = (Method.MSE, Method.AUTO)


def measure(name: str, zoo: Path, target: str) -> list[str]:
    """The rows of a model for one target."""
    model, calibration, evaluation = places(name, zoo)
    found, _ = calibrate(model, calibration, passes=PASSES, target=target, histograms=True)

    def score(result: Result) -> float:
        compared = graphopt.check(model, result.model, data=evaluation, samples=SCORED, exact=True)
        return min(each.sqnr_db for each in compared.comparison.outputs if each.is_float)

    rows = []
    for method in METHODS:
        ranges = found.rechosen(method, percent=99.99, target=target_named(target))
        passes = f"{PASSES},{TARGETS[target]}"
        if not ranges.tensors:
            return [f"| {name} | {target} | nothing is quantized | | | | | |"]
        plain, corrected = (
            graphopt.optimize(model, passes + more, data=calibration, ranges=ranges, target=target, verify=False)
            for more in ("", ",correct-bias")
        )
        record = corrected.report.passes[-1]
        before, after = score(plain), score(corrected)
        cells = (name, target, method.value, f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}")
        rows.append(f"| {' | '.join(cells)} | {'yes' if record.rewrites else 'no'} | {record.seconds:.0f} |")
    return rows


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--zoo", type=Path, default=ROOT / "models" / "zoo")
    arguments = parser.parse_args()
    print("| model | target | calibrated by | qdq, dB | with correct-bias, dB | gained | kept | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.names or model_names(arguments.zoo):
        for target in TARGETS:
            for row in measure(name, arguments.zoo, target):
                print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
