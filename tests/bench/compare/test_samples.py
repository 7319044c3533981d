"""Latencies of samples, measured on a fake clock."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from mmi_bench.compare import samples
from mmi_bench.compare.samples import take
from mmi_bench.statistics import Statistics, ratios
from mmi_deploy.runtime.events import (
    Event,
    Finished,
    ImageDone,
    ImageProgress,
    ImageStarted,
    TextDelta,
)
from mmi_deploy.runtime.timings import Timing, Timings

PICTURE = np.full((2, 2, 3), 7, np.uint8)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that shows the number in it."""
    now = [100.0]
    monkeypatch.setattr(samples.time, "perf_counter", lambda: now[0])
    return now


def story(clock: list[float]) -> Iterator[Event]:
    """Two turns of text with a picture between; each event with the seconds that it took."""
    timings = Timings([Timing("decode", 0.5, 1), Timing("decode", 0.25, 1), Timing("vae", 2.0, 1)])
    for seconds, event in (
        (5.0, TextDelta("a")),
        (1.0, TextDelta(" b")),
        (2.0, TextDelta(" c")),
        (9.0, ImageStarted(0, 3)),
        (30.0, ImageProgress(0, 1, 3)),
        (4.0, ImageProgress(0, 2, 3)),
        (6.0, ImageProgress(0, 3, 3)),
        (11.0, ImageDone(0, PICTURE)),
        (13.0, TextDelta("d")),
        (3.0, TextDelta(" e")),
        (0.5, Finished("max_tokens", 5, 1, timings)),
    ):
        clock[0] += seconds
        yield event


def test_each_time_is_taken_between_the_events_that_it_names(clock: list[float]) -> None:
    sample, output = take(story(clock))
    assert sample.seconds == 84.5
    assert sample.first_token == 5.0
    assert sample.token_gaps == [1.0, 2.0, 3.0]  # not the 13 seconds after a picture
    assert sample.step_gaps == [4.0, 6.0]  # not the 30 that the condition takes part in
    assert (sample.per_token, sample.per_step) == (2.0, 5.0)
    assert sample.stages == {"decode": [0.5, 0.25], "vae": [2.0]}
    assert output.text == "a b cd e"
    assert np.array_equal(output.pictures, [PICTURE])


def test_cpu_time_is_read_in_place_of_the_clock(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All measures but the stages; here the process gets a quarter of a core."""
    monkeypatch.setattr(samples.time, "process_time", lambda: clock[0] / 4)
    sample, _ = take(story(clock), "cpu")
    assert (sample.seconds, sample.first_token) == (84.5 / 4, 1.25)
    assert (sample.per_token, sample.per_step) == (0.5, 1.25)
    assert sample.stages["vae"] == [2.0]


def test_statistics_are_the_median_with_quartiles_and_extremes() -> None:
    assert Statistics.of([4.0, 1.0, 2.0, 3.0, 100.0]) == Statistics(3.0, 2.0, 4.0, 1.0, 100.0)


def test_ratios_are_of_neighbours_not_of_medians() -> None:
    # The machine was twice as slow in the second round; the ratio does not see it.
    assert ratios([10.0, 20.0, 10.0], [2.0, 4.0, 2.0]) == Statistics(5.0, 5.0, 5.0, 5.0, 5.0)
