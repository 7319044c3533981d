"""Rules of warm-up, saturation and the client."""

from __future__ import annotations

import numpy as np

from mmi_bench.serve.steadiness import client_bound, is_over_saturated, is_rising, is_warm


def test_warm_up_ends_when_three_windows_agree_within_five_percent() -> None:
    assert not is_warm([1.0] * 14, 1) and is_warm([1.0] * 15, 1)
    assert is_warm([9.0] * 5 + [1.0] * 5 + [1.04] * 5 + [1.049] * 5, 1)
    assert not is_warm([1.0] * 5 + [1.03] * 5 + [1.06] * 5, 1), "6 % apart"
    assert not is_warm([3.0] * 5 + [2.0] * 5 + [1.0] * 5, 1)
    assert is_warm([1.0, 1.0, 1.0, 1.0, 9.0] * 3, 1), "an outlier does not move a median"


def test_windows_are_as_long_as_the_requests_in_flight() -> None:
    assert not is_warm([1.0] * 29, 10) and is_warm([1.0] * 30, 10)


def test_only_a_rise_of_both_is_over_saturation() -> None:
    draws = np.random.default_rng(1)
    times = np.linspace(0, 20, 100)
    rising = [(t, 1 + t + e) for t, e in zip(times, draws.normal(0, 0.5, 100), strict=True)]
    flat = [(t, 5 + e) for t, e in zip(times, draws.normal(0, 0.5, 100), strict=True)]
    assert is_over_saturated(rising, rising)
    assert not is_over_saturated(rising, flat) and not is_over_saturated(flat, rising)
    assert not is_over_saturated(flat, flat)
    assert not is_over_saturated(rising[:29], rising[:29]), "too early"


def test_a_slow_drift_is_not_a_rise() -> None:
    times = np.linspace(0, 20, 100).tolist()
    assert not is_rising(times, [10 + 0.1 * time for time in times])
    assert is_rising(times, [10 + 1.0 * time for time in times])


def test_a_client_is_suspected_by_its_lag_or_its_cpu() -> None:
    assert client_bound([0.001] * 100, 100.0, 5.0) is None
    assert "15.0 ms" in str(client_bound([0.0] * 98 + [0.015] * 2, 100.0, 5.0))
    assert client_bound([0.0] * 99 + [0.015], 100.0, 5.0) is None, "one in a hundred"
    # 1000 requests in 10 s: 5 % of the interval are 0.5 ms.
    assert client_bound([0.0006] * 1000, 10.0, 1.0) and not client_bound([0.0004] * 1000, 10.0, 1.0)
    assert "95 % of a core" in str(client_bound([], 10.0, 9.5))
