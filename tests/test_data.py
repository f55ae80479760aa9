"""Feeds from every kind of source: what is read, what is cast, what is refused and in which words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.quantization import CalibrationDataReader

from graphopt import python_sources
from graphopt.data import data_file, load_samples
from graphopt.errors import DataError
from graphopt.feeds import Feed, InputSpec, Samples
from graphopt.synthetic import synthetic_samples

FLOAT32, FLOAT16, INT64, INT32, BOOL = map(np.dtype, ("float32", "float16", "int64", "int32", "bool"))
IMAGES = (InputSpec("input", FLOAT32, ("N", 1, 28, 28)),)
SPEECH = (
    InputSpec("input", FLOAT32, ("N", 576)),
    InputSpec("state", FLOAT32, (2, 1, 128)),
    InputSpec("sr", INT64, ()),
)
ROWS = (InputSpec("x", FLOAT32, ("N", 3)),)


def rows(count: int) -> np.ndarray:
    return np.arange(count * 3, dtype=np.float32).reshape(count, 3)


def refused(*parts: str) -> AbstractContextManager[object]:
    """A DataError whose message holds these parts in this order."""
    return pytest.raises(DataError, match=".*".join(map(re.escape, parts)))


def assert_feeds(samples: Samples, expected: list[Feed]) -> None:
    """The samples are these feeds, each time they are iterated."""
    for _ in range(2):
        found = list(samples)
        assert len(found) == len(expected)
        for feed, wanted in zip(found, expected, strict=True):
            assert feed.keys() == wanted.keys()
            for name, array in wanted.items():
                np.testing.assert_array_equal(feed[name], array, strict=True)


class TestNpz:
    def test_gives_one_sample_a_feed_and_can_be_iterated_again(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "calib.npz", x=rows(4))
        samples = load_samples(tmp_path / "calib.npz", ROWS)
        assert_feeds(samples, [{"x": rows(4)[index : index + 1]} for index in range(4)])
        assert samples.count == 4
        assert not samples.synthetic
        assert samples.description == str(tmp_path / "calib.npz")
        assert samples.notes == ()

    @settings(deadline=None)  # other work may hold the machine
    @given(batch=st.integers(1, 4), feeds=st.integers(1, 5), width=st.integers(1, 3))
    def test_slices_as_many_samples_as_the_first_dimension_fixes(self, batch: int, feeds: int, width: int) -> None:
        array = np.arange(batch * feeds * width, dtype=np.float32).reshape(batch * feeds, width)
        samples = load_samples({"x": array}, [InputSpec("x", FLOAT32, (batch, width))])
        assert_feeds(samples, [{"x": array[start : start + batch]} for start in range(0, len(array), batch)])

    def test_hands_out_views_of_arrays_that_need_no_cast(self) -> None:
        array = rows(4)
        assert all(np.shares_memory(feed["x"], array) for feed in load_samples({"x": array}, ROWS))

    def test_takes_an_extra_axis_0_as_the_count_of_feeds(self) -> None:
        states = np.arange(3 * 2 * 128, dtype=np.float32).reshape(3, 2, 1, 128)
        arrays = {
            "input": np.ones((3, 576), np.float32),
            "state": states,
            "sr": np.array([8000, 16000, 8000]),
        }
        feeds = list(load_samples(arrays, SPEECH))
        assert [feed["state"].shape for feed in feeds] == [(2, 1, 128)] * 3
        np.testing.assert_array_equal(feeds[2]["state"], states[2])
        assert [feed["sr"].shape for feed in feeds] == [()] * 3
        assert [int(feed["sr"]) for feed in feeds] == [8000, 16000, 8000]

    def test_repeats_an_array_that_holds_one_feed_and_says_so(self) -> None:
        arrays = {
            "input": np.ones((3, 576), np.float32),
            "state": np.zeros((2, 1, 128), np.float32),
            "sr": np.array(16000),
        }
        samples = load_samples(arrays, SPEECH)
        assert samples.count == 3
        assert [int(feed["sr"]) for feed in samples] == [16000] * 3
        assert samples.notes == (
            "data: 'state' holds one sample, which is used for every feed",
            "data: 'sr' holds one sample, which is used for every feed",
        )

    def test_takes_any_shape_where_none_is_declared(self) -> None:
        feeds = list(load_samples({"x": rows(2)}, [InputSpec("x", FLOAT32, ())]))
        assert [feed["x"].shape for feed in feeds] == [(1, 3), (1, 3)]

    def test_ignores_an_array_that_is_no_input_and_notes_it(self, tmp_path: Path) -> None:
        path = tmp_path / "calib.npz"
        np.savez(path, x=rows(2), label=np.array([1, 2, 3]))
        samples = load_samples(str(path), ROWS)
        assert_feeds(samples, [{"x": rows(2)[:1]}, {"x": rows(2)[1:]}])
        assert samples.notes == (f"{path}: ignored 'label': no such input in the model",)

    def test_does_not_read_an_array_that_is_no_input(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "calib.npz", x=rows(2), label=np.array([{}], object))
        assert load_samples(tmp_path / "calib.npz", ROWS).count == 2

    def test_refuses_a_pickled_array(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "calib.npz", x=np.array([{}], object))
        with refused("array 'x' is pickled, which is refused because reading it could run code"):
            load_samples(tmp_path / "calib.npz", ROWS)

    def test_refuses_a_missing_input_and_lists_what_the_model_takes(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "calib.npz", images=np.ones((2, 576), np.float32))
        with refused(
            f"{tmp_path / 'calib.npz'}: no array for input 'input', 'state', 'sr'; the model takes "
            "'input' float32 [N, 576], 'state' float32 [2, 1, 128], 'sr' int64 scalar; arrays found: 'images'"
        ):
            load_samples(tmp_path / "calib.npz", SPEECH)

    def test_refuses_another_shape_and_says_which_array_in_which_file(self, tmp_path: Path) -> None:
        path = tmp_path / "calib.npz"
        np.savez(path, input=np.zeros((256, 3, 28, 28), np.float32))
        with refused(
            f"{path}: array 'input' has shape (256, 3, 28, 28), but the model's input 'input' takes "
            "float32 [N, 1, 28, 28]"
        ):
            load_samples(path, IMAGES)

    def test_refuses_another_rank(self) -> None:
        with refused("array 'input' has shape (256, 28, 28)"):
            load_samples({"input": np.zeros((256, 28, 28), np.float32)}, IMAGES)

    def test_refuses_a_count_that_the_fixed_batch_does_not_divide(self) -> None:
        with refused("array 'x' has 5 samples, but the model takes 2 at a time: give a multiple of 2"):
            load_samples({"x": rows(5)}, [InputSpec("x", FLOAT32, (2, 3))])

    def test_refuses_arrays_that_hold_different_numbers_of_samples(self) -> None:
        inputs = [InputSpec("a", FLOAT32, ("N", 3)), InputSpec("b", FLOAT32, ("N", 3))]
        with refused("data: the arrays hold different numbers of samples: 'b' 2, others 3"):
            load_samples({"a": rows(3), "b": rows(2)}, inputs)

    def test_refuses_arrays_without_samples(self) -> None:
        with refused("data: no samples: axis 0 of its arrays has length 0"):
            load_samples({"x": rows(0)}, ROWS)

    def test_refuses_a_file_that_is_no_npz(self, tmp_path: Path) -> None:
        (tmp_path / "calib.npz").write_bytes(b"not a zip file")
        with refused(f"{tmp_path / 'calib.npz'}: cannot be read as .npz"):
            load_samples(tmp_path / "calib.npz", ROWS)

    def test_refuses_a_damaged_file(self, tmp_path: Path) -> None:
        path = tmp_path / "calib.npz"
        np.savez_compressed(path, x=np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32))
        content = bytearray(path.read_bytes())
        content[2000:2100] = bytes(100)
        path.write_bytes(content)
        with refused(f"{path}: cannot be read as .npz"):
            load_samples(path, ROWS)

    def test_refuses_a_single_array_under_the_name_of_an_npz(self, tmp_path: Path) -> None:
        with (tmp_path / "calib.npz").open("wb") as file:
            np.save(file, rows(2))
        with refused("a single array, not an .npz"):
            load_samples(tmp_path / "calib.npz", ROWS)


class TestCasts:
    @pytest.mark.parametrize(
        ("given_dtype", "wanted"),
        [
            ("float64", FLOAT32),
            ("float16", FLOAT32),
            (">f4", FLOAT32),
            ("float32", FLOAT16),
            ("int32", INT64),
            ("int64", INT32),
            ("uint8", INT64),
            ("bool", INT64),
            ("int64", BOOL),
        ],
    )
    def test_casts_what_keeps_its_meaning(self, given_dtype: str, wanted: np.dtype) -> None:
        array = np.array([[0, 1, 1]], given_dtype)
        assert_feeds(load_samples({"x": array}, [InputSpec("x", wanted, ("N", 3))]), [{"x": array.astype(wanted)}])

    def test_takes_text_for_strings(self) -> None:
        (feed,) = load_samples({"x": np.array([["a", "b"]])}, [InputSpec("x", np.dtype(object), ("N", 2))])
        assert feed["x"].dtype == object
        assert feed["x"].tolist() == [["a", "b"]]

    @pytest.mark.parametrize("dtype", ["uint8", "int8", "int64", "bool"])
    def test_refuses_integers_for_a_float_input_because_the_scaling_is_unknown(self, dtype: str) -> None:
        with refused(
            f"data, sample 0: array 'input' is {dtype}, but the model's input 'input' takes "
            "float32 [N, 1, 28, 28]; scale it yourself, because only you know how"
        ):
            load_samples({"input": np.ones((2, 1, 28, 28), dtype)}, IMAGES)

    @pytest.mark.parametrize(
        ("array", "wanted", "reason"),
        [
            (np.array([[1.0]]), INT64, "convert it to int64 yourself"),
            (np.array([["1"]]), FLOAT32, "convert it to float32 yourself"),
            (np.array([[2**40]]), INT32, "some of its values do not fit into int32"),
            (np.array([[2]]), BOOL, "some of its values do not fit into bool"),
            (np.array([[-1]]), np.dtype("uint64"), "some of its values do not fit into uint64"),
            (np.array([[1e30]]), FLOAT16, "some of its values are too large for float16"),
        ],
    )
    def test_refuses_a_cast_that_loses_something(self, array: np.ndarray, wanted: np.dtype, reason: str) -> None:
        with refused(reason):
            load_samples({"x": array}, [InputSpec("x", wanted, ("N", 1))])

    def test_keeps_infinite_values_when_it_casts(self) -> None:
        array = np.array([[-np.inf, 0.0, 1.0]])
        assert_feeds(load_samples({"x": array}, ROWS), [{"x": array.astype(np.float32)}])

    @pytest.mark.parametrize("dimension", ["N", "?", "-1", -1, 0, None])
    def test_takes_any_size_where_the_declared_one_is_none(self, dimension: int | str | None) -> None:
        spec = InputSpec("x", FLOAT32, (dimension, dimension))
        assert_feeds(load_samples([{"x": rows(5)}], [spec]), [{"x": rows(5)}])


class TestNpzFolder:
    def test_gives_one_feed_a_file_by_name_with_shapes_that_vary(self, tmp_path: Path) -> None:
        for name, count in (("b", 2), ("a", 1), ("c", 3)):
            np.savez(tmp_path / f"{name}.npz", x=rows(count))
        samples = load_samples(tmp_path, ROWS)
        assert_feeds(samples, [{"x": rows(count)} for count in (1, 2, 3)])
        assert samples.count == 3

    def test_names_the_file_that_does_not_fit_when_its_turn_comes(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=rows(1))
        np.savez(tmp_path / "b.npz", x=np.ones((1, 4), np.float32))
        samples = load_samples(tmp_path, ROWS)
        with refused(f"{tmp_path / 'b.npz'}: array 'x' has shape (1, 4), but"):
            list(samples)

    def test_reads_no_file_beyond_the_limit(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=rows(1))
        (tmp_path / "b.npz").write_bytes(b"broken")
        samples = load_samples(tmp_path, ROWS, limit=1)
        assert_feeds(samples, [{"x": rows(1)}])
        assert samples.count == 1


class TestOnnxTestData:
    def write(self, folder: Path, number: int, array: np.ndarray, name: str = "") -> None:
        folder.mkdir(exist_ok=True)
        onnx.save_tensor(onnx.numpy_helper.from_array(array, name), folder / f"input_{number}.pb")

    def test_gives_one_feed_a_set_in_numeric_order(self, tmp_path: Path) -> None:
        for number in (0, 2, 10):
            self.write(tmp_path / f"test_data_set_{number}", 0, rows(number + 1), "x")
        samples = load_samples(tmp_path, ROWS)
        assert_feeds(samples, [{"x": rows(count)} for count in (1, 3, 11)])
        assert samples.count == 3

    def test_reads_a_single_set(self, tmp_path: Path) -> None:
        self.write(tmp_path, 0, rows(2), "x")
        assert_feeds(load_samples(tmp_path, ROWS), [{"x": rows(2)}])

    def test_goes_by_name_before_it_goes_by_order(self, tmp_path: Path) -> None:
        inputs = [InputSpec("a", FLOAT32, ("N", 3)), InputSpec("b", FLOAT32, ("N", 3))]
        self.write(tmp_path, 0, rows(1), "b")
        self.write(tmp_path, 1, rows(2), "a")
        assert_feeds(load_samples(tmp_path, inputs), [{"a": rows(2), "b": rows(1)}])

    @pytest.mark.parametrize("name", ["", "gpu_0/data_0"])
    def test_goes_by_order_where_the_name_says_nothing(self, tmp_path: Path, name: str) -> None:
        inputs = [InputSpec("a", FLOAT32, ("N", 3)), InputSpec("b", FLOAT32, ("N", 3))]
        self.write(tmp_path, 0, rows(1), name)
        self.write(tmp_path, 1, rows(2), "")
        assert_feeds(load_samples(tmp_path, inputs), [{"a": rows(1), "b": rows(2)}])

    def test_refuses_a_file_that_is_no_tensor(self, tmp_path: Path) -> None:
        (tmp_path / "input_0.pb").write_bytes(b"\xff\xff\xff")
        with refused(f"{tmp_path / 'input_0.pb'}: cannot be read as an ONNX TensorProto"):
            load_samples(tmp_path, ROWS)


class TestFunctionInFile:
    def write(self, folder: Path, body: str) -> Path:
        path = folder / "calib.py"
        path.write_text(f"import numpy as np\n{body}\n")
        return path

    def test_calls_the_function_for_every_iteration(self, tmp_path: Path) -> None:
        path = self.write(
            tmp_path,
            "def load():\n    for i in range(3):\n        yield {'x': np.full((1, 3), i, np.float32)}",
        )
        samples = load_samples(f"{path}:load", ROWS)
        assert_feeds(samples, [{"x": np.full((1, 3), i, np.float32)} for i in range(3)])
        assert samples.count is None
        assert samples.description == f"{path}:load"

    def test_finds_modules_beside_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "its_neighbour_module.py").write_text("WIDTH = 3\n")
        path = self.write(
            tmp_path,
            "from its_neighbour_module import WIDTH\ndef load(): return [{'x': np.ones((1, WIDTH))}]",
        )
        assert_feeds(load_samples(f"{path}:load", ROWS), [{"x": np.ones((1, 3), np.float32)}])

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (
                "def load():\n    yield {'x': np.ones((1, 3))}\n    raise OSError('disk')",
                "line 4: OSError: disk",
            ),
            ("def load():\n    return 1 / 0", "line 3: ZeroDivisionError"),
            ("import no_such_module_anywhere", "line 2: ModuleNotFoundError"),
            ("def load(:", "line 2: SyntaxError"),
            ("def load(path): return []", "TypeError: load() missing 1 required positional argument"),
            ("def load(): return None", "TypeError: 'NoneType' object is not iterable"),
            ("load = 5", "has no function 'load'"),
            (
                "def load(): return [np.ones((1, 3))]",
                "feed 0 is a ndarray: yield a dict of input name -> array",
            ),
            ("def load(): return []", "no samples"),
        ],
    )
    def test_names_file_and_line_of_what_goes_wrong(self, tmp_path: Path, body: str, message: str) -> None:
        path = self.write(tmp_path, body)
        with refused(str(path), message):
            list(load_samples(f"{path}:load", ROWS))

    def test_names_the_line_for_a_path_relative_to_the_working_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.write(tmp_path, "def load():\n    return 1 / 0")
        monkeypatch.chdir(tmp_path)
        with refused("calib.py, line 3: ZeroDivisionError: division by zero"):
            load_samples("calib.py:load", ROWS)

    def test_asks_for_the_function_when_it_is_not_named(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "")
        with refused(f"{path}: name the function that yields feeds, such as {path}:load_data"):
            load_samples(path, ROWS)


class RewindableReader(CalibrationDataReader):
    """What onnxruntime's users write."""

    def __init__(self) -> None:
        self.rewind()

    def get_next(self) -> Feed | None:
        return next(self.feeds, None)

    def rewind(self) -> None:
        self.feeds = iter([{"x": rows(1)}, {"x": rows(2)}])


class TestPythonObjects:
    def test_takes_a_list(self) -> None:
        samples = load_samples([{"x": rows(1)}, {"x": rows(2)}], ROWS)
        assert_feeds(samples, [{"x": rows(1)}, {"x": rows(2)}])
        assert samples.count == 2

    def test_calls_a_function_for_every_iteration(self) -> None:
        def load() -> Iterator[Feed]:
            yield {"x": rows(1)}
            yield {"x": rows(2)}

        samples = load_samples(load, ROWS)
        assert_feeds(samples, [{"x": rows(1)}, {"x": rows(2)}])
        assert samples.count is None

    def test_refuses_a_function_that_returns_the_same_iterator_twice(self) -> None:
        feeds = iter([{"x": rows(1)}, {"x": rows(2)}])
        samples = load_samples(lambda: feeds, ROWS)
        assert len(list(samples)) == 1
        with refused("function <lambda>: gave samples once, but none when started again"):
            list(samples)

    def test_takes_an_object_that_only_has_items(self) -> None:
        class Loader:
            def __getitem__(self, index: int) -> Feed:
                if index >= 2:
                    raise IndexError
                return {"x": rows(index + 1)}

            def __len__(self) -> int:
                return 2

        samples = load_samples(Loader(), ROWS)  # type: ignore[arg-type]
        assert_feeds(samples, [{"x": rows(1)}, {"x": rows(2)}])
        assert samples.count == 2

    def test_keeps_what_an_iterator_yields_because_it_cannot_start_again(self) -> None:
        samples = load_samples(iter([{"x": rows(1)}, {"x": rows(2)}]), ROWS)
        assert_feeds(samples, [{"x": rows(1)}, {"x": rows(2)}])
        assert samples.notes == ("list_iterator: read once and kept in memory, 36 bytes",)

    def test_takes_no_more_from_an_endless_iterator_than_the_limit(self) -> None:
        endless = iter(lambda: {"x": rows(1)}, None)
        assert_feeds(load_samples(endless, ROWS, limit=2), [{"x": rows(1)}] * 2)

    def test_refuses_an_iterator_that_would_fill_the_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(python_sources, "BUFFER_LIMIT", 1000)
        with refused("give a function that returns the iterator, or limit the number of samples"):
            load_samples(iter(lambda: {"x": rows(1)}, None), ROWS)

    def test_rewinds_a_calibration_data_reader(self) -> None:
        assert_feeds(load_samples(RewindableReader(), ROWS), [{"x": rows(1)}, {"x": rows(2)}])

    def test_keeps_the_feeds_of_a_reader_that_cannot_rewind(self) -> None:
        class Reader:
            def __init__(self) -> None:
                self.feeds = iter([{"x": rows(1)}])

            def get_next(self) -> Feed | None:
                return next(self.feeds, None)

        assert_feeds(load_samples(Reader(), ROWS), [{"x": rows(1)}])

    def test_takes_samples_again_with_a_limit(self) -> None:
        made_up = synthetic_samples(ROWS, count=5, seed=0)
        samples = load_samples(made_up, ROWS, limit=2)
        assert_feeds(samples, list(made_up)[:2])
        assert samples.synthetic
        assert samples.count == 2

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (7, "data is a int: give a path, a dict of arrays, or an iterable of such dicts"),
            (rows(2), "feed 0 is a ndarray: yield a dict of input name -> array"),
            ([(rows(1), 3)], "feed 0 is a tuple"),
            ([], "list: no samples"),
            ([{"x": [[1.0, 2.0], [3.0]]}], "list, feed 0: the value of 'x' is not an array"),
        ],
    )
    def test_refuses_what_gives_no_feeds(self, data: object, message: str) -> None:
        with refused(message):
            load_samples(data, ROWS)  # type: ignore[arg-type]


class TestPaths:
    def test_refuses_a_path_that_is_not_there(self) -> None:
        with refused("nowhere.npz: no such file or folder"):
            load_samples("nowhere.npz", ROWS)

    def test_refuses_a_file_of_another_kind(self, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", rows(1))
        with refused("not a kind of data that graphopt reads: give an .npz, a folder of .npz"):
            load_samples(tmp_path / "x.npy", ROWS)

    def test_refuses_a_folder_without_data(self, tmp_path: Path) -> None:
        (tmp_path / "readme.txt").touch()
        with refused("holds no data that graphopt reads"):
            load_samples(tmp_path, ROWS)

    @pytest.mark.parametrize("limit", [0, -1])
    def test_refuses_a_limit_below_one(self, limit: int) -> None:
        with refused(f"the number of samples must be at least 1, not {limit}"):
            load_samples({"x": rows(1)}, ROWS, limit=limit)


def test_the_first_feeds_of_samples_are_a_shorter_source():
    feeds = [{"x": np.array([number])} for number in range(5)]
    shorter = Samples(lambda: iter(feeds), "five", 5).first(2)
    assert [feed["x"].item() for feed in shorter] == [feed["x"].item() for feed in shorter] == [0, 1]
    assert (shorter.count, shorter.description) == (2, "five")


@pytest.mark.parametrize(("text", "file"), [("a/b.py:feeds", "a/b.py"), ("a:b/c.npz", "a:b/c.npz"), ("x.py", "x.py")])
def test_the_file_behind_a_data_argument(text, file):
    assert data_file(text) == Path(file)


@pytest.mark.parametrize("name", ["x.npz", "set/input_0.pb"])
def test_a_damaged_file_is_an_error_or_still_data(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    array = np.zeros((4, 3), np.float32)
    if path.suffix == ".npz":
        np.savez_compressed(path, x=array)
    else:
        path.write_bytes(onnx.numpy_helper.from_array(array, "x").SerializeToString())
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.integers(1, 6)):
            damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        source = path if path.suffix == ".npz" else path.parent
        with suppress(DataError):
            list(load_samples(source, ROWS))
