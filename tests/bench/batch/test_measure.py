"""The batch benchmark on the fake model: both sides, equal outputs, figures and tables."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from deploy.runtime.fake_model import fake_runtime
from mmi_bench.batch import measure, report, sample
from mmi_bench.batch.gains import bound, shares
from mmi_bench.batch.latency import p99
from mmi_bench.batch.measure import BatchResult, Cell
from mmi_bench.batch.sample import Record, Runs, Sample, check_equal
from mmi_bench.batch.workloads import WORKLOADS
from mmi_bench.compare import cases
from mmi_deploy.errors import ConfigError, MmiError
from mmi_deploy.runtime.events import Finished, ImageDone, ImageStarted, TextDelta
from mmi_deploy.runtime.timings import Timing, Timings

PICTURE = np.full((2, 2, 3), 7, np.uint8)


@pytest.fixture(scope="module")
def result() -> BatchResult:
    """One quick round of everything, one and two at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "_WORDS", ("w7",))
        return measure.measure(fake_runtime()[0], WORKLOADS, (2, 1), 1, quick=True)


def test_every_workload_is_measured_on_both_sides(result: BatchResult) -> None:
    assert [(cell.workload, cell.rows) for cell in result.cells] == [
        (name, rows) for name in WORKLOADS for rows in (1, 2)
    ]
    for cell in result.cells:
        for single, together in zip(cell.single, cell.together, strict=True):
            assert single.tokens == together.tokens and single.pictures == together.pictures
            assert together.runs is not None and single.runs is None
    two = result.cell("text", 2)
    assert two and two.together[0].tokens == 2 * 16 and two.together[0].pictures == 0
    assert two.runs.rows["decode"] == 2 * 15  # the first token comes from the prefill
    assert two.runs.mean_batch("decode") > 1.5
    drawn = result.cell("pictures", 2)
    assert drawn and drawn.together[0].pictures == 2 and drawn.runs.rows["denoise"] == 2 * 4
    assert drawn.last_token is None and not drawn.together[0].gaps


def test_bounds_follow_from_shares_and_gains(result: BatchResult) -> None:
    assert sum(result.shares.values()) == pytest.approx(1, abs=0.05)
    assert {"encode", "prefill", "decode", "denoise", "vae", "python"} <= result.shares.keys()
    one, two = result.bounds
    assert (one.rows, two.rows) == (1, 2)
    assert one.bound == pytest.approx(1, rel=0.05)
    whole = result.cell("documents", 2)
    assert whole and two.bound * two.reached == pytest.approx(whole.speedup.median)


def test_a_second_turn_encodes_nothing_again(result: BatchResult) -> None:
    assert result.second and result.second.encodes == 0
    assert result.second.cached > 0.5 * result.second.given
    assert result.beside and len(result.beside.gaps) == 15


def test_the_tables_and_the_json_have_all_of_it(result: BatchResult) -> None:
    about = {
        "model": "fake",
        "threads": 2,
        "target": "cpu",
        "machine": {"processor": "a processor", "load_before": 0.5},
    }
    whole = replace(result, about={**about, **result.about})
    out = io.StringIO()
    report.print_report(Console(file=out, width=200), whole)
    text = out.getvalue()
    for words in ("times as fast", "first token", "of the bound", "second turn", "0 encoder runs"):
        assert words in text
    assert "Tokens and PNG bytes of every document equal" in text
    read = json.loads(json.dumps(whole.to_json()))
    assert len(read["cells"]) == 6 and read["second_turn"]["encodes"] == 0


def test_a_document_that_differs_from_its_single_run_ends_the_benchmark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cases, "_WORDS", ("w7",))
    real = sample.at_once

    def wrong(*arguments: object) -> Sample:
        found = real(*arguments)  # type: ignore[arg-type]
        if len(found.records) == 2:
            found.records[1].token_ids[-1] += 1
        return found

    monkeypatch.setattr(measure, "at_once", wrong)
    with pytest.raises(MmiError, match="document 2 of 2 at once differs .* in its token ids"):
        measure.measure(fake_runtime()[0], ("text",), (1, 2), 1, quick=True)


def record(text: str = "a", *pictures: np.ndarray) -> Record:
    return Record(0.0, text=text, tokens=1, pictures=list(pictures))


@pytest.mark.parametrize(
    ("other", "part"),
    [
        (record("b", PICTURE), "text"),
        (record("a"), "number of pictures"),
        (record("a", PICTURE + 1), "picture 1"),
        (replace(record("a", PICTURE), tokens=2), "tokens"),
    ],
)
def test_each_part_of_an_output_is_compared(other: Record, part: str) -> None:
    same = record("a", PICTURE)
    check_equal("text", Sample(1, 1, [same]), Sample(1, 1, [record("a", PICTURE.copy())]))
    with pytest.raises(MmiError, match=f"in its {part}"):
        check_equal("text", Sample(1, 1, [same]), Sample(1, 1, [other]))


def test_a_gap_never_contains_a_picture() -> None:
    timings = Timings([Timing("decode", 0.5, 1), Timing("decode", 0.25, 1)])
    found = Record(10.0)
    for now, event in (
        (12.0, TextDelta("a")),
        (13.0, TextDelta("b")),
        (14.0, ImageStarted(0, 4)),
        (40.0, ImageDone(0, PICTURE)),
        (43.0, TextDelta("c")),
        (45.0, TextDelta("d")),
        (46.0, Finished("max_tokens", 4, 1, timings)),
    ):
        found.add(event, now)
    assert found.gaps == [1.0, 2.0] and found.first_token == 2.0 and found.seconds == 36.0
    assert found.stages == {"decode": (0.75, 2)}


def test_a_stage_bounds_the_whole_by_its_share() -> None:
    stages = {"decode": (2.0, 4), "denoise": (5.0, 5)}
    share = shares([Sample(10.0, 1.0, [replace(record(), stages=stages)])])
    assert share == {"decode": 0.2, "denoise": 0.5, "python": pytest.approx(0.3)}
    assert bound(share, {"decode": 4.0, "denoise": 2.0}) == pytest.approx(1 / 0.6)


def test_speedups_are_paired_and_the_last_document_waits() -> None:
    def of(seconds: float, *first: float) -> Sample:
        records = [Record(0.0, first_token=one) for one in first]
        return Sample(seconds, seconds / 2, records)

    cell = Cell("text", 2, [of(4, 1, 8), of(8, 2, 16)], [of(2, 1, 2), of(4, 4, 2)])
    assert cell.speedup.median == 2 and cell.speedup.least == 2
    assert cell.last_token and cell.last_token.median == 0.25


def test_runs_are_summed_over_measurements() -> None:
    one = Runs({"decode": 2}, {"decode": 6}, {"decode": 0.5})
    other = Runs({"decode": 1, "vae": 1}, {"decode": 4, "vae": 3}, {"decode": 0.25, "vae": 1.0})
    total = Runs.total([one, other])
    assert total.mean_batch("decode") == 10 / 3 and total.mean_batch("vae") == 3
    assert total.seconds == {"decode": 0.75, "vae": 1.0} and total.mean_batch("denoise") is None


def test_percentiles_want_enough_samples() -> None:
    assert p99([1.0] * 458) is None and p99([1.0] * 459) == 1.0


@pytest.mark.parametrize("rows", [(0,), (4, 65)])
def test_rows_out_of_range_are_refused(rows: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="--rows is out of range"):
        measure.measure(fake_runtime()[0], ("text",), rows, 1)
