"""Fits of growth: known curves, noise, slow rounds, and verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from mmi_bench.scale.cases import DECODE, IMAGES, PREFILL, TOKENS
from mmi_bench.scale.expectations import (
    EXPECTATIONS,
    FLAT,
    LINEAR,
    MET,
    MISSED,
    UNDECIDED,
    Expectation,
    expectation,
)
from mmi_bench.scale.fit import Fit, fit

POINTS = (0, 1, 2, 4, 8, 16, 32, 49)


def noisy(y: Callable[[int], float], noise: float, rounds: int = 7) -> Fit:
    """Fit of y(x), every measurement with relative noise of its own."""
    draw = np.random.default_rng(5)
    exact = np.array([y(x) for x in POINTS])
    return fit(POINTS, exact * (1 + noise * draw.standard_normal((rounds, len(POINTS)))))


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_found(exponent: float) -> None:
    points = POINTS[1:]
    found = fit(points, [[3e-3 * x**exponent for x in points]] * 3).exponent
    assert found and found.value == pytest.approx(exponent)
    assert found.low == pytest.approx(exponent) == found.high


def test_fixed_part_and_slope_of_a_line_are_found() -> None:
    found = fit(POINTS, [[0.2 + 0.004 * x for x in POINTS]] * 2)
    assert found.fixed == pytest.approx(0.2) and found.slope == pytest.approx(0.004)
    assert found.growth and found.growth.value == pytest.approx(0.02)
    assert found.exponent and found.exponent.value < 1


def test_a_quadratic_part_shows_above_a_large_fixed_one() -> None:
    """The exponent is that of the larger points, and not of all."""
    found = fit(POINTS, [[1.0 + 0.05 * x**2 for x in POINTS]] * 2)
    assert found.exponent and found.exponent.value > 1.5


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_the_interval_holds_the_truth_and_widens_with_noise(noise: float) -> None:
    found = noisy(lambda x: 0.1 * (1 + 0.01 * x), noise, rounds=15)
    assert found.growth and found.growth.low < 0.01 < found.growth.high
    assert found.growth.low <= found.growth.value <= found.growth.high
    assert found.growth.high - found.growth.low > noise / 50


def test_a_slow_round_moves_neither_value_nor_verdict() -> None:
    rounds = np.tile([0.1 + 1e-4 * x for x in POINTS], (7, 1))
    rounds[3] *= 5
    rounds[5, 4] *= 9  # and one slow point
    found = fit(POINTS, rounds)
    assert found.growth and found.growth.value == pytest.approx(1e-3)
    assert Expectation("q", IMAGES, FLAT, 0.02, "").verdict(found) == MET


def test_what_has_no_fixed_part_has_no_growth_above_it() -> None:
    found = fit((1, 2, 4), [[1e-3 * x**2 for x in (1, 2, 4)]] * 2)
    assert found.fixed < 0 and found.growth is None
    assert Expectation("q", IMAGES, FLAT, 0.02, "").verdict(found) == MISSED


def test_noise_that_hides_the_fixed_part_leaves_finite_numbers() -> None:
    draw = np.random.default_rng(1)
    found = fit(POINTS, np.abs(draw.standard_normal((3, len(POINTS)))) + 1e-3)
    for one in (found.growth, found.exponent):
        assert one is None or all(math.isfinite(value) for value in one.to_json().values())


@pytest.mark.parametrize(
    ("kind", "limit", "slope", "noise", "verdict"),
    [
        (FLAT, 0.02, 0.001, 0.01, MET),
        (FLAT, 0.02, 0.1, 0.01, MISSED),
        (FLAT, 0.02, 0.02, 0.05, UNDECIDED),
        (LINEAR, 1.1, 0.02, 0.01, MET),
    ],
)
def test_a_verdict_needs_the_whole_interval(
    kind: str, limit: float, slope: float, noise: float, verdict: str
) -> None:
    found = noisy(lambda x: 0.1 * (1 + slope * x), noise)
    assert Expectation("q", IMAGES, kind, limit, "").verdict(found) == verdict


def test_growth_beyond_linear_is_missed() -> None:
    expected = Expectation("q", IMAGES, LINEAR, 1.1, "")
    assert expected.verdict(noisy(lambda x: 0.1 + 0.01 * x**1.5, 0.01)) == MISSED
    assert expected.verdict(noisy(lambda x: 0.1 + 0.01 * x, 0.01)) == MET


def test_limits_are_for_a_unit_of_the_axis() -> None:
    """Five percent per hundred tokens."""
    points = (16, 64, 256, 512)
    slower, faster = (fit(points, [[1 + s * x for x in points]] * 2) for s in (4e-4, 6e-4))
    expected = expectation(DECODE, TOKENS)
    assert expected and expected.said() == "flat: <= 5 % per 100 tokens"
    assert expected.verdict(slower) == MET and expected.verdict(faster) == MISSED


def test_every_expectation_is_of_one_series_and_has_a_reason() -> None:
    keys = [(one.quantity, one.axis) for one in EXPECTATIONS]
    assert len(set(keys)) == len(keys) and all(one.why for one in EXPECTATIONS)
    assert expectation(PREFILL, "weather") is None
