"""Importance by how much the outputs move: exact where the net is linear, and what prune does with it."""

import numpy as np
from texts import model_of

from graphopt.channel_sensitivity import sensitivities
from graphopt.channels import find_groups
from graphopt.data import load_samples
from graphopt.model_io import load_model
from graphopt.runtime import open_session
from graphopt.shapes import infer_shapes

LINEAR = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,6,6] x) => (float[N,5,6,6] y) <float[8,3,3,3] v, float[8] b, float[5,8,3,3] w>
    { h = Conv<pads=[1,1,1,1]>(x, v, b) y = Conv<pads=[1,1,1,1]>(h, w) }
"""


def feeds(count=3):
    rng = np.random.default_rng(0)
    return [{"x": rng.normal(size=(1, 3, 6, 6)).astype(np.float32)} for _ in range(count)]


def scores_of(proto):
    model = load_model(proto)
    infer_shapes(model.graph)
    groups = find_groups(model.graph)
    before = model.to_proto().SerializeToString()
    scores = sensitivities(model, groups, load_samples(feeds(), open_session(proto).inputs))
    assert model.to_proto().SerializeToString() == before
    (group,) = [each for each in groups.groups if each.frozen is None]
    return scores, scores[group.units]


def test_in_a_linear_net_the_score_is_what_removing_the_unit_changes():
    proto = model_of(LINEAR)
    _, scores = scores_of(proto)
    weight = next(each for each in proto.graph.initializer if each.name == "w")
    values = np.frombuffer(weight.raw_data, np.float32).reshape(5, 8, 3, 3)
    expected = np.zeros(8)
    for unit in range(8):
        cut = values.copy()
        cut[:, unit] = 0
        other = type(proto)()
        other.CopyFrom(proto)
        next(each for each in other.graph.initializer if each.name == "w").raw_data = cut.tobytes()
        for feed in feeds():
            was, now = (open_session(each).run(feed)["y"].astype(np.float64) for each in (proto, other))
            expected[unit] += ((now - was) ** 2).sum() / (was**2).sum() / 3
    np.testing.assert_allclose(scores, expected, rtol=1e-3)


def test_units_that_cannot_go_have_no_score():
    scores, of_group = scores_of(model_of(LINEAR))
    assert (of_group > 0).all()
    assert np.count_nonzero(scores) == len(of_group)
