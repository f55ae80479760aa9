"""Calibration on a dask cluster: two worker processes on this machine."""

import warnings
from pathlib import Path

import pytest

from graphopt.api import calibrate, calibrate_on_cluster
from graphopt.cli import main
from graphopt.errors import DataError, PipelineError

distributed = pytest.importorskip("distributed", reason="the extra dask is not installed")

MODELS = Path(__file__).parents[1] / "models"
MODEL = str(MODELS / "fmnist_resnet.onnx")
DATA = str(MODELS / "fashion_mnist_calibration.npz")

pytestmark = pytest.mark.filterwarnings("default")  # dask's own


@pytest.fixture(scope="module")
def cluster():
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as started:
            yield started


def test_a_cluster_finds_to_the_byte_what_one_machine_finds(cluster):
    told = []
    ranges = calibrate_on_cluster(
        cluster.scheduler_address,
        MODEL,
        DATA,
        samples=40,
        progress=lambda what, done, total: told.append((what, done, total)),
    )
    whole, _ = calibrate(MODEL, DATA, samples=40, histograms=True)
    assert ranges.to_text() == whole.to_text()
    assert told == [("calibrate 2 shards", done, 2) for done in range(3)]


def test_the_number_of_shards_is_free_and_the_command_line_has_it(cluster, tmp_path):
    arguments = ["calibrate", MODEL, "--data", DATA, "--samples", "40", "--shards", "3"]
    path = tmp_path / "ranges.json"
    assert main([*arguments, "--scheduler", cluster.scheduler_address, "-o", str(path)]) == 0
    whole, _ = calibrate(MODEL, DATA, samples=40, histograms=True)
    assert path.read_text() == whole.to_text()


def test_what_a_worker_refuses_is_the_error(cluster):
    with pytest.raises(DataError, match=r"has no samples for shard [345]/5: divide it into fewer"):
        calibrate_on_cluster(cluster.scheduler_address, MODEL, DATA, samples=2, shards=5)


def test_a_scheduler_that_does_not_answer_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("graphopt.cluster._SECONDS_TO_CONNECT", 1)
    arguments = ["calibrate", MODEL, "--data", DATA, "-o", str(tmp_path / "ranges.json")]
    for address in ("tcp://127.0.0.1:1", "nonsense://x"):
        assert main([*arguments, "--scheduler", address]) == 2
        err = capsys.readouterr().err
        assert f"error: no dask scheduler answers at {address}" in err
        assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [["--shard", "1/2"], []])
def test_a_cluster_needs_data_and_divides_them_itself(tmp_path, capsys, options):
    arguments = ["calibrate", MODEL, "--scheduler", "tcp://127.0.0.1:1", "-o", str(tmp_path / "r.json"), *options]
    assert main([*arguments, *(["--data", DATA] if options else [])]) == 2
    assert "a cluster divides --data into shards itself" in capsys.readouterr().err


def test_no_shards_are_refused():
    with pytest.raises(PipelineError, match="at least 1, not 0"):
        calibrate_on_cluster("tcp://127.0.0.1:1", MODEL, DATA, shards=0)


def test_without_dask_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with pytest.raises(PipelineError, match=r"pip install 'graphopt\[dask\]'"):
        calibrate_on_cluster("tcp://127.0.0.1:1", MODEL, DATA)
