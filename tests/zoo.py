"""The real models that `models/fetch.py` brings, for tests marked `zoo`."""

import os
from pathlib import Path

import numpy as np
import pytest

from graphopt.runtime import Session

NAMES = (
    "blazeface_front",
    "captcha_crnn",
    "eeg_seizure_lstm",
    "espcn_nn_resize_x2",
    "magika_standard_v3_3",
    "mtcnn_onet",
    "oww_embedding_model",
    "oww_hey_jarvis",
    "oww_melspectrogram",
    "ppocr_cls_mobile_v2",
    "ppocrv4_det",
    "ppocrv4_rec",
    "silero_vad_fw_seq",
    "silero_vad_v6",
    "waifu2x_upconv7_x2",
    "yolov8n_doclaynet",
)
_SHAPES = {  # where the model does not state a size that it can run with
    "oww_melspectrogram": {"input": (1, 1280)},
    "ppocr_cls_mobile_v2": {"x": (2, 3, 48, 192)},
    "ppocrv4_det": {"x": (1, 3, 96, 96)},
    "ppocrv4_rec": {"x": (1, 3, 48, 160)},
    "silero_vad_v6": {"input": (1, 576), "state": (2, 1, 128)},
    "silero_vad_fw_seq": {"input": (4, 576)},
    "waifu2x_upconv7_x2": {"input": (1, 3, 32, 32)},
}


def zoo_model(name: str) -> Path:
    """The file of a model; the test is skipped where it is not there."""
    folder = os.environ.get("GRAPHOPT_ZOO")
    if not folder:
        pytest.skip("GRAPHOPT_ZOO is not set to the folder that models/fetch.py filled")
    path = Path(folder, "models", f"{name}.onnx")
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    return path


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
            feed[spec.name] = random.integers(0, 200, shape).astype(spec.dtype)
    return feed
