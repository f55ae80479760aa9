"""The real models that `models/fetch.py` brings, for tests marked `zoo`."""

import os
import tomllib
from pathlib import Path

import numpy as np
import pytest

from graphopt.runtime import Session

_LIST = Path(__file__).resolve().parent.parent / "models" / "zoo.toml"
NAMES = tuple(sorted(tomllib.loads(_LIST.read_text(encoding="utf-8"))["models"]))
_SHAPES = {  # where the model does not state a size that it can run with
    "all_minilm_l6_v2": dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (2, 9)),
    "oww_melspectrogram": {"input": (1, 1280)},
    "ppocr_cls_mobile_v2": {"x": (2, 3, 48, 192)},
    "ppocrv4_det": {"x": (1, 3, 96, 96)},
    "ppocrv4_rec": {"x": (1, 3, 48, 160)},
    "silero_vad_v6": {"input": (1, 576), "state": (2, 1, 128)},
    "silero_vad_fw_seq": {"input": (4, 576)},
    "waifu2x_upconv7_x2": {"input": (1, 3, 32, 32)},
}
_INTEGERS = {"attention_mask": 2, "token_type_ids": 2}  # how many values such an input may have, if not 200


def zoo_model(name: str) -> Path:
    """The file of a model; the test is skipped where it is not there."""
    return _present(Path("models", f"{name}.onnx"), "fetch.py")


def zoo_feeds(name: str, half: str) -> Path:
    """The folder with one half of a model's feeds, "calibration" or "evaluation"; skips where it is not there."""
    return _present(Path("feeds", name, half), "feeds.py")


def _present(path: Path, script: str) -> Path:
    folder = os.environ.get("GRAPHOPT_ZOO")
    if not folder:
        pytest.skip("GRAPHOPT_ZOO is not set to the folder that models/fetch.py filled")
    found = Path(folder, path)
    if not found.exists():
        pytest.skip(f"there is no {found}: run models/{script} {path.parts[1].removesuffix('.onnx')}")
    return found


def zoo_feed(name: str, session: Session, seed: int = 0) -> dict[str, np.ndarray]:
    """A seeded feed that the model runs with; numbers, not pictures or sounds."""
    random = np.random.default_rng(seed)
    feed = {}
    for spec in session.inputs:
        known = _SHAPES.get(name, {}).get(spec.name)
        shape = known or tuple(size if isinstance(size, int) and size > 0 else 1 for size in spec.shape)
        if spec.name == "sr":
            feed[spec.name] = np.array(16000, spec.dtype)
        elif spec.dtype.kind == "f":
            feed[spec.name] = random.random(shape).astype(spec.dtype)
        else:
            feed[spec.name] = random.integers(0, _INTEGERS.get(spec.name, 200), shape).astype(spec.dtype)
    return feed
