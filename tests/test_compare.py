"""Two sessions over the same samples: the figures, what they leave out, and what cannot be compared."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import graphopt
from graphopt import compare
from graphopt.compare import Comparison, OutputComparison, compare_sessions
from graphopt.data import load_samples
from graphopt.errors import DataError, GraphoptError, ModelError
from graphopt.feeds import Feed, InputSpec, Samples
from graphopt.held_out import noise_to_signal
from graphopt.runtime import open_session


class Playback:
    """A session that answers feed number `feed["i"]` with arrays given beforehand."""

    inputs = (InputSpec("i", np.dtype("int64"), ()),)

    def __init__(self, **outputs: Sequence[object]) -> None:
        self._arrays = {name: [np.asarray(each) for each in arrays] for name, arrays in outputs.items()}
        self.outputs = tuple(outputs)

    def run(self, feed: Feed, outputs: Sequence[str]) -> Feed:
        return {name: self._arrays[name][int(feed["i"])] for name in outputs}


def numbers(count: int) -> Samples:
    return load_samples([{"i": np.array(index)} for index in range(count)], Playback.inputs)


def compared(reference: Sequence[object], other: Sequence[object]) -> OutputComparison:
    sessions = Playback(y=reference), Playback(y=other)
    (found,) = compare_sessions(*sessions, numbers(len(reference))).outputs  # type: ignore[arg-type]
    return found


def output(**figures: object) -> OutputComparison:
    return OutputComparison(
        **{
            "name": "y",
            "dtype": "float32",
            "sqnr_db": 40.0,
            "cosine": 1.0,
            "max_error": 0.0,
            "agreement": None,
        }
        | figures  # type: ignore[arg-type]
    )


class TestFigures:
    @settings(deadline=None)  # other work may hold the machine
    @given(
        decibels=st.floats(-20, 120),
        sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
        seed=st.integers(0, 1000),
    )
    def test_give_the_sqnr_of_noise_that_is_scaled_to_it_over_all_samples(
        self, decibels: float, sizes: list[int], seed: int
    ) -> None:
        generator = np.random.default_rng(seed)
        signal = [generator.normal(size=size) + 0.1 for size in sizes]
        noise = [generator.normal(size=size) + 0.1 for size in sizes]
        power, noise_power = (sum(float(each @ each) for each in arrays) for arrays in (signal, noise))
        scale = math.sqrt(power / noise_power / 10 ** (decibels / 10))
        other = [x + scale * n for x, n in zip(signal, noise, strict=True)]
        assert compared(signal, other).sqnr_db == pytest.approx(decibels, abs=1e-3)

    def test_match_a_worked_example(self) -> None:
        found = compared([[3.0, 4.0]], [[3.0, 3.5]])
        assert found.sqnr_db == pytest.approx(20.0)  # 25 / 0.25
        assert found.cosine == pytest.approx(23 / (5 * math.sqrt(21.25)))
        assert found.max_error == 0.5
        assert found.dtype == "float64"

    def test_are_the_same_in_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        generator = np.random.default_rng(0)
        reference, other = generator.normal(size=(2, 7, 11)), generator.normal(size=(2, 7, 11))
        whole = compared([reference], [other])
        monkeypatch.setattr(compare, "_CHUNK", 10)
        parts = compared([reference], [other])
        assert parts.sqnr_db == pytest.approx(whole.sqnr_db)
        assert parts.cosine == pytest.approx(whole.cosine)
        assert parts.max_error == whole.max_error

    def test_are_added_up_in_float64(self) -> None:
        large = np.full(10, 3e38, np.float32)
        assert compared([large], [large * np.float32(0.9)]).sqnr_db == pytest.approx(20, abs=1e-4)

    def test_are_perfect_for_equal_outputs(self) -> None:
        found = compared([[1.0, -2.0]], [[1.0, -2.0]])
        assert (found.sqnr_db, found.max_error) == (math.inf, 0.0)
        assert found.cosine == pytest.approx(1.0)

    @pytest.mark.parametrize(
        ("reference", "other", "sqnr_db", "cosine"),
        [([0.0, 0.0], [0.0, 0.0], math.inf, 1.0), ([0.0], [1.0], -math.inf, 0.0), ([1.0], [0.0], 0.0, 0.0)],
    )
    def test_have_a_meaning_for_zeros(
        self, reference: list[float], other: list[float], sqnr_db: float, cosine: float
    ) -> None:
        found = compared([reference], [other])
        assert (found.sqnr_db, found.cosine) == (sqnr_db, cosine)

    def test_take_an_empty_output_for_equal(self) -> None:
        found = compared([np.zeros((0, 4))], [np.zeros((0, 4))])
        assert (found.sqnr_db, found.max_error, found.agreement) == (math.inf, 0.0, None)

    def test_leave_out_what_is_not_finite_in_the_reference_and_count_it(self) -> None:
        found = compared([[3.0, np.nan, 4.0, -np.inf]], [[3.0, 7.0, 3.5, -np.inf]])
        assert found.sqnr_db == pytest.approx(20.0)
        assert (found.nonfinite_reference, found.nonfinite_new) == (2, 0)

    def test_say_nothing_where_the_reference_has_no_finite_value(self) -> None:
        assert math.isnan(compared([[np.nan]], [[1.0]]).sqnr_db)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_are_hopeless_where_only_the_other_is_not_finite(self, value: float) -> None:
        found = compared([[1.0, 2.0]], [[1.0, value]])
        assert (found.sqnr_db, found.max_error, found.nonfinite_new) == (-math.inf, math.inf, 1)
        assert math.isnan(found.cosine)


class TestAgreement:
    def test_is_the_share_of_rows_with_the_same_highest_class(self) -> None:
        reference = [[[0.1, 0.9], [0.8, 0.2]], [[0.4, 0.6], [0.3, 0.7]]]
        other = [[[0.2, 0.8], [0.4, 0.6]], [[0.1, 0.9], [0.2, 0.8]]]
        assert compared(reference, other).agreement == 0.75

    def test_ignores_trailing_dimensions_of_one(self) -> None:
        assert compared([np.eye(3).reshape(3, 3, 1, 1)], [np.eye(3).reshape(3, 3, 1, 1)]).agreement == 1.0

    @pytest.mark.parametrize("shape", [(), (5,), (4, 1), (2, 3, 4), (1, 3, 8, 8), (0, 3)])
    def test_is_none_where_floats_do_not_look_like_class_scores(self, shape: tuple[int, ...]) -> None:
        assert compared([np.zeros(shape)], [np.zeros(shape)]).agreement is None

    def test_leaves_out_rows_that_the_reference_does_not_know(self) -> None:
        reference, other = [[np.nan, 1.0], [0.0, 1.0]], [[2.0, 1.0], [0.0, 1.0]]
        assert compared([reference], [other]).agreement == 1.0

    def test_counts_a_new_nan_as_disagreement(self) -> None:
        assert compared([[[0.0, 1.0]]], [[[0.0, np.nan]]]).agreement == 0.0

    @pytest.mark.parametrize(
        ("reference", "other"),
        [
            ([1, 2, 3, 4], [1, 2, 3, 5]),
            ([True, True, False, True], [True] * 4),
            (["a", "b", "c", "d"], ["a", "b", "c", ""]),
        ],
    )
    def test_is_the_share_of_equal_elements_for_what_is_no_float(
        self, reference: list[object], other: list[object]
    ) -> None:
        found = compared([reference], [other])
        assert found.agreement == 0.75
        assert not found.is_float

    def test_leaves_numbers_out_for_strings(self) -> None:
        different = compared([["a"]], [["b"]])
        assert (different.dtype, different.agreement) == ("string", 0.0)
        assert math.isnan(different.sqnr_db)
        assert compared([["a"]], [["a"]]).sqnr_db == math.inf

    def test_compares_bool_and_unsigned_integers_as_numbers(self) -> None:
        assert compared([np.array([0, 255], np.uint8)], [np.array([255, 0], np.uint8)]).max_error == 255
        assert compared([[True, False]], [[False, False]]).max_error == 1


class TestArraysOfOtherSizes:
    """How many boxes a detector finds follows from its values."""

    def test_are_counted_and_left_out(self) -> None:
        found = compared([[3.0, 4.0], [1.0]], [[3.0, 5.0], [1.0, 2.0]])
        assert (found.arrays, found.resized, found.max_error) == (2, 1, 1)
        assert found.sqnr_db == pytest.approx(10 * math.log10(25))

    @pytest.mark.parametrize("values", [1.0, 1, "a"])
    def test_leave_nothing_to_compare_where_all_are(self, values: object) -> None:
        found = compared([[values]], [[values, values]])
        assert math.isnan(found.sqnr_db)
        assert math.isnan(found.cosine)
        assert found.agreement is None

    @pytest.mark.parametrize(("resized", "error"), [(0, 0.01), (1, 0.505), (2, 1)])
    def test_are_all_noise_in_what_passes_judge_by(self, resized: int, error: float) -> None:
        reference, other = [[1.0]] * 2, [[1.1]] * (2 - resized) + [[1.0, 1.0]] * resized
        sessions = Playback(y=reference), Playback(y=other)
        assert noise_to_signal(*sessions, numbers(2)) == pytest.approx(error)  # type: ignore[arg-type]


class TestLimits:
    def test_are_kept_at_their_exact_value(self) -> None:
        comparison = Comparison((output(sqnr_db=30.0, agreement=0.99),), 1)
        assert comparison.ok()
        assert comparison.ok(min_sqnr=30.0, min_agreement=0.99)

    @pytest.mark.parametrize("sqnr_db", [29.99, math.nan, -math.inf])
    def test_name_a_float_output_below_the_sqnr(self, sqnr_db: float) -> None:
        comparison = Comparison((output(sqnr_db=sqnr_db), output(name="z")), 1)
        assert not comparison.ok(min_sqnr=30.0)
        assert comparison.shortfalls(min_sqnr=30.0) == [f"output 'y' has an SQNR of {sqnr_db:.2f} dB, below 30 dB"]

    def test_do_not_hold_integers_to_an_sqnr(self) -> None:
        assert Comparison((output(), output(name="ids", dtype="int64", sqnr_db=3.0)), 1).ok(min_sqnr=30)

    def test_name_an_output_below_the_agreement(self) -> None:
        comparison = Comparison((output(agreement=0.5), output(name="z")), 1)
        assert comparison.shortfalls(min_agreement=0.9) == ["output 'y' agrees in 50.00%, below 90.00%"]

    def test_fail_where_no_output_can_be_held_to_them(self) -> None:
        assert Comparison((output(),), 1).shortfalls(min_agreement=0.9) == [
            "no output looks like class scores [N, C], so there is no agreement to hold to a limit"
        ]
        assert Comparison((output(dtype="int64"),), 1).shortfalls(min_sqnr=9) == [
            "no output is float, so there is no SQNR to hold to a limit"
        ]

    def test_are_not_needed_for_new_nan(self) -> None:
        comparison = Comparison((output(nonfinite_new=3),), 1)
        assert comparison.shortfalls() == ["output 'y' has 3 NaN or infinite values where the reference has none"]

    def test_are_not_needed_for_other_sizes(self) -> None:
        resized = output(arrays=4, resized=1, first_resized="shape (2,) in the reference and (3,) in the other model")
        (sentence,) = Comparison((resized, output(name="z")), 4).shortfalls()
        assert sentence == (
            "output 'y' has other sizes than in the reference in 1 of 4 arrays, shape (2,) in the reference and (3,) "
            "in the other model; these are left out of its figures"
        )

    def test_outputs_are_sorted_with_the_worst_first(self) -> None:
        values = {"a": 20.0, "b": math.inf, "c": math.nan, "d": -math.inf}
        comparison = Comparison(tuple(output(name=name, sqnr_db=value) for name, value in values.items()), 1)
        assert sorted(each.name for each in comparison.worst_first()[:2]) == ["c", "d"]
        assert [each.name for each in comparison.worst_first()[2:]] == ["a", "b"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("reference", "other", "error", "message"),
        [
            (
                {"y": [1.0]},
                {"z": [1.0]},
                ModelError,
                "cannot compare 'y': the other model has no such output, it has 'z'",
            ),
            (
                {"y": [[1.0]]},
                {"y": [[[1.0]]]},
                ModelError,
                "'y' has shape (1,) in the reference and (1, 1) in the other",
            ),
            (
                {"y": [1.0]},
                {"y": ["a"]},
                ModelError,
                "'y' is float64 in the reference and <U1 in the other model",
            ),
        ],
    )
    def test_say_what_cannot_be_compared(
        self,
        reference: dict[str, list[object]],
        other: dict[str, list[object]],
        error: type[GraphoptError],
        message: str,
    ) -> None:
        with pytest.raises(error, match=re.escape(message)):
            compare_sessions(Playback(**reference), Playback(**other), numbers(1))  # type: ignore[arg-type]

    def test_name_a_tensor_that_the_reference_lacks(self) -> None:
        session = Playback(y=[1.0])
        with pytest.raises(ModelError, match="cannot compare 'z': the reference has no such output"):
            compare_sessions(session, session, numbers(1), outputs=["z"])  # type: ignore[arg-type]

    def test_ask_for_samples(self) -> None:
        session = Playback(y=[1.0])
        with pytest.raises(DataError, match="nothing: no samples to compare the models on"):
            compare_sessions(session, session, Samples(lambda: iter(()), "nothing"))  # type: ignore[arg-type]


def model(weight: str, dtype: str = "float") -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f"""
        <ir_version: 8, opset_import: ["" : 17]>
        linear ({dtype}[N, 2] x) => ({dtype}[N, 2] y) <{dtype}[2, 2] w = {{{weight}}}>
        {{
            h = MatMul (x, w)
            y = Relu (h)
        }}
        """
    )


SAMPLES = load_samples(
    {"x": np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)},
    [InputSpec("x", np.dtype("float32"), ("N", 2))],
)


def test_compares_models_in_onnxruntime_and_tells_the_progress() -> None:
    told = []
    comparison = compare_sessions(
        open_session(model("1, 2, 3, 4")),
        open_session(model("1, 2, 3, 4.5")),
        SAMPLES,
        progress=lambda *news: told.append(news),
    )
    x = np.concatenate([feed["x"] for feed in SAMPLES])
    expected = np.maximum(x @ np.array([[1, 2], [3, 4]], np.float32), 0)
    actual = np.maximum(x @ np.array([[1, 2], [3, 4.5]], np.float32), 0)
    (found,) = comparison.outputs
    assert comparison.samples == 5
    assert found.sqnr_db == pytest.approx(
        10 * math.log10((expected**2).sum() / ((expected - actual) ** 2).sum()), abs=1e-3
    )
    assert told == [("comparing", done, 5) for done in range(6)]


def test_compares_tensors_inside_where_both_sessions_show_them() -> None:
    sessions = [open_session(model(weight), extra_outputs=["h"]) for weight in ("1, 2, 3, 4", "1, 2, 3, 5")]
    comparison = compare_sessions(*sessions, SAMPLES, outputs=["h"])
    assert [each.name for each in comparison.outputs] == ["h"]
    assert 0 < comparison.outputs[0].sqnr_db < 30


def test_casts_the_feed_for_a_model_that_takes_another_float() -> None:
    sessions = open_session(model("1, 2, 3, 4")), open_session(model("1, 2, 3, 4", "double"))
    (found,) = compare_sessions(*sessions, SAMPLES).outputs
    assert found.sqnr_db > 120


def test_sequences_and_maps_are_compared_array_by_array():
    text = """<ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 3]>
        g (float[2,3] x) => (seq(float[1,3]) s) <float[1] k = {1}>
        {
            a = Mul (x, k)
            s = SplitToSequence <axis = 0> (a)
            m = ai.onnx.ml.ZipMap <classlabels_int64s = [0, 1, 2]> (a)
        }"""
    proto = onnx.parser.parse_model(text)
    maps = proto.graph.output.add(name="m").type.sequence_type.elem_type.map_type
    maps.key_type, maps.value_type.tensor_type.elem_type = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    half = onnx.ModelProto.FromString(proto.SerializeToString())
    half.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.array([0.5], np.float32), "k"))
    one, other = open_session(proto), open_session(half)
    samples = load_samples([{"x": np.ones((2, 3), np.float32)}], one.inputs)
    for row in compare_sessions(one, one, samples).outputs:
        assert (row.sqnr_db, row.max_error) == (math.inf, 0)
    for row in compare_sessions(one, other, samples).outputs:
        assert row.max_error == 0.5


def test_sequences_of_different_lengths_cannot_be_compared():
    one, other = ([np.zeros(2)] * count for count in (2, 3))
    with pytest.raises(ModelError, match="holds 2 arrays in the reference and 3"):
        compare._Sums("y").add_all(one, other)


@pytest.mark.parametrize(("samples", "resized", "measured"), [([0.2, 1.0], 1, True), ([0.2, 0.3], 2, False)])
def test_latency_is_that_of_a_sample_with_outputs_of_equal_sizes(
    samples: list[float], resized: int, measured: bool
) -> None:
    models = [
        onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
            g (float[4] x) => (int64[1,N] y) <float k = {{{limit}}}> {{ b = Greater(x, k) y = NonZero(b) }}""")
        for limit in (0.0, 0.5)
    ]
    found = graphopt.check(*models, data=[{"x": np.full(4, value, np.float32)} for value in samples])
    assert found.comparison.outputs[0].resized == resized
    assert (found.speedup is not None) == measured
