"""Real models: made-up inputs run and load from files, and each can be inspected and compared."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from zoo import NAMES, zoo_model

from graphopt.compare import compare_sessions
from graphopt.data import load_samples
from graphopt.errors import GraphoptError
from graphopt.feeds import Feed
from graphopt.inspection import inspect_model
from graphopt.model_io import load_model
from graphopt.runtime import Session, open_session
from graphopt.synthetic import synthetic_samples

pytestmark = pytest.mark.zoo
MACS_UNKNOWN = {  # operators whose sizes ONNX shape inference does not find
    "all_minilm_l6_v2",  # attention: products of values that were reshaped to computed sizes
    "efficientnet_lite0_bn",  # every size follows from Pads with computed amounts; folding makes them constant
    "silero_vad_v6",  # its branches disagree in rank
}


def runs(session: Session, feed: Feed) -> bool:
    try:
        session.run(feed)
    except GraphoptError:
        return False
    return True


@pytest.mark.parametrize("name", NAMES)
def test_made_up_inputs_run_and_survive_a_folder_of_npz(name: str, tmp_path: Path) -> None:
    session = open_session(zoo_model(name))
    samples = synthetic_samples(session.inputs, count=2, seed=0, runnable=lambda feed: runs(session, feed))
    for index, feed in enumerate(samples):
        np.savez(tmp_path / f"{index}.npz", **feed)
    loaded = load_samples(tmp_path, session.inputs)
    comparison = compare_sessions(session, session, loaded)
    assert comparison.samples == 2
    assert [each.name for each in comparison.outputs] == list(session.outputs)
    assert all(each.sqnr_db == math.inf for each in comparison.outputs)
    assert comparison.ok(min_sqnr=100)


@pytest.mark.parametrize("name", NAMES)
def test_inspects_every_model(name: str) -> None:
    path = zoo_model(name)
    found = inspect_model(load_model(path))
    json.dumps(found.to_json())
    assert found.file_nbytes == path.stat().st_size
    assert 0.9 * found.file_nbytes < found.weight_nbytes + 160 * found.nodes
    assert found.weight_nbytes < found.file_nbytes
    assert 4 * found.parameters <= found.weight_nbytes
    assert found.macs > 0 or name in ("silero_vad_v6", "efficientnet_lite0_bn")
    assert (found.macs_unknown > 0) == (name in MACS_UNKNOWN)


def test_counts_the_macs_of_four_convolutions_as_by_hand() -> None:
    found = inspect_model(load_model(zoo_model("espcn_nn_resize_x2")))
    assert found.macs == 128 * 128 * (64 * 75 + 64 * 576 + 32 * 576) + 256 * 256 * 3 * 288
