"""Runs of the benchmark against the mock server, whose known sleeps give known numbers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.serve.mock_server import Mock, running
from mmi_bench.serve.client import Client
from mmi_bench.serve.load import Load
from mmi_bench.serve.records import RequestRecord
from mmi_bench.serve.reference import sequential
from mmi_bench.serve.result import Result
from mmi_bench.serve.run import Measurement, Plan, Run
from mmi_bench.serve.session import Server, Session, Settings, environment
from mmi_bench.serve.wire import Wire
from mmi_bench.serve.workloads import open_workload
from mmi_deploy.errors import MmiError

pytestmark = pytest.mark.timing

QUICK = Plan(requests=8, min_seconds=0.5, max_seconds=6.0, warm_up=0.0, drain=2.0, check_every=1)

# Sleeps end late on a machine that is busy: seconds for a wait, and for each of the many in a row.
SLACK = 0.030
SLACK_EACH = 0.002


def session(
    mock: Mock, load: Load, plan: Plan = QUICK, names: tuple[str, ...] = ("story",), **more: Any
) -> Result:
    """A session over the mock server."""
    settings = Settings(open_workload(names, 0, 16, None), load, plan, **more)
    return Session(Server(url=mock.url), settings).run()


@pytest.fixture
def mock() -> Iterator[Mock]:
    with running(Mock()) as found:
        yield found


def median(result: Result, key: str) -> float:
    value = result.measures[key].percentiles[50]
    assert value is not None, f"{key} has {result.measures[key].requests} requests"
    return value


@pytest.mark.parametrize("endpoint", ["chat", "responses"])
@pytest.mark.parametrize("piece", [None, 61])
def test_known_sleeps_give_known_latencies(endpoint: str, piece: int | None) -> None:
    with running(Mock(first=0.05, gap=0.01, step=0.02, piece=piece)) as mock:
        wire = Wire(endpoint=endpoint)  # type: ignore[arg-type]
        result = session(mock, Load("closed", 2), replace(QUICK, check_every=4), wire=wire)
    expected = {
        "first_token": 0.05,
        "first_output": 0.05,
        "first_image": 0.05 + 7 * 0.01 + 3 * 0.02,
        "text_gap": 0.01,
        "picture_stall": 3 * 0.02 + 0.01,
        "time_per_token": 3 * 7 * 0.01 / (24 - 1 - 2),
        "image_interval": 8 * 0.01 + 3 * 0.02,
        "drawing": 3 * 0.02,
        "step": 0.02,
        "end_to_end": 0.05 + 23 * 0.01 + 9 * 0.02,
    }
    if endpoint == "responses":
        expected["first_preview"] = 0.05 + 7 * 0.01 + 0.02
    once = {"first_token", "first_output", "first_image", "first_preview", "end_to_end"}
    sleeps = {"end_to_end": 1 + 23 + 9, "image_interval": 8 + 3, "first_image": 1 + 7 + 3}
    for key, seconds in expected.items():
        # Of a value in each request the least: the machine may be busy.
        found = result.measures[key].least if key in once else median(result, key)
        slack = SLACK + SLACK_EACH * sleeps.get(key, 0)
        assert 0.9 * seconds - 0.003 <= found <= seconds + slack, key
    assert result.complete and result.valid
    assert all(record.tokens == 24 and record.images == 3 for record in result.runs[0].run.ended)
    # Two at once, each of 0.46 seconds or more.
    assert 2.0 <= result.rates["requests_per_second"].value <= 2 / 0.46 + 2 / 0.5
    assert mock.peak == 2
    assert {body["model"] for body in mock.bodies} == {"mock"}


def test_events_have_the_times_at_which_the_server_wrote_them(mock: Mock) -> None:
    """Server and client are in one process, and read one clock."""
    lags = []

    async def measure() -> None:
        async with Client(mock.url) as client:
            origin = time.perf_counter() - client.now()
            for number in range(3):
                prompt = open_workload(["story"], 0, 16, None).prompt(number)
                record = RequestRecord(number, prompt.id, 0.0)
                body = Wire("m").body(prompt.document, prompt.options)
                await client.generate(record, "chat", body, keep=False)
                assert record.outcome == "done", record.error
                times = [event.time + origin for event in record.events[:-1]]
                lags.extend(b - a for a, b in zip(mock.writes[number], times, strict=True))

    asyncio.run(measure())
    assert min(lags) >= 0 and sorted(lags)[len(lags) // 2] < 0.005 and len(lags) == 3 * 39


@pytest.mark.parametrize("transport", ["chunked", "url"])
def test_pictures_of_every_transport_are_whole(transport: str, mock: Mock) -> None:
    result = session(mock, Load("closed", 2), wire=Wire(transport=transport))  # type: ignore[arg-type]
    assert result.check and result.check.valid and result.check.compared >= 8
    for record in result.records:
        if record.outcome == "done":
            assert record.images == 3 and len(set(record.picture_hashes)) == 3
            assert all(record.picture_hashes)


def test_requests_in_flight_at_the_end_are_cut_and_not_dropped(mock: Mock) -> None:
    result = session(mock, Load("closed", 4), names=("story", "caption", "text-to-image"))
    run = result.runs[0].run
    counts = run.counts()
    assert run.cut and counts["cut"] == len(run.cut) <= 4
    assert counts["sent"] == len(run.records) == sum(counts.values()) - counts["sent"]
    assert run.end is not None
    for record in run.records:
        late = record.end is None or record.end > run.end
        assert late == (record.number in run.cut)
        assert record.outcome == "done", "they finish in the drain"
    lines = list(result.lines())
    assert sum(line["cut"] for line in lines) == len(run.cut)
    assert result.measures["end_to_end"].requests == counts["done"]


def test_the_window_is_steady(mock: Mock) -> None:
    """Five times the requests in flight, and the seconds asked for."""
    run = session(mock, Load("closed", 3), Plan(1, 0.2, 9.0, 0.0, 2.0, 0)).runs[0].run
    assert run.steady and run.counts()["done"] >= 15 and run.seconds >= 0.2
    run = session(mock, Load("closed", 1), Plan(1, 2.5, 9.0, 0.0, 2.0, 0), ("caption",)).runs[0].run
    assert run.steady and 2.5 <= run.seconds <= 3.2
    result = session(mock, Load("closed", 4), Plan(500, 0.2, 0.5, 0.0, 2.0, 0))
    assert not result.runs[0].run.steady
    assert any("NOT STEADY" in note for note in result.notes())


def test_warm_up_is_discarded_until_it_is_steady() -> None:
    """The first 12 requests are slow: none of them is measured, and the prompts are others."""
    with running(Mock(first=0.0, gap=0.0, step=0.0)) as mock:

        def slow_start(number: int) -> None:
            mock.first = max(0.05, 0.4 - 0.03 * number)

        mock.fault = slow_start
        plan = Plan(10, 0.5, 9.0, 20.0, 2.0, 0)
        run = session(mock, Load("closed", 1), plan, ("caption",)).runs[0].run
    assert run.warm and len(run.warm_up_records) >= 15
    measured = [record.end - record.start for record in run.successes if record.end]
    warming = [record.end - record.start for record in run.warm_up_records if record.end]
    assert max(warming) > 0.3 and sorted(measured)[len(measured) // 2] < 0.1
    assert {r.prompt for r in run.records}.isdisjoint(r.prompt for r in run.warm_up_records)
    assert run.records[0].prompt == "caption-0"


def test_an_open_loop_sends_when_requests_are_due(mock: Mock) -> None:
    plan = Plan(20, 1.0, 9.0, 0.0, 2.0, 0)
    result = session(mock, Load("constant", rate=20.0), plan, ("caption",))
    run = result.runs[0].run
    due = [record.due for record in run.records if record.due is not None]
    assert due[0] - run.begin == pytest.approx(0.0, abs=1e-6)
    assert [b - a for a, b in zip(due, due[1:], strict=False)] == pytest.approx(
        [0.05] * (len(due) - 1)
    )
    lags = [record.sent - record.start for record in run.records]
    assert min(lags) >= 0 and sorted(lags)[len(lags) // 2] < SLACK
    assert result.rates["requests_per_second"].value == pytest.approx(20, rel=0.3)


def test_lateness_of_the_client_counts_and_is_marked() -> None:
    """A request that is sent late has waited since it was due."""
    record = RequestRecord(0, "p", sent=1.5, due=1.0)
    assert record.start == 1.0
    with running(Mock()) as mock:
        load = Load("trace", times=(0.0,) * 40)  # all due at once: the last are late
        result = session(mock, load, Plan(1, 0.0, 9.0, 0.0, 2.0, 0), ("question-8",))
    assert result.runs[0].run.client_bound
    assert any("CLIENT-BOUND" in note for note in result.notes())


def test_a_server_that_falls_behind_is_over_saturated() -> None:
    """One slot of 0.12 s is asked for 20 requests a second."""
    with running(Mock(first=0.12, gap=0.0, step=0.0, slots=1)) as mock:
        plan = Plan(1000, 20.0, 30.0, 0.0, 0.0, 0)
        result = session(mock, Load("poisson", rate=20.0), plan, ("caption",))
    run = result.runs[0].run
    assert result.over_saturated and not result.complete and run.seconds < 20
    assert any("OVER-SATURATED" in note for note in result.notes())


def test_offline_sends_a_fixed_number_at_once(mock: Mock) -> None:
    plan = Plan(12, 30.0, 60.0, 0.0, 5.0, 0)
    run = session(mock, Load("offline"), plan, ("caption",)).runs[0].run
    assert run.counts() == {"sent": 12, "done": 12, "rejected": 0, "failed": 0, "cut": 0}
    assert mock.peak == 12 and run.steady and run.complete and run.seconds < 5


def test_a_trace_is_sent_as_it_is(mock: Mock) -> None:
    load = Load("trace", times=(0.0, 0.1, 0.1, 0.5))
    run = session(mock, load, Plan(1, 30.0, 60.0, 0.3, 5.0, 0), ("caption",)).runs[0].run
    due = [record.due - run.begin for record in run.records if record.due is not None]
    assert due == pytest.approx([0.0, 0.1, 0.1, 0.5]) and run.counts()["done"] == 4
    assert run.warm_up_records, "a closed loop warms up"


def test_a_conversation_sends_all_that_came_before(mock: Mock) -> None:
    result = session(mock, Load("closed", 1), QUICK, ("conversation",))
    turns = [record.turn for record in result.records][:6]
    assert turns == [0, 1, 2, 0, 1, 2]
    bodies = mock.bodies[len(result.runs[0].run.warm_up_records) :]
    kinds = [[part["type"] for part in body["messages"][0]["content"]] for body in bodies[:3]]
    picture, text = "image_url", "text"
    assert kinds[0] == [picture, text]
    assert kinds[1] == [picture, text, picture, text]  # the reply's words join the text before
    assert kinds[2] == [picture, text, picture, text, picture, text]
    first = result.records[0]
    assert bodies[1]["messages"][0]["content"][1]["text"].endswith(first.reply.texts[0].strip())
    assert result.check and result.check.valid


@pytest.mark.parametrize(
    ("fault", "outcome", "error"),
    [
        (429, "rejected", "queue_full: the queue is full"),
        ("error", "failed", "engine_died: the engine died"),
        ("cut", "failed", "the stream ended before it was complete"),
    ],
)
def test_failures_are_counted_by_their_kind(fault: Any, outcome: str, error: str) -> None:
    with running(Mock(fault=lambda number: fault if number % 3 == 1 else None)) as mock:
        result = session(mock, Load("closed", 2))
    run = result.runs[0].run
    counts = run.counts()
    assert counts[outcome] >= 2 and counts["done"] >= 4
    wrong = [record for record in run.records if record.outcome == outcome]
    assert {record.error for record in wrong} == {error}
    assert result.complete and result.measures["end_to_end"].requests == counts["done"]


def test_a_server_that_answers_nothing_is_given_up() -> None:
    with running(Mock(fault=lambda number: 500)) as mock, pytest.raises(MmiError) as caught:
        session(mock, Load("closed", 2))
    assert "have all failed" in str(caught.value) and "status 500" in str(caught.value)


def test_no_server_is_one_line() -> None:
    settings = Settings(open_workload(["text"], 0, 16, None), Load("closed"), QUICK)
    with pytest.raises(MmiError, match="no server answers at http://127.0.0.1:9 .*mmi serve"):
        Session(Server(url="http://127.0.0.1:9"), settings).run()


def test_outputs_that_depend_on_the_neighbours_are_invalid() -> None:
    """A level more is within the band; two levels with a neighbour are not."""
    for levels, valid in ((1, True), (2, False)):
        spoil = lambda level, flying, n=levels: level + n * (flying > 1)  # noqa: E731
        with running(Mock(spoil=spoil)) as mock:
            result = session(mock, Load("closed", 3))
        assert result.valid is valid and result.check
        if valid:
            assert result.check.largest == 1
        else:
            assert "INVALID" in result.notes()[0] and "differs by 2/255" in result.notes()[0]
            assert any(record.difference for record in result.records)


def test_one_in_twenty_is_compared(mock: Mock) -> None:
    plan = Plan(45, 0.5, 20.0, 0.0, 2.0, 20)
    result = session(mock, Load("closed", 4), plan, ("caption",))
    checked = [record.number for record in result.records if record.checked]
    assert checked[:3] == [0, 20, 40] and result.check and result.check.compared == len(checked)
    assert all(number % 20 == 0 for number in checked)


def test_every_run_has_prompts_and_arrivals_of_its_own(mock: Mock) -> None:
    plan = Plan(4, 0.2, 9.0, 0.0, 2.0, 0)
    result = session(mock, Load("poisson", rate=20.0), plan, ("caption",), runs=3)
    prompts = [{record.prompt for record in one.run.records} for one in result.runs]
    assert len(prompts) == 3 and not prompts[0] & prompts[1] and not prompts[1] & prompts[2]
    assert [one.run.number for one in result.runs] == [0, 1, 2]


def test_a_stopped_measurement_keeps_what_it_has(mock: Mock) -> None:
    runs: list[Run] = []

    async def stopped() -> None:
        async with Client(mock.url) as client:
            workload = open_workload(["story"], 0, 16, None)
            plan = Plan(1000, 60.0, 90.0, 0.0, 60.0, 0)
            measurement = Measurement(client, workload, Load("closed", 2), plan, Wire("m"))
            runs.append(measurement.run)
            await asyncio.wait_for(measurement.measure(), 3.0)

    with pytest.raises(TimeoutError):
        asyncio.run(stopped())
    (run,) = runs
    assert not run.complete and run.end is not None and run.successes
    assert run.counts()["cut"] >= 1


def test_a_reference_that_fails_is_a_difference() -> None:
    with running(Mock()) as mock:
        workload = open_workload(["story"], 0, 16, None)

        async def measure() -> Any:
            async with Client(mock.url) as client:
                measurement = Measurement(client, workload, Load("closed"), QUICK, Wire("m"))
                run = await measurement.measure()
                mock.fault = lambda number: 503
                return await sequential(client, Wire("m"), run.kept[:1])

        found = asyncio.run(measure())
    assert found == ["queue_full: the queue is full"]


def test_the_environment_is_kept_without_secrets() -> None:
    variables = {"OMP_NUM_THREADS": "2", "MMI_API_KEY": "x", "HOME": "/root", "ORT_X": "1"}
    assert environment(variables) == {"OMP_NUM_THREADS": "2", "ORT_X": "1"}


def test_tokens_are_counted_again_where_a_tokenizer_is_at_hand(
    mock: Mock, repository: Path
) -> None:
    path = repository / "assets" / "tiny" / "tokenizer.json"
    result = session(mock, Load("closed", 1), QUICK, ("caption",), tokenizer=path)
    done = [record for record in result.records if record.outcome == "done"]
    assert done and all(record.recomputed == record.tokens == 16 for record in done)
    assert not any("THEY DIFFER" in note for note in result.notes())
    for record in done:
        record.tokens = 17
    assert any("THEY DIFFER" in note for note in result.notes())
