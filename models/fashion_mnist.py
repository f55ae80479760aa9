"""Fashion-MNIST as arrays, and the small committed samples of it.

    python models/fashion_mnist.py            writes the four fashion_mnist_*.npz beside this file

The data set is 60,000 training and 10,000 test photographs of clothing, 28 x 28 grey values, ten classes
(Zalando, MIT licence, https://github.com/zalandoresearch/fashion-mnist). It comes as four gzipped files in
the idx format: a header (16 bytes for images, 8 for labels), then one byte a pixel or a label.

Calibration samples come from the training images and evaluation samples from the test images, each chosen at
random with a fixed seed. The files of the super-resolution net hold the same images as their 2 x 2 means.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path
from typing import Literal

import fetch
import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
CALIBRATION_COUNT = 256
EVALUATION_COUNT = 512
SEED = 0
SIDE = 28  # pixels
IMAGE_HEADER = 16  # bytes
LABEL_HEADER = 8  # bytes

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
Split = Literal["train", "t10k"]


def load_split(split: Split, zoo: Path = fetch.ZOO) -> tuple[Floats, Labels]:
    """Return images, N x 1 x 28 x 28 in 0..1, and labels, N in 0..9; fetch them into `zoo` if absent."""
    folder = fetch.ensure_data("fashion-mnist", zoo)
    pixels = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    images = np.frombuffer(pixels, np.uint8, offset=IMAGE_HEADER).reshape(-1, 1, SIDE, SIDE)
    return (
        images.astype(np.float32) / np.float32(255),
        np.frombuffer(labels, np.uint8, offset=LABEL_HEADER).astype(np.int64),
    )


def halve(images: Floats) -> Floats:
    """N x 1 x 28 x 28 -> N x 1 x 14 x 14, the mean of every 2 x 2 pixels, for the super-resolution net."""
    means: Floats = images.reshape(-1, 1, SIDE // 2, 2, SIDE // 2, 2).mean((3, 5))
    return means


def choose(count: int, total: int) -> NDArray[np.int64]:
    """Choose `count` different places out of `total`, in ascending order; the same ones every time."""
    return np.sort(np.random.default_rng(SEED).choice(total, count, replace=False))


def write_samples(folder: Path, zoo: Path) -> list[Path]:
    """Write the four sample files into `folder` and return their paths."""
    images, _ = load_split("train", zoo)
    calibration = images[choose(CALIBRATION_COUNT, len(images))]
    images, labels = load_split("t10k", zoo)
    chosen = choose(EVALUATION_COUNT, len(images))
    evaluation = images[chosen]
    files: dict[str, dict[str, Floats | Labels]] = {
        "fashion_mnist_calibration.npz": {"input": calibration},
        "fashion_mnist_evaluation.npz": {"input": evaluation, "label": labels[chosen]},
        "fashion_mnist_small_calibration.npz": {"input": halve(calibration)},
        "fashion_mnist_small_evaluation.npz": {"input": halve(evaluation), "target": evaluation},
    }
    for name, arrays in files.items():
        np.savez_compressed(folder / name, allow_pickle=False, **arrays)
    return [folder / name for name in files]


def main() -> None:
    """Write the committed samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="default: beside this file")
    parser.add_argument("--zoo", type=Path, default=fetch.ZOO, help="default: models/zoo")
    arguments = parser.parse_args()
    try:
        paths = write_samples(arguments.out, arguments.zoo)
    except fetch.FetchError as error:
        parser.error(f"no data: {error}")
    for path in paths:
        print(f"{path} {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
