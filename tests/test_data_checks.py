import numpy as np
import pytest

from graphopt.data_checks import DataChecks
from graphopt.errors import DataError
from graphopt.feeds import Samples, SourcedFeed


def checked(feeds):
    checks = DataChecks(Samples(lambda: iter(feeds), "feeds", len(feeds)))
    assert [list(feed) for feed in checks.samples] == [list(feed) for feed in feeds]
    return checks


def noise(count, seed=0, name="x"):
    rng = np.random.default_rng(seed)
    return [{name: rng.standard_normal((1, 4)).astype(np.float32)} for _ in range(count)]


def test_good_data_give_no_warning():
    assert checked(noise(32)).warnings() == ()


def test_few_samples_are_warned_about():
    assert checked(noise(31)).warnings() == ("the ranges come from 31 samples; from 32 on they are steadier",)


def test_repeated_samples_are_counted():
    feeds = noise(32)
    (warning,) = checked([*feeds, feeds[3], feeds[3]]).warnings()
    assert warning == "2 of 34 samples repeat another one: they tell nothing new"


def test_constant_samples_name_the_first():
    feeds = noise(32)
    feeds[5] = SourcedFeed({"x": np.full((1, 4), 0.5, np.float32)}, "photos/black.png")
    feeds[9] = {"x": np.full((1, 4), 1.0, np.float32)}
    (warning,) = checked(feeds).warnings()
    assert warning == "2 of 32 samples hold one value throughout (first: photos/black.png): is that real data?"


def test_one_constant_or_repeated_sample_among_many_is_not_warned_about():
    feeds = noise(40)
    assert checked([*feeds, feeds[3], {"x": np.zeros((1, 4), np.float32)}]).warnings() == ()


def test_a_single_constant_sample_and_the_only_two_that_are_the_same_are_warned_about():
    zeros = {"x": np.zeros((1, 4), np.float32)}
    assert checked([zeros]).warnings()[0] == (
        "the only sample holds one value throughout (sample 0 (counted from 0)): is that real data?"
    )
    (same, _) = checked(noise(1) * 2).warnings()
    assert same == "1 of 2 samples repeats another one: it tells nothing new"


def test_a_state_of_zeros_beside_real_data_is_not_warned_about():
    feeds = [feed | {"state": np.zeros((2, 1, 8), np.float32), "rate": np.array(16000)} for feed in noise(32)]
    assert checked(feeds).warnings() == ()


@pytest.mark.parametrize(("bad", "what"), [(np.nan, "NaN"), (np.inf, "infinite values")])
def test_an_input_that_is_not_finite_is_refused(bad, what):
    feeds = noise(3)
    feeds[1]["x"][0, 2] = bad
    with pytest.raises(DataError, match=rf"input x has {what} in sample 1 \(counted from 0\)"):
        checked(feeds)


def test_a_mask_of_zero_and_minus_infinity_passes():
    mask = {"mask": np.array([[0, -np.inf]], np.float32)}
    assert checked([feed | mask for feed in noise(32)]).warnings() == ()


def test_the_digest_is_that_of_the_samples_in_any_order():
    feeds = noise(6)
    assert checked(feeds).digest == checked(feeds[::-1]).digest
    others = [checked(each).digest for each in (feeds[:5], noise(6, seed=1), noise(6, name="y"), [*feeds, feeds[0]])]
    assert len({checked(feeds).digest, *others}) == 5


def test_strings_and_empty_arrays_pass():
    feeds = [{"text": np.array([f"a{number}"], object), "none": np.zeros((0, 3), np.float32)} for number in range(32)]
    assert checked(feeds).warnings() == ()
