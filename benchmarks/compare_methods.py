"""SQNR of every calibration method on every real model, for two targets: a Markdown table.

    python models/fetch.py && python models/feeds.py
    python benchmarks/compare_methods.py [NAME ...] [--zoo models/zoo]

Each model is calibrated once by `search`, the default, on one half of its feeds, with histograms; the ranges of the
single methods are chosen from these, as `calibrate:method=` chooses them. Scored on up to 128 feeds of the other half:
SQNR of the worst output in dB, for `ort-cpu` as onnxruntime computes here, else in the exact arithmetic that Q and DQ
stand for. `exchanged` is how many tensors `search` gave another range than the method that it took, `lost` what it
lacks to the best single method, `lost at home` the same on the half that it was calibrated on: what it lacks there is
its own fault, what it lacks on the other half besides is how the halves differ.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from zoo_table import ROOT, model_names, places

import graphopt
from graphopt.api import calibrate
from graphopt.checking import Check
from graphopt.method_search import CANDIDATES
from graphopt.ranges import Ranges
from graphopt.targets import target_named
from graphopt.thresholds import Method

PASSES = "freeze-inputs,fold"
TARGETS = ("ort-cpu", "tensorrt")
SCORED = 128


@dataclass(frozen=True)
class Measured:
    """SQNR in dB by method and of what search found, and what that is; nothing where nothing is quantized."""

    by_method: dict[Method, float]
    searched: float = 0.0
    taken: Method | None = None
    exchanged: int = 0
    lost_at_home: float = 0.0

    @property
    def lost(self) -> float:
        """What search lacks to the best single method, in dB."""
        return max(self.by_method.values()) - self.searched if self.taken else 0.0


def measure(name: str, zoo: Path, target: str) -> Measured:
    """Calibrate, quantize by each method and score."""
    model, calibration, evaluation = places(name, zoo)
    kept, _ = calibrate(model, calibration, passes=PASSES, method=Method.SEARCH, target=target, histograms=True)
    if not kept.tensors:
        return Measured({})
    table = target_named(target)
    alone = replace(kept, covering_weights=False)
    by_method = {method: alone.rechosen(method, percent=99.99, target=table) for method in CANDIDATES}

    def scores(ranges: Ranges) -> tuple[float, float]:
        """On the other half and at home."""
        passes = f"{PASSES},qdq"
        quantized = graphopt.optimize(model, passes, data=calibration, ranges=ranges, target=target, verify=False)
        other, home = (
            graphopt.check(model, quantized.model, data=data, samples=SCORED, exact=not table.runs_here)
            for data in (evaluation, calibration)
        )
        return worst(other), worst(home)

    scored = {method: scores(ranges) for method, ranges in by_method.items()}
    found = {method: other for method, (other, _) in scored.items()}
    if math.isinf(min(found.values())):
        return Measured({})  # no operator pays
    assert kept.method is not None
    taken = by_method[kept.method].tensors
    exchanged = sum(
        (each.minimum, each.maximum) != (taken[name].minimum, taken[name].maximum)
        for name, each in kept.tensors.items()
    )
    searched, at_home = scores(kept)
    best_at_home = max(home for _, home in scored.values())
    return Measured(found, searched, kept.method, exchanged, best_at_home - at_home)


def worst(report: Check) -> float:
    """SQNR of the worst output in dB."""
    return min(each.sqnr_db for each in report.comparison.outputs if each.sqnr_db is not None)


def line(name: str, target: str, found: Measured) -> str:
    """One row of the table."""
    if found.taken is None:
        return f"| {name} | {target} | nothing is quantized |" + " |" * (len(CANDIDATES) + 4)
    values = " | ".join(f"{value:.1f}" for value in found.by_method.values())
    searched = (
        f"{found.taken.value} | {found.exchanged} | {found.searched:.1f} | {found.lost:.1f} | {found.lost_at_home:.1f}"
    )
    return f"| {name} | {target} | {values} | {searched} |"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--zoo", type=Path, default=ROOT / "models" / "zoo")
    arguments = parser.parse_args()
    methods = " | ".join(method.value for method in CANDIDATES)
    print(f"| model | target | {methods} | search took | exchanged | search | lost | lost at home |")
    print("|---|---|" + "---|" * (len(CANDIDATES) + 5))
    rows: list[Measured] = []
    for name in arguments.names or model_names(arguments.zoo):
        for target in TARGETS:
            found = measure(name, arguments.zoo, target)
            rows += [found] if found.taken else []
            print(line(name, target, found), flush=True)
    near = sum(row.lost <= 0.3 for row in rows)
    at_home = sum(row.lost_at_home <= 0.3 for row in rows)
    print(f"\nwithin 0.3 dB of the best method, of {len(rows)} rows: search in {near}, at home in {at_home}")
    for method in CANDIDATES:
        near = sum(row.by_method[method] >= max(row.by_method.values()) - 0.3 for row in rows)
        average = sum(row.by_method[method] for row in rows) / max(1, len(rows))
        print(f"{method.value} in {near}, on average {average:.1f} dB")
    print(f"search on average {sum(row.searched for row in rows) / max(1, len(rows)):.1f} dB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
