"""Progress in a log: a line for each stage, few while it lasts; and a bar in a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mmi_deploy.system.progress import LogLines, StageTimer, count_of, duration, shown


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(clock: Clock, patience: float = 0.0) -> tuple[LogLines, list[str]]:
    said: list[str] = []
    return LogLines(said.append, patience, clock), said


def test_a_stage_is_said_when_it_begins_and_then_every_few_seconds() -> None:
    clock = Clock()
    tell, said = lines_of(clock)
    tell("loading")
    for step in range(121):  # a minute, two calls a second
        tell("measuring", step, 120, detail=f"case {step % 4}")
        clock.now += 0.5
    tell("writing")
    assert said[:3] == [
        "loading",
        "measuring (0 of 120 done, case 0)",
        "measuring (10 of 120 done, 5 s, about 55 s left, case 2)",
    ]
    assert len(said) == 2 + 12 + 1 and said[-1] == "writing (60 s)"


def test_hours_of_work_make_a_line_a_minute_at_most_and_never_a_flood() -> None:
    clock = Clock()
    tell, said = lines_of(clock)
    for step in range(3 * 3600):
        tell("training", step, 3 * 3600)
        clock.now += 1
    assert 180 <= len(said) <= 260
    assert said[-1].endswith("s left)") and "about 1.5 h left" in " ".join(said)


def test_a_resumed_stage_is_timed_from_where_it_went_on() -> None:
    clock = Clock()
    tell, said = lines_of(clock)
    tell("training", 900, 1000)
    clock.now += 10
    tell("training", 910, 1000)
    assert said[-1] == "training (910 of 1000 done, 10 s, about 2 min left)"


def test_patience_keeps_a_log_free_of_what_is_soon_done() -> None:
    clock = Clock()
    tell, said = lines_of(clock, patience=5)
    tell("hashing a", 1, 2)
    clock.now += 4
    tell("hashing b", 1, 2)
    assert said == []
    clock.now += 2
    tell("hashing b", 2, 2, unit="bytes")
    assert said == ["hashing b (0.0 of 0.0 kB, 6 s)"]


@pytest.mark.parametrize(
    ("done", "total", "unit", "expected"),
    [
        (3, 14, "steps", "3 of 14 done"),
        (3, 0, "steps", ""),
        (1_200_000_000, 30_000_000_000, "bytes", "1.2 of 30.0 GB"),
        (500_000, 2_000_000, "bytes", "0.5 of 2.0 MB"),
        (10, 100, "bytes", "0.0 of 0.1 kB"),
    ],
)
def test_counts(done: int, total: int, unit: str, expected: str) -> None:
    assert count_of(done, total, unit) == expected  # type: ignore[arg-type]


def test_durations() -> None:
    assert [duration(s) for s in (4.4, 89, 91, 5399, 5401)] == ["4 s", "89 s", "2 min", "90 min",
                                                                "1.5 h"]  # fmt: skip


def test_a_terminal_gets_a_bar_that_goes_and_a_log_gets_lines() -> None:
    for terminal in (True, False):
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=terminal, width=100, markup=False)
        with shown(console, "starting") as progress:
            progress("proving [llm]", 3, 14, detail="0.8 GB of memory")
        text = screen.getvalue()
        assert "proving [llm]" in text and "3 of 14" in text and "0.8 GB of memory" in text
        assert ("\x1b[" in text) == terminal
        if not terminal:
            assert text == "starting\nproving [llm] (3 of 14 done, 0.8 GB of memory)\n"


def test_a_timer_tells_its_stages_and_keeps_them() -> None:
    told: list[tuple[str, int, int, str]] = []
    timer = StageTimer(lambda what, done, of, *, detail, unit="": told.append(
        (what, done, of, detail)), total=2)  # fmt: skip
    timer.begin("exporting llm", 0, "graph 1 of 1")
    timer.begin("writing", 1)
    timer.within("hashing x", 2 * 10**9, 4 * 10**9, unit="bytes")
    timer.end()
    assert [stage.what for stage in timer.stages] == ["exporting llm", "writing"]
    assert all(stage.seconds >= 0 and stage.peak_bytes > 10**6 for stage in timer.stages)
    assert told[0][:3] == ("exporting llm", 0, 2) and told[0][3].startswith("graph 1 of 1, ")
    assert told[2][:3] == ("writing", 1, 2) and "hashing x 2.0 of 4.0 GB" in told[2][3]
