"""Seconds of `fold` without verification on graphs of 5,000, 10,000 and 20,000 nodes, and the exponent of the growth.

    python benchmarks/fold_scaling.py [--rounds 2]

The graph is `mixed` of speed_graphs.py; each run is a process of its own and the sizes take turns. The exponent is
the slope of log(seconds) over log(nodes), by least squares: 1 is linear. Exit code 1 where it passes LARGEST_EXPONENT
or the largest graph takes more than MOST_SECONDS.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from compare_simplifiers import run_once
from speed_graphs import mixed

SIZES = (5_000, 10_000, 20_000)
LARGEST_EXPONENT = 1.2
MOST_SECONDS = 6.0


def main() -> int:
    """Measure and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="the best counts; default: 2")
    arguments = parser.parse_args()
    seconds = dict.fromkeys(SIZES, np.inf)
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            onnx.save(mixed(size), Path(folder) / f"{size}.onnx")
        for number in range(arguments.rounds):
            for size in SIZES:
                out = Path(folder) / f"{size}.{number}.folded.onnx"
                measured = run_once(sys.executable, "graphopt", str(Path(folder) / f"{size}.onnx"), str(out))
                if "failed" in measured:
                    print(f"{size} nodes: failed: {measured['failed']}")
                    return 1
                seconds[size] = min(seconds[size], measured["seconds"])
                left = len(onnx.load(out).graph.node)
                print(
                    f"{size} nodes: {measured['seconds']:.2f} s, {measured['peak_mb']:.0f} MB, {left} left", flush=True
                )
    exponent = float(np.polyfit(np.log(SIZES), np.log(list(seconds.values())), 1)[0])
    slowest = seconds[SIZES[-1]]
    print(f"exponent {exponent:.2f}, at most {LARGEST_EXPONENT}")
    print(f"{SIZES[-1]} nodes {slowest:.2f} s, at most {MOST_SECONDS:g} s")
    return int(exponent > LARGEST_EXPONENT or slowest > MOST_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
