import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import graphopt
from graphopt.api import calibrate
from graphopt.data import Shard
from graphopt.errors import DataError, PipelineError
from graphopt.merging import merged
from graphopt.ranges import Ranges
from graphopt.targets import target_named
from graphopt.thresholds import Method

MODELS = Path(__file__).parents[1] / "models"
MODEL = MODELS / "fmnist_resnet.onnx"
DATA = MODELS / "fashion_mnist_calibration.npz"


def shards(total, method=Method.AUTO, **options):
    return [
        calibrate(MODEL, DATA, samples=50, shard=Shard(number, total), method=method, **options)[0]
        for number in range(1, total + 1)
    ]


@pytest.mark.parametrize("method", [method for method in Method if method.why_not_from_histograms is None])
def test_merged_shards_are_to_the_byte_what_all_the_data_give(method):
    whole, _ = calibrate(MODEL, DATA, samples=50, method=method, histograms=True)
    parts = shards(3, method)
    assert merged(parts[::-1]).to_text() == whole.to_text()
    assert sum(part.samples for part in parts) == 50


def test_a_merged_file_survives_the_disk(tmp_path):
    parts = shards(2)
    for number, part in enumerate(parts):
        part.save(tmp_path / f"{number}.json")
    loaded = [Ranges.load(tmp_path / f"{number}.json") for number in range(2)]
    assert merged(loaded).to_text() == merged(parts).to_text()


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt"])
@pytest.mark.parametrize("method", [Method.ENTROPY, Method.MINMAX, Method.PERCENTILE])
def test_another_method_can_be_chosen_without_the_data(method, target):
    kept, _ = calibrate(MODEL, DATA, samples=40, histograms=True, target=target)
    asked, _ = calibrate(MODEL, DATA, samples=40, method=method, target=target)
    chosen = kept.rechosen(method, percent=99.99, target=target_named(target))
    assert {name: (found.minimum, found.maximum) for name, found in chosen.tensors.items()} == {
        name: (found.minimum, found.maximum) for name, found in asked.tensors.items()
    }


def test_data_free_ranges_do_not_follow_from_histograms():
    found, _ = calibrate(MODEL, DATA, samples=4, histograms=True)
    with pytest.raises(
        DataError, match=r"^data-free looks at the model's BatchNormalization, not at samples: calibrate"
    ):
        found.rechosen(Method.DATA_FREE, percent=99.99, target=target_named("ort-cpu"))
    parts = [replace(each, method=Method.DATA_FREE) for each in shards(2)]
    with pytest.raises(DataError, match="cannot be merged: data-free looks at the model"):
        merged(parts)
    with pytest.raises(DataError, match="do not say by which method"):
        merged([replace(each, method=None) for each in parts])


def test_ranges_without_histograms_have_no_other_choice_but_minmax():
    found, _ = calibrate(MODEL, DATA, samples=40)
    target = target_named("ort-cpu")
    with pytest.raises(DataError, match=r"tensor \S+ has no histogram"):
        found.rechosen(Method.ENTROPY, percent=99.99, target=target)
    chosen = found.rechosen(Method.MINMAX, percent=99.99, target=target)
    assert all(each.maximum == each.observed_maximum for each in chosen.tensors.values())
    with pytest.raises(DataError, match="depends on the order"):
        found.rechosen(Method.MOVING_AVERAGE, percent=99.99, target=target)


def test_parts_that_are_no_whole_are_refused():
    one, two, three = shards(3)
    with pytest.raises(DataError, match="shard 2/3 is missing"):
        merged([one, three])
    with pytest.raises(DataError, match="shard 1/3 is there twice"):
        merged([one, two, three, one])
    with pytest.raises(DataError, match="a file is no shard"):
        merged([one, replace(two, shard="")])
    with pytest.raises(DataError, match="different divisions of the data"):
        merged([one, replace(two, shard="2/2")])
    with pytest.raises(DataError, match="not of one calibration: model_sha256"):
        merged([one, replace(two, model_sha256="0"), three])
    with pytest.raises(DataError, match="cannot be merged"):
        merged([replace(part, method=None) for part in (one, two, three)])
    stripped = {name: replace(found, histogram=None) for name, found in two.tensors.items()}
    with pytest.raises(DataError, match="has no histogram"):
        merged([one, replace(two, tensors=stripped), three])


@pytest.mark.parametrize(("number", "total"), [(0, 3), (4, 3), (1, 0)])
def test_a_shard_outside_the_data_is_refused(number, total):
    with pytest.raises(DataError, match=r"there is no shard"):
        Shard(number, total)


def test_a_shard_without_samples_is_refused():
    with pytest.raises(DataError, match="has no samples for shard 3/3: divide it into fewer"):
        calibrate(MODEL, DATA, samples=2, shard=Shard(3, 3))


def test_what_cannot_be_sharded_or_comes_after_calibrate_is_refused():
    with pytest.raises(PipelineError, match="a shard is of the samples in --data"):
        calibrate(MODEL, shard=Shard(1, 2))
    with pytest.raises(PipelineError, match="depends on the order of the samples: parts of the data cannot"):
        calibrate(MODEL, DATA, shard=Shard(1, 2), method=Method.MOVING_AVERAGE)
    with pytest.raises(PipelineError, match="search quantizes the model and runs it on samples: parts of the data"):
        calibrate(MODEL, DATA, shard=Shard(1, 2), method=Method.SEARCH)
    for passes in ("fold,calibrate", "fold,qdq"):
        with pytest.raises(PipelineError, match="those that come before it"):
            calibrate(MODEL, DATA, passes=passes)


def test_a_damaged_histogram_is_named(tmp_path):
    path = tmp_path / "ranges.json"
    found, _ = calibrate(MODEL, DATA, samples=40, histograms=True)
    found.save(path)
    content = json.loads(path.read_text())
    name, record = next(iter(content["tensors"].items()))
    for change, message in [
        ({"counts": "!"}, "its histogram is damaged"),
        ({"first_bin": 5000}, "its histogram is damaged"),
        ({"width_exponent": 3}, "its histogram is of other values"),
    ]:
        damaged = content | {"tensors": {name: record | {"histogram": record["histogram"] | change}}}
        path.write_text(json.dumps(damaged))
        with pytest.raises(DataError, match=message):
            Ranges.load(path)


def test_ranges_of_another_model_are_warned_about(tmp_path):
    path = tmp_path / "ranges.json"
    calibrate(MODEL, DATA, samples=40)[0].save(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"model_sha256": "0" * 64, "model": "other.onnx"}))
    result = graphopt.optimize(MODEL, "fold,qdq", ranges=path, verify=False)
    assert any("found on another model, other.onnx" in warning for warning in result.report.warnings)
    path.write_text(json.dumps(content))
    result = graphopt.optimize(MODEL, "fold,qdq", ranges=path, verify=False)
    assert not any("another model" in warning for warning in result.report.warnings)


def test_shuffled_samples_and_other_batches_give_the_same_bytes():
    arrays = {name: array[:70] for name, array in np.load(DATA).items()}
    texts = set()
    for order in (slice(None), slice(None, None, -1), np.random.default_rng(0).permutation(70)):
        found, _ = calibrate(MODEL, {name: array[order] for name, array in arrays.items()}, histograms=True)
        texts.add(found.to_text())
    one_by_one = [{name: array[index : index + 1] for name, array in arrays.items()} for index in range(70)]
    found, _ = calibrate(MODEL, one_by_one, histograms=True)
    texts.add(replace(found, source=next(iter(texts)) and json.loads(next(iter(texts)))["data"]).to_text())
    assert len(texts) == 1
