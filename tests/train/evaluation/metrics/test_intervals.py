"""Bootstrap intervals against the normal approximation, and paired comparisons."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmi_train.evaluation.metrics.intervals import Measure, difference, interval, mean_of


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def test_the_interval_of_a_share_is_that_of_the_binomial() -> None:
    measure = mean_of("accuracy", [1.0] * 120 + [0.0] * 280)
    low, high = interval(measure)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400) * 100
    assert measure.total() == pytest.approx(30)
    assert (low, high) == pytest.approx((30 - half, 30 + half), abs=0.6)


def test_the_interval_of_real_values_is_that_of_the_normal_approximation(
    rng: np.random.Generator,
) -> None:
    values = rng.normal(0.5, 0.2, 900)
    half = 1.96 * values.std() / math.sqrt(900) * 100
    low, high = interval(mean_of("score", values.tolist()))
    middle = values.mean() * 100
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=0.15)


def test_an_interval_is_the_same_each_time_and_holds_one_value_of_equal_questions() -> None:
    measure = mean_of("accuracy", [0.0, 1.0, 0.3, 0.9])
    assert interval(measure) == interval(measure)
    assert interval(mean_of("accuracy", [0.6] * 5)) == pytest.approx((60, 60))


def test_questions_without_a_value_are_left_out() -> None:
    assert mean_of("NDCG", [1.0, None, 0.0]).total() == pytest.approx(50)
    assert math.isnan(mean_of("NDCG", [None]).total())


def test_a_measure_need_not_be_a_mean() -> None:
    """A ratio of sums, as corpus BLEU is."""
    terms = np.array([[1.0, 2.0], [3.0, 4.0], [0.0, 10.0]])
    ratio = Measure("ratio", terms, lambda sums: sums[..., 0] / sums[..., 1])
    low, high = interval(ratio)
    assert ratio.total() == 4 / 16 and low == 0 and high == 0.75


def test_a_paired_difference_finds_what_two_intervals_hide() -> None:
    """Both files are right in about half of the questions; one is right in ten more of them."""
    before = [0.0, 1.0] * 200
    after = [1.0] * 20 + before[20:]
    measures = mean_of("accuracy", after), mean_of("accuracy", before)
    assert interval(measures[0])[0] < interval(measures[1])[1]  # they overlap
    found = difference(*measures)
    assert found.value == pytest.approx(2.5) and found.verdict == "higher"
    half = 1.96 * math.sqrt(0.025 * 0.975 / 400) * 100
    assert (found.low, found.high) == pytest.approx((2.5 - half, 2.5 + half), abs=0.3)
    assert difference(*reversed(measures)).verdict == "lower"


def test_a_difference_by_chance_is_not_told_apart(rng: np.random.Generator) -> None:
    one, other = (mean_of("accuracy", rng.integers(0, 2, 300).tolist()) for _ in range(2))
    assert difference(one, other).verdict == "not told apart"
