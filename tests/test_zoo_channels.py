"""Channel groups and `prune` on every real model, behind `fold`, as a user runs them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from zoo import NAMES, zoo_feed, zoo_model

from graphopt.channels import find_groups
from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.passes.fold import Fold
from graphopt.passes.freeze_inputs import FreezeInputs
from graphopt.passes.prune import Prune
from graphopt.runtime import open_session

pytestmark = pytest.mark.zoo

# The largest share of parameters that may be left at ratio=0.5, with the reason where it is more than 0.6.
MOST_LEFT = {
    "all_minilm_l6_v2": 0.77,  # half of them are embeddings of the width of the output
    "oww_hey_jarvis": 0.65,  # two thirds are the first matrix, of which one axis is the input
    "silero_vad_v6": 1.0,  # all weights are inside If
}


@pytest.mark.parametrize("name", NAMES)
def test_every_model_is_cut_by_half_and_runs(name):
    model = load_model(zoo_model(name))
    feed = zoo_feed(name, open_session(model))
    context = Context(frame=model.frame)
    if name == "espcn_nn_resize_x2":
        FreezeInputs().apply(model.graph, context)
    Fold().apply(model.graph, context)
    groups = find_groups(model.graph)
    nothing = np.zeros(groups.count, bool)
    before = groups.cost("params", nothing)
    result = Prune(ratio=0.5).apply(model.graph, context)
    after = find_groups(model.graph)
    left = after.cost("params", np.zeros(after.count, bool))
    assert left <= MOST_LEFT.get(name, 0.6) * before
    assert {skip.where for skip in result.skipped} >= {group.name for group in groups.groups if group.frozen}
    onnx.checker.check_model(model.to_proto(), full_check=True)
    outputs = open_session(model, threads=1).run(feed)
    assert all(np.isfinite(value).all() for value in outputs.values() if value.dtype.kind == "f")
