"""Comparison of two results, made from synthetic times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmi_bench.serve.band import Band
from mmi_bench.serve.compare import compare, parse_limit, read_result
from mmi_bench.serve.records import RequestEvent, RequestRecord
from mmi_bench.serve.reference import Check
from mmi_bench.serve.report import write_data
from mmi_bench.serve.result import Result
from mmi_bench.serve.run import Plan, Run
from mmi_deploy.cli.app import run as mmi
from mmi_deploy.errors import ConfigError, MmiError

ABOUT: dict[str, Any] = {
    "argv": ["mmi"],
    "started": "2026-01-01T00:00:00+00:00",
    "machine": {"processor": "P", "cores": 2, "memory_bytes": 8, "load_before": 0.1},
    "environment": {},
    "workload": {"name": "text", "distinct_prompts": None, "prompts": "new", "sha256": "a"},
    "load": {"kind": "closed", "concurrency": 1},
    "client": {"endpoint": "chat", "transport": "inline"},
    "server": {"url": "http://x", "model": "m", "target": "cpu", "bundle": None},
}


def result(
    factor: float = 1.0, count: int = 60, runs: int = 1, noise: float = 0.02, seed: int = 0
) -> Result:
    """Requests one after another, each of so many times its prompt's seconds: prompts differ by a
    factor of ten among themselves."""
    draws = np.random.default_rng(seed)
    found = Result(json.loads(json.dumps(ABOUT)), Plan(), (), complete=True)
    for number in range(runs):
        run, now = Run(number, complete=True, steady=True, in_flight=[(0.0, 1.0)]), 0.0
        for index in range(count):
            prompt = number * 1000 + index
            seconds = float(np.random.default_rng(prompt).uniform(0.1, 1.0))
            seconds *= factor * (1 + draws.normal(0, noise))
            record = RequestRecord(index, f"text-{prompt}", now, outcome="done", tokens=2)
            record.text_hash, record.picture_hashes = f"{prompt}", []
            for share, kind in ((0.5, "text"), (0.9, "text"), (1.0, "end")):
                event = RequestEvent(now + share * seconds, kind, tokens=1)  # type: ignore[arg-type]
                record.events.append(event)
            now += seconds
            run.records.append(record)
        run.end = now
        found.add(run)
    return found


def saved(one: Result, folder: Path) -> Path:
    folder.mkdir()
    write_data(one, folder)
    return folder


def verdicts(a: Path, b: Path, limit: float | None) -> dict[str, str]:
    return {c.key: c.verdict(limit) for c in compare(read_result(a), read_result(b))}


def test_a_change_of_ten_percent_is_seen_behind_prompts_that_differ_tenfold(
    tmp_path: Path,
) -> None:
    a = saved(result(seed=1), tmp_path / "a")
    b = saved(result(1.1, seed=2), tmp_path / "b")
    changes = {change.key: change for change in compare(read_result(a), read_result(b))}
    end = changes["end_to_end"]
    assert end.pairs == 60 and end.slower == pytest.approx(0.10, abs=0.01)
    assert end.interval and 0.08 < end.interval[0] < 0.10 < end.interval[1] < 0.12
    assert end.verdict(0.05) == "WORSE" and end.verdict(0.12) == "slower within the limit"
    assert changes["text_gap"].slower == pytest.approx(0.10, abs=0.02)
    rate = changes["requests_per_second"]
    assert rate.slower == pytest.approx(0.10, abs=0.01), "a lower rate is slower"
    assert {"first_token", "first_output", "time_per_token", "tokens_per_second"} <= changes.keys()
    assert set(verdicts(b, a, 0.0).values()) <= {"faster", "no difference"}


def test_it_fails_only_if_the_whole_interval_lies_beyond_the_limit(tmp_path: Path) -> None:
    a = saved(result(seed=1, noise=0.3, count=40), tmp_path / "a")
    b = saved(result(1.08, seed=2, noise=0.3, count=40), tmp_path / "b")
    changes = {change.key: change for change in compare(read_result(a), read_result(b))}
    low, high = changes["end_to_end"].interval or (0, 0)
    assert low < 0.05 < high and changes["end_to_end"].verdict(0.05) != "WORSE"


def test_equal_servers_are_hardly_ever_called_worse(tmp_path: Path) -> None:
    wrong = 0
    for number in range(6):
        pair = [result(seed=2 * number + n, noise=0.2, count=30) for n in (0, 1)]
        a, b = (saved(one, tmp_path / f"{number}-{n}") for n, one in enumerate(pair))
        wrong += verdicts(a, b, 0.05)["end_to_end"] == "WORSE"
    assert wrong <= 1


def test_five_runs_on_both_sides_are_judged_by_their_means(tmp_path: Path) -> None:
    """Noise that all requests of a run share is seen between runs alone."""
    a = saved(result(runs=5, seed=1, count=20), tmp_path / "a")
    b = saved(result(1.2, runs=5, seed=2, count=20), tmp_path / "b")
    changes = {change.key: change for change in compare(read_result(a), read_result(b))}
    for key in ("end_to_end", "requests_per_second"):
        low, high = changes[key].interval or (0, 0)
        assert low < changes[key].slower < high
        assert changes[key].slower == pytest.approx(0.2, abs=0.01)
    # Runs have prompts of their own, so that their means differ by much.
    assert high - low > 0.1


def change(name: str) -> Any:
    """A result that differs from the others in one thing."""
    one = result(seed=3)
    about = one.about
    match name:
        case "workload: sha256":
            about["workload"]["sha256"] = "b"
        case "load: concurrency":
            about["load"]["concurrency"] = 2
        case "machine: processor":
            about["machine"]["processor"] = "Q"
        case "precision":
            about["server"]["target"] = "cpu-int8"
        case "client: endpoint":
            about["client"]["endpoint"] = "responses"
        case "text of prompt text-7":
            one.runs[0].run.records[7].text_hash = "other"
        case "number of pictures of prompt text-7":
            one.runs[0].run.records[7].picture_hashes = ["x"]
        case "incomplete":
            one.complete = False
        case "INVALID":
            one.check = Check(1, 20, "r", Band(), 9, ["request 3"])
        case "share no prompt":
            for record in one.records:
                record.prompt = f"other-{record.prompt}"
    return one


@pytest.mark.parametrize(
    "name",
    ["workload: sha256", "load: concurrency", "machine: processor", "precision", "INVALID",
     "client: endpoint", "text of prompt text-7", "number of pictures of prompt text-7",
     "incomplete", "share no prompt"],
)  # fmt: skip
def test_unlike_results_are_refused(name: str, tmp_path: Path) -> None:
    a = saved(result(seed=1), tmp_path / "a")
    b = saved(change(name), tmp_path / "b")
    with pytest.raises(ConfigError, match=name):
        compare(read_result(a), read_result(b))


def test_runs_that_vary_by_more_than_a_fifth_are_refused(tmp_path: Path) -> None:
    wild = result(runs=5, seed=1)
    for number, one in enumerate(wild.runs):
        for summary in one.measures.values():
            object.__setattr__(summary, "mean", summary.mean * (1 + number))
    a, b = saved(wild, tmp_path / "a"), saved(result(runs=5, seed=2), tmp_path / "b")
    with pytest.raises(ConfigError, match="vary too much"):
        compare(read_result(a), read_result(b))


def test_pictures_are_compared_by_hash_and_thumbnail(tmp_path: Path) -> None:
    """A level of difference is within the band; five are not; without thumbnails none is seen."""
    for levels, refused in ((1, False), (5, True)):
        pair = []
        for side in (0, 1):
            one = result(seed=side)
            record = one.runs[0].run.records[0]
            record.picture_hashes = [f"{side}"]
            folder = saved(one, tmp_path / f"{levels}-{side}")
            lines = (folder / "requests.jsonl").read_text().splitlines()
            line = json.loads(lines[0])
            line["thumbnails"] = [bytes([100 + levels * side] * 192).hex()]
            text = "\n".join([json.dumps(line), *lines[1:]])
            (folder / "requests.jsonl").write_text(f"{text}\n")
            pair.append(folder)
        if refused:
            with pytest.raises(ConfigError, match="the picture of prompt text-0 differs"):
                verdicts(pair[0], pair[1], None)
        else:
            verdicts(pair[0], pair[1], None)


@pytest.mark.parametrize(("text", "value"), [("5%", 0.05), ("0.1", 0.1), (" 0 %", 0.0)])
def test_limits_are_shares(text: str, value: float) -> None:
    assert parse_limit(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "five", "-1%", "nan", "inf", "5%%"])
def test_malformed_limits_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--fail-above"):
        parse_limit(text)


def test_what_is_no_result_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MmiError, match="cannot read .*mmi bench serve -o"):
        read_result(tmp_path)
    for text in ("{}", "[]", "{", '{"format": 1}', '{"format": 9}'):
        (tmp_path / "result.json").write_text(text)
        (tmp_path / "requests.jsonl").write_text("")
        with pytest.raises(MmiError, match="is not a result|another version"):
            read_result(tmp_path)
    good = saved(result(count=8), tmp_path / "good")
    (good / "requests.jsonl").write_text('{"number": 0}\n')
    with pytest.raises(MmiError, match="is not a result"):
        read_result(good)


def test_the_command_prints_a_table_and_fails_where_it_must(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = saved(result(seed=1), tmp_path / "a")
    b = saved(result(1.1, seed=2), tmp_path / "b")
    assert mmi(["bench", "compare", str(a), str(b)]) == 0
    assert "end to end, ms" in (shown := capsys.readouterr().out) and "+10" in shown
    assert mmi(["bench", "compare", str(a), str(b / "result.json"), "--fail-above", "5%"]) == 4
    assert "WORSE" in capsys.readouterr().out
    assert mmi(["bench", "compare", str(a), str(b), "--fail-above", "20%", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["limit"] == pytest.approx(0.2)
    assert {one["measure"] for one in found["changes"]} >= {"end_to_end", "requests_per_second"}
    assert mmi(["bench", "compare", str(a), str(tmp_path)]) == 2
