"""Errors, tolerances and verdicts against a float64 oracle that goes entry by entry."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mmi_deploy.errors import BundleError
from mmi_deploy.parity import (
    CONSTANT_TOLERANCES,
    EXPORT_TOLERANCES,
    PRECISION_TOLERANCES,
    Case,
    Comparison,
    Measure,
    Proof,
    Tolerance,
    compare,
    compare_outputs,
    precision_tolerance,
    worst_of,
)
from mmi_deploy.spec.graphs import GRAPHS
from mmi_deploy.targets.precision.recipes import RECIPES

MAX = Tolerance(1e-3, "a test")
RMS = Tolerance(1e-3, "a test", "rms")

FLOATS = (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)
SHAPES = ((), (1,), (7,), (3, 5), (2, 3, 4))


def entries(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    yield from itertools.product(*map(range, shape))


def oracle(got: np.ndarray, expected: np.ndarray, measure: Measure, floor: float) -> float:
    """Relative error of finite values, summed exactly."""
    pairs = [
        (abs(Fraction(float(got[i])) - Fraction(float(expected[i]))), abs(float(expected[i])))
        for i in entries(got.shape)
    ]
    if measure == "max":
        error, scale = float(max(e for e, _ in pairs)), max(s for _, s in pairs)
    else:
        error = math.sqrt(sum(e * e for e, _ in pairs) / len(pairs))
        scale = math.sqrt(sum(Fraction(s) ** 2 for _, s in pairs) / len(pairs))
    return error / (max(scale, floor) or 1.0)


@pytest.mark.parametrize("measure", ["max", "rms"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: np.dtype(dtype).name)
def test_errors_are_those_of_exact_arithmetic(
    dtype: Any, shape: tuple[int, ...], measure: Measure
) -> None:
    """Also where the widths of the two differ, as those of an engine and the portable graph do."""
    draw = np.random.default_rng(len(shape))
    for scale, floor in ((1.0, 0.0), (1e-3, 0.0), (1e-3, 0.5), (0.0, 0.0), (0.0, 1e-6)):
        expected = (scale * draw.standard_normal(shape)).astype(np.float32)
        got = (expected + 1e-2 * draw.standard_normal(shape)).astype(dtype)
        tolerance = Tolerance(1e-3, "a test", measure, floor)
        found = compare("x", got, np.asarray(expected), tolerance)
        assert found.error is not None
        assert found.relative == pytest.approx(oracle(got, expected, measure, floor), rel=1e-12)
        at = max(entries(shape), key=lambda i: abs(float(got[i]) - float(expected[i])))
        assert found.error.worst == at
        assert (found.got, found.expected) == (float(got[at]), float(expected[at]))
        each = [abs(float(got[i]) - float(expected[i])) for i in entries(shape)]
        assert found.error.max_abs == max(each)
        assert found.error.mean_abs == pytest.approx(math.fsum(each) / len(each), rel=1e-12)
        assert found.error.rms == pytest.approx(
            math.sqrt(math.fsum(e * e for e in each) / len(each)), rel=1e-12
        )


@pytest.mark.parametrize("measure", ["max", "rms"])
def test_what_would_have_passed_passes_and_anything_less_does_not(measure: Measure) -> None:
    draw = np.random.default_rng(1)
    expected = draw.standard_normal((4, 6))
    got = expected + 1e-2 * draw.standard_normal((4, 6))
    found = compare("x", got, expected, Tolerance(1e-9, "a test", measure))
    assert found.verdict == "FAIL" and not found.passed
    for factor, verdict in ((1.0, "pass"), (1 - 1e-9, "FAIL")):
        again = Tolerance(factor * found.relative, "a test", measure)
        assert compare("x", got, expected, again).verdict == verdict
    assert found.allowed == pytest.approx(
        1e-9 * (np.abs(expected).max() if measure == "max" else np.sqrt((expected**2).mean()))
    )


def test_the_two_measures_judge_a_single_wrong_entry_differently() -> None:
    """One entry of a million, off by 1 %: a fault of an export, nothing to a rounding error."""
    expected = np.ones(1_000_000, np.float32)
    got = expected.copy()
    got[123_456] = 1.01
    assert compare("x", got, expected, MAX).verdict == "FAIL"
    assert compare("x", got, expected, RMS).verdict == "pass"


def test_a_failure_says_mean_worst_values_and_what_would_pass() -> None:
    expected = np.array([[1.0, -4.0], [2.0, 0.0]])
    got = np.array([[1.0, -4.0], [2.5, 0.1]])
    assert compare("x", got, expected, MAX).describe() == (
        "mean error 0.15, worst at [1, 0]: got 2.5, expected 2; "
        "0.125 of the greatest would pass, 0.001 is allowed (a test)"
    )
    assert "0.111 of the rms would pass" in compare("x", got, expected, RMS).describe()


@pytest.mark.parametrize("tolerance", [MAX, RMS], ids=["max", "rms"])
@pytest.mark.parametrize(
    ("got", "expected", "equal"),
    [
        (math.nan, 1.0, False),
        (1.0, math.nan, False),
        (math.inf, 1.0, False),
        (1.0, -math.inf, False),
        (math.inf, -math.inf, False),
        (math.nan, math.inf, False),
        (math.nan, math.nan, True),
        (math.inf, math.inf, True),
        (-math.inf, -math.inf, True),
    ],
)
def test_what_is_not_finite_fails_unless_equal_and_asked_for(
    got: float, expected: float, equal: bool, tolerance: Tolerance
) -> None:
    some, other = np.array([3.0, got, 4.0]), np.array([3.0, expected, 4.0])
    found = compare("x", some, other, tolerance)
    assert found.verdict == "FAIL" and found.relative == math.inf
    assert found.error is not None and found.error.worst == (1,)
    kept = compare("x", some, other, tolerance, equal_nonfinite=True)
    assert kept.verdict == ("pass" if equal else "FAIL")
    if equal:  # the scale is that of what is finite
        some[2] = 4.5
        off = compare("x", some, other, MAX, equal_nonfinite=True)
        assert off.relative == 0.125 and off.error is not None and off.error.worst == (2,)


def test_squares_beyond_float64_are_an_infinite_error_without_a_warning() -> None:
    with np.errstate(all="raise"):
        found = compare("x", np.array([1e200]), np.array([0.0]), RMS)
    assert found.verdict == "FAIL" and found.relative == math.inf


@pytest.mark.parametrize(
    ("got", "expected", "flaw"),
    [
        (np.ones(3), np.ones((3, 1)), "shape [3] where [3, 1] is expected"),
        (np.ones(3), np.ones(()), "shape [3] where [] is expected"),
        (np.ones(3, np.int64), np.ones(3), "dtype int64 where float64 is expected"),
        (np.ones(3), np.ones(3, bool), "dtype float64 where bool is expected"),
        (np.ones(3, bool), np.ones(3, np.int32), "dtype bool where int32 is expected"),
        (np.ones(3, complex), np.ones(3, complex), "dtype complex128 where complex128 is expected"),
        (np.array(["a"]), np.array(["a"]), "dtype <U1 where <U1 is expected"),
    ],
)
def test_another_shape_or_kind_of_element_fails(
    got: np.ndarray, expected: np.ndarray, flaw: str
) -> None:
    """Even where numpy would stretch the one to the other, and the values are equal."""
    found = compare("x", got, expected, Tolerance(1e9, "a test"))
    assert found.verdict == "FAIL" and found.relative == math.inf and found.error is None
    assert found.flaw == found.describe() == flaw


def test_integers_are_exact_beyond_what_float64_holds() -> None:
    exact = Tolerance(0.0, "whole numbers")
    expected = np.array([5, 2**53, -(2**62)], np.int64)
    assert compare("ids", expected.copy(), expected, exact).passed
    assert compare("ids", expected[:1].astype(np.int32), expected[:1], exact).passed
    found = compare("ids", expected + np.array([0, 1, 0]), expected, exact)
    assert found.verdict == "FAIL"
    assert found.error is not None and found.error.worst == (1,) and found.error.max_abs == 1
    assert compare("flags", np.array([True, False]), np.array([True, True]), exact).relative == 1


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("tolerance", [MAX, RMS], ids=["max", "rms"])
def test_nothing_compared_is_no_pass(shape: tuple[int, ...], tolerance: Tolerance) -> None:
    empty = np.zeros(shape, np.float32)
    found = compare("x", empty, empty, tolerance)
    assert found.verdict == "not compared" and not found.passed and math.isnan(found.relative)
    assert found.describe() == "there is nothing to compare"
    assert not Case({}, found.relative, tolerance.relative).passed
    hidden = compare("x", np.ones((2, 3)), np.ones((2, 3)), tolerance, mask=np.zeros(2, bool))
    assert hidden.verdict == "not compared"
    assert compare("x", empty, np.zeros((9, 9)), tolerance).verdict == "FAIL"


def test_a_mask_hides_rows_from_error_scale_and_worst_index() -> None:
    expected = np.array([[[1.0, 2.0]], [[100.0, math.nan]], [[3.0, 4.0]]])
    got = np.array([[[1.0, 2.0]], [[-5.0, 7.0]], [[3.0, 4.4]]])
    found = compare("x", got, expected, MAX, mask=np.array([True, False, True]))
    assert found.error is not None
    assert found.error.worst == (2, 0, 1) and found.error.count == 4
    assert found.relative == pytest.approx(0.4 / 4) and found.error.mean_abs == pytest.approx(0.1)
    by_entry = compare("x", got, expected, MAX, mask=np.isfinite(expected) & (expected < 4))
    assert by_entry.passed and by_entry.error is not None and by_entry.error.count == 3


def test_of_several_outputs_the_worst_counts() -> None:
    """The case that receipts were checked with before there was one module for them."""
    wanted = {"a": np.array([3.0, 4.0]), "b": np.zeros(2), "empty": np.zeros((0, 2))}
    got = {"a": np.array([3.0, 4.5]), "b": np.array([0.0, 0.1]), "empty": np.zeros((0, 2))}
    root = math.sqrt(0.5**2 / 2) / math.sqrt((9 + 16) / 2)
    found = compare_outputs(got, wanted, RMS)
    assert found.name == "a" and found.relative == pytest.approx(max(root, 0.1 / math.sqrt(2)))
    bad = compare_outputs({**got, "b": np.array([math.nan, 4])}, wanted, RMS)
    assert bad.name == "b" and bad.relative == math.inf
    del got["b"]
    missing = compare_outputs(got, wanted, RMS)
    assert missing.verdict == "FAIL" and missing.flaw == "there is no output b"
    alone = {"empty": np.zeros((0, 2))}
    assert compare_outputs(alone, alone, RMS).verdict == "not compared"


def compared(value: float, tolerance: Tolerance = MAX) -> Comparison:
    return compare("pixels", np.array([value, 1.0]), np.ones(2), tolerance)


def test_a_proof_fails_at_its_first_wrong_case_and_knows_the_worst() -> None:
    good, bad = compared(1.0001), compared(1.25)
    passing = Proof("vae_decoder", "a test", (({"b": 1}, good), ({"b": 2}, compared(1.0))))
    passing.check("vae_decoder is wrong", "fix it")
    assert passing.passed and passing.error == pytest.approx(1e-4) and passing.worst[0] == {"b": 1}
    failing = Proof("vae_decoder", "a test", (({"b": 1}, good), ({"b": 2}, bad)))
    assert not failing.passed and failing.worst == ({"b": 2}, bad)
    assert [case.passed for case in failing.cases] == [True, False]
    assert failing.cases[1] == Case({"b": 2}, 0.25, 1e-3)
    with pytest.raises(BundleError) as raised:
        failing.check("vae_decoder is wrong", "Fix it")
    assert str(raised.value) == (
        "vae_decoder is wrong at {'b': 2}; expected a relative error of at most 0.001; got 0.25 in "
        "pixels (mean error 0.125, worst at [0]: got 1.25, expected 1; 0.25 of the greatest would "
        "pass, 0.001 is allowed (a test)). Fix it"
    )
    assert not Proof("vae_decoder", "a test", ()).passed, "nothing compared proves nothing"
    nothing = compare("pixels", np.ones(0), np.ones(0), MAX)
    for order in itertools.permutations([({"b": 1}, good), ({"b": 0}, nothing), ({"b": 1}, good)]):
        empty = Proof("vae_decoder", "a test", order)
        assert not empty.passed and empty.worst[1] is nothing and math.isnan(empty.error)
    assert worst_of([good, bad, compared(1.0)]) is bad


def test_the_worst_case_is_nearest_to_its_own_tolerance() -> None:
    """Random inputs are allowed more, so that a smaller error on recorded ones may be worse."""
    recorded, random = compared(1.0009), compared(1.004, Tolerance(5e-3, "a test"))
    proof = Proof("llm", "a test", (({"t": 1}, recorded), ({"t": 17}, random)))
    assert proof.passed and proof.worst == ({"t": 1}, recorded)
    assert proof.error == random.relative


def test_every_graph_and_recipe_has_a_tolerance_with_a_reason() -> None:
    assert set(EXPORT_TOLERANCES) == {make.__name__ for make in GRAPHS}
    assert set(PRECISION_TOLERANCES) == set(RECIPES)
    for tolerance in (*EXPORT_TOLERANCES.values(), *PRECISION_TOLERANCES.values()):
        assert 0 < tolerance.relative < 1 and tolerance.reason


@pytest.mark.parametrize(
    ("dtype", "most"), [("float32", 1e-5), ("float16", 2e-3), ("bfloat16", 2e-2)]
)
def test_tolerances_of_constants_are_absolute(dtype: str, most: float) -> None:
    """Constants of any size: small ones are not held to a share of themselves."""
    for value in (1.0, 1e-3, 0.0):
        for factor, passes in ((0.99, True), (1.01, False)):
            got = np.array([value + factor * most])
            assert compare("x", got, np.array([value]), CONSTANT_TOLERANCES[dtype]).passed == passes


def test_random_inputs_are_allowed_five_times_as_much_and_never_all() -> None:
    for precision, tolerance in PRECISION_TOLERANCES.items():
        assert precision_tolerance(precision, recorded=True) == tolerance
        allowed = precision_tolerance(precision, recorded=False).relative
        assert allowed == min(5 * tolerance.relative, 0.99)
