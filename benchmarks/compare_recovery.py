"""What each step of refit gives back after channels are removed: one table for the nets of `models/`.

    python benchmarks/compare_recovery.py [--macs 0.7 0.5] [MODEL ...]

Each net is folded and pruned to a share of its MACs; accuracy is that on the 10,000 test images of Fashion-MNIST, which
are fetched if absent. The 256 calibration images come from the training images, and their labels are not used.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import graphopt
from graphopt.feeds import Feed
from graphopt.model_io import Model
from graphopt.runtime import Session, open_session

MODELS = Path(__file__).resolve().parent.parent / "models"
sys.path.insert(0, str(MODELS))

import fashion_mnist  # noqa: E402 - it is a script beside the models, not a package
import fetch  # noqa: E402

BATCH = 250
STEPS = {"cut alone": "", "absorb": ",refit:steps=absorb", "refit": ",refit:steps=refit", "all steps": ",refit"}


def classes(session: Session, samples: Iterable[Feed]) -> fashion_mnist.Labels:
    """The class with the largest score of each sample, whatever the shape of the scores before it."""
    found = []
    for feed in samples:
        (scores, *_) = session.run(feed).values()
        found.append(np.asarray(scores).reshape(-1, scores.shape[-1]).argmax(axis=1))
    return np.concatenate(found)


def batches(images: fashion_mnist.Floats, name: str) -> list[Feed]:
    """Images as feeds of the input of that name."""
    return [{name: images[start : start + BATCH]} for start in range(0, len(images), BATCH)]


def accuracy(model: Model, images: fashion_mnist.Floats, labels: fashion_mnist.Labels) -> float:
    """Return the share of images whose largest output is the right class."""
    session = open_session(model)
    return float((classes(session, batches(images, session.inputs[0].name)) == labels).mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["fmnist_resnet", "fmnist_mbv2"])
    parser.add_argument("--macs", nargs="+", type=float, default=[0.7, 0.5])
    parser.add_argument("--prune", default="", help="further options of prune, such as importance=activation")
    parser.add_argument("--zoo", type=Path, default=fetch.ZOO, help="the folder with fetched data")
    options = parser.parse_args()
    images, labels = fashion_mnist.load_split("t10k", options.zoo)
    data = MODELS / "fashion_mnist_calibration.npz"
    print("| model | MACs | " + " | ".join(f"{step}, top-1 %" for step in STEPS) + " | seconds |")
    print("|---|---|" + "---|" * (len(STEPS) + 1))
    for name in options.models:
        path = MODELS / f"{name}.onnx"
        plain = graphopt.optimize(path, "fold").optimized
        print(f"| {name} | 100 % | {100 * accuracy(plain, images, labels):.2f} |" + " |" * len(STEPS), flush=True)
        for share in options.macs:
            prune = f"fold,prune:macs={share}" + (f":{options.prune}" if options.prune else "")
            scores, seconds = [], 0.0
            for more in STEPS.values():
                start = time.perf_counter()
                model = graphopt.optimize(path, prune + more, data=data).optimized
                seconds = time.perf_counter() - start
                scores.append(f"{100 * accuracy(model, images, labels):.2f}")
            left = graphopt.inspect(model).macs / graphopt.inspect(plain).macs
            print(f"| {name} | {left:.1%} | {' | '.join(scores)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
