import json

import numpy as np
import onnx.parser
import pytest

from graphopt.channel_statistics import ChannelStatistics
from graphopt.feeds import Samples
from graphopt.histogram import Extremes, NonFiniteError
from graphopt.model_io import load_model
from graphopt.observe import observe


def seen(*arrays):
    statistics = ChannelStatistics()
    for array in arrays:
        statistics.add(np.asarray(array))
    return statistics


def draw(*shape, dtype=np.float32):
    return (np.random.default_rng(sum(shape)).standard_normal(shape) * 3 + 1).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shapes", [[(2, 5, 4, 3), (1, 5, 2, 7)], [(4, 5), (3, 5)], [(2, 5, 6), (2, 5, 0), (1, 5, 1)]])
def test_statistics_of_each_channel_are_those_of_its_values(shapes, dtype):
    arrays = [draw(*shape, dtype=dtype) for shape in shapes]
    found = seen(*arrays)
    columns = np.concatenate([np.moveaxis(array, 1, 0).reshape(5, -1) for array in arrays], axis=1).astype(np.float64)
    assert found.mean == pytest.approx(columns.mean(axis=1), rel=1e-12)
    assert found.variance == pytest.approx(columns.var(axis=1), rel=1e-9)
    assert np.array_equal(found.minima, columns.min(axis=1))
    assert np.array_equal(found.maxima, columns.max(axis=1))
    assert found.counts.tolist() == [columns.shape[1]] * 5
    assert (found.minimum, found.maximum, found.count) == (columns.min(), columns.max(), columns.size)


def test_two_merge_into_that_of_all():
    one, other, both = seen(draw(2, 3, 4)), seen(draw(5, 3, 2)), seen(draw(2, 3, 4), draw(5, 3, 2))
    one.merge(other)
    assert one.mean == pytest.approx(both.mean, rel=1e-12)
    assert one.variance == pytest.approx(both.variance, rel=1e-12)
    one.merge(ChannelStatistics())
    assert one.counts.tolist() == both.counts.tolist()
    empty = ChannelStatistics()
    empty.merge(both)
    assert np.array_equal(empty.maxima, both.maxima)


def test_vectors_and_scalars_are_one_channel():
    assert seen(np.float32([1, 3])).mean.tolist() == [2]
    assert seen(np.float32(4)).maxima.tolist() == [4]


def test_an_axis_of_several_sizes_is_no_axis_of_channels():
    arrays = draw(1, 3, 2), draw(1, 4, 2), draw(1, 3, 5)
    found = seen(*arrays)
    values = np.concatenate([array.ravel() for array in arrays]).astype(np.float64)
    assert found.varies
    assert (found.mean, found.variance) == (pytest.approx([values.mean()]), pytest.approx([values.var()]))
    assert (found.minima, found.maxima, found.counts) == (values.min(), values.max(), [values.size])
    for order in (1, -1):
        one, other = [seen(*part) for part in ((arrays[0],), arrays)][::order]
        one.merge(other)
        assert one.varies and one.counts.tolist() == [values.size + 6]


def test_a_file_gives_back_what_was_seen():
    found = seen(draw(4, 3, 5))
    again = ChannelStatistics.from_json(json.loads(json.dumps(found.to_json())))
    assert again.mean == pytest.approx(found.mean, rel=1e-14)
    assert again.variance == pytest.approx(found.variance, rel=1e-12)
    assert (again.minimum, again.maximum, again.count) == (found.minimum, found.maximum, found.count)
    assert np.array_equal(again.minima, found.minima) and np.array_equal(again.counts, found.counts)


@pytest.mark.parametrize(
    ("key", "value"),
    [("mean", None), ("mean", [1.0]), ("count", [0, 1, 1]), ("minimum", [9, 9, 9]), ("variance", [-1, 0, 0])],
)
def test_damaged_channels_are_refused(key, value):
    with pytest.raises(ValueError, match="its channels are damaged"):
        ChannelStatistics.from_json(seen(draw(4, 3, 5)).to_json() | {key: value})


def test_what_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="not int64"):
        seen(np.array([[1]]))
    with pytest.raises(TypeError, match="merge with channel statistics only"):
        seen(draw(1, 3)).merge(Extremes())
    for bad, what in ((np.nan, "NaN"), (np.inf, "infinite")):
        with pytest.raises(NonFiniteError, match=what):
            seen(np.array([[1, bad]], np.float32))


def test_a_model_is_observed_by_channel():
    model = load_model(
        onnx.parser.parse_model("""
            <ir_version: 8, opset_import: ["" : 17]>
            g (float[N, 3, H, W] x) => (float[N, 3, H, W] y) { y = Relu (x) }
        """)
    )
    feeds = [{"x": draw(2, 3, size, 700)} for size in (3, 300, 5)]  # one is larger than a piece of a flat tensor
    samples = Samples(lambda: iter(feeds), "feeds", 3)
    found = observe(model, ["x", "y"], samples, ChannelStatistics).statistics
    expected = seen(*(np.maximum(feed["x"], 0) for feed in feeds))
    assert found["y"].mean == pytest.approx(expected.mean, rel=1e-12)
    assert found["y"].counts.tolist() == expected.counts.tolist()
    assert found["x"].minima == pytest.approx(seen(*(feed["x"] for feed in feeds)).minima)
