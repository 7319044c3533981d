"""Loads: arrival times and their refusals."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmi_bench.serve.load import Load, load_of, read_trace
from mmi_deploy.errors import ConfigError


def times(load: Load, count: int, ramp_up: bool = False, part: int = 0) -> Any:
    return np.array(list(islice(load.due_times(ramp_up, part), count)))


@pytest.mark.parametrize(("burstiness", "deviation"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_gamma_has_the_rate_and_the_burstiness_of_vllm(burstiness: float, deviation: float) -> None:
    """Intervals have the mean 1 / rate and the deviation 1 / (rate sqrt(burstiness))."""
    intervals = np.diff(times(Load("gamma", rate=5.0, burstiness=burstiness), 20_000))
    assert intervals.mean() == pytest.approx(0.2, rel=0.05)
    assert intervals.std() / intervals.mean() == pytest.approx(deviation, rel=0.05)


def test_arrivals_are_fixed_by_the_seed_and_differ_between_runs() -> None:
    one, other = Load("poisson", rate=2.0, seed=1), Load("poisson", rate=2.0, seed=2)
    assert (times(one, 50) == times(one, 50)).all()
    assert (times(one, 50) != times(other, 50)).any()
    assert (times(one, 50, part=1) != times(one, 50, part=2)).any()


def test_constant_arrivals_are_even() -> None:
    assert times(Load("constant", rate=4.0), 5) == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])


def test_the_ramp_reaches_the_rate_and_no_more() -> None:
    """In a ramp of 10 s to 4/s a request is due at sqrt(2 * 10 * n / 4); 20 fall into it."""
    ramped = times(Load("constant", rate=4.0, ramp_up=10.0), 40, ramp_up=True)
    assert ramped[5] == pytest.approx(np.sqrt(25.0)) and ramped[20] == pytest.approx(10.0)
    assert np.diff(ramped[20:]) == pytest.approx(0.25)
    assert times(Load("constant", rate=4.0, ramp_up=10.0), 3) == pytest.approx([0, 0.25, 0.5])


def test_a_trace_is_read_in_seconds_or_milliseconds(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"time": 2.0}\n\n2.5\n{"timestamp": 4000, "input_length": 5}\n')
    load = load_of(**{**OPTIONS, "trace": path})
    assert load.times == (0.0, 0.5, 2.0) and list(load.due_times(False)) == [0.0, 0.5, 2.0]
    assert load.describe() == {"kind": "trace", "requests": 3, "seconds": 2.0}


@pytest.mark.parametrize("text", ["", "x", "2\n1", "NaN", "Infinity", '{"at": 1}', "-1", "[]"])
def test_a_trace_that_is_not_understood_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text(text)
    with pytest.raises(ConfigError, match="arrival time"):
        read_trace(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_trace(tmp_path / "absent")


OPTIONS: dict[str, Any] = {
    "concurrency": None,
    "rate": None,
    "burstiness": None,
    "constant": False,
    "offline": False,
    "trace": None,
    "ramp_up": 0.0,
    "seed": 0,
}


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({}, "closed"),
        ({"concurrency": 3}, "closed"),
        ({"rate": 2.0}, "poisson"),
        ({"rate": 2.0, "burstiness": 1.0}, "poisson"),
        ({"rate": 2.0, "burstiness": 0.5}, "gamma"),
        ({"rate": 2.0, "constant": True}, "constant"),
        ({"offline": True}, "offline"),
    ],
)
def test_options_name_a_load(given: dict[str, Any], kind: str) -> None:
    assert load_of(**{**OPTIONS, **given}).kind == kind


@pytest.mark.parametrize(
    "given",
    [
        {"rate": 2.0, "concurrency": 3},
        {"offline": True, "rate": 1.0},
        {"burstiness": 0.5},
        {"constant": True},
        {"rate": 1.0, "constant": True, "burstiness": 2.0},
        {"rate": 0.0},
        {"rate": -1.0},
        {"rate": 1.0, "burstiness": 0.0},
        {"rate": float("nan")},
    ],
)
def test_loads_that_contradict_themselves_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        load_of(**{**OPTIONS, **given})
