"""Percentiles that a sample carries, and intervals, against known values."""

from __future__ import annotations

import numpy as np
import pytest

from mmi_bench.serve.definitions import PERCENTILES, least_sample
from mmi_bench.serve.result import rate_draws
from mmi_bench.serve.sample_statistics import (
    percentile,
    quantiles,
    slope_interval,
    summary,
    t_interval,
    t_quantile,
    variation,
)


def test_a_percentile_needs_the_sample_of_mlperf() -> None:
    assert {p: least_sample(p) for p in PERCENTILES} == {50: 7, 90: 44, 95: 90, 99: 459}


@pytest.mark.parametrize(
    ("requests", "given"),
    [(6, []), (43, [50]), (44, [50, 90]), (89, [50, 90]), (90, [50, 90, 95]), (458, [50, 90, 95]),
     (459, [50, 90, 95, 99])],
)  # fmt: skip
def test_percentiles_are_blank_below_it(requests: int, given: list[int]) -> None:
    # Ten values a request do not make a larger sample: they depend on each other.
    one = summary([[float(n)] * 10 for n in range(requests)])
    assert one and [p for p, value in one.percentiles.items() if value is not None] == given
    assert one.requests == requests and one.values == 10 * requests


def test_percentiles_are_order_statistics() -> None:
    values = [float(n) for n in range(1, 501)]
    one = summary([[value] for value in reversed(values)])
    assert one and one.percentiles == {50: 250.0, 90: 450.0, 95: 475.0, 99: 495.0}
    assert (one.mean, one.least, one.greatest) == (250.5, 1.0, 500.0)
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.0 and percentile([7.0], 99) == 7.0


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        one = summary([[value] for value in draws.exponential(2.0, 100).tolist()])
        assert one
        low, high = one.intervals["mean"]
        hits += low <= 2.0 <= high
    assert 0.88 <= hits / 200 <= 0.98  # 95 % less the known deficit at 100 skewed values


def test_the_bootstrap_is_by_request_and_not_by_value() -> None:
    levels = np.random.default_rng(4).normal(10, 1, 30).tolist()
    many = summary([[level] * 100 for level in levels])
    few = summary([[level] for level in levels])
    assert many and few and many.intervals["mean"] == pytest.approx(few.intervals["mean"])


def test_nothing_gives_nothing_and_one_request_no_interval() -> None:
    assert summary([]) is None and summary([[], []]) is None
    one = summary([[2.0]])
    assert one and one.intervals == {} and one.percentiles[50] is None


def test_intervals_of_run_means_are_students() -> None:
    # Mean 3, standard deviation sqrt(2.5), t(4) = 2.776: 3 -+ 2.776 * sqrt(2.5 / 5).
    low, high = t_interval([1, 2, 3, 4, 5]) or (0, 0)
    assert (low, high) == pytest.approx((3 - 1.963, 3 + 1.963), abs=1e-3)
    assert t_interval([1.0]) is None
    assert t_quantile(40) == pytest.approx(2.0211, abs=2e-3)
    assert t_quantile(1e9) == pytest.approx(1.96, abs=1e-3)
    assert variation([9, 10, 11]) == pytest.approx(0.1) and variation([5]) is None


def test_the_interval_of_a_slope_holds_it_as_often_as_it_says() -> None:
    draws = np.random.default_rng(5)
    times, hits = np.linspace(0, 10, 50), 0
    for _ in range(400):
        low, high = slope_interval(times, 3 * times + draws.normal(0, 1, 50)) or (0, 0)
        hits += low < 3 < high
    assert 0.92 <= hits / 400 <= 0.98
    assert slope_interval([1, 1, 1], [1, 2, 3]) is None


def test_rates_have_the_resolution_of_the_requests_in_flight() -> None:
    # Groups of 4 requests that end together, every 0.25 s for 30 s.
    ends = np.repeat(np.arange(0.2, 30, 0.25), 4)
    draws = rate_draws(0.0, 30.0, ends, np.ones(len(ends)), 0.25, 4.0)
    assert draws is not None
    low, high = quantiles(draws)
    assert low < 16 < high and 0.005 < (high - low) / 16 < 0.04
    assert rate_draws(0.0, 2.0, [0.5, 1.5], [1, 1], 0.5, 1.0) is None, "too few blocks"
    assert rate_draws(0.0, 30.0, ends, np.ones(len(ends)), 0.0, 4.0) is None, "a fixed set"
