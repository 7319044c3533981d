"""Runs in trtexec's words: warm-up, duration, parts of a run, turns, percentiles."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from mmi_bench.runs import Computation, Device, Run, Settings, measure, measure_in_turns
from mmi_bench.statistics import Latencies, least_samples, percentile
from mmi_deploy.errors import ConfigError


class Machine:
    """A clock, and work that takes its time."""

    def __init__(self) -> None:
        self.now = 100.0
        self.done: list[str] = []

    def clock(self) -> float:
        return self.now

    def work(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds
            self.done.append(name)

        return run


def test_a_run_on_the_host_is_its_computation() -> None:
    machine = Machine()
    found = measure(
        Computation(machine.work("run", 0.25)), Settings(1.0, 2.0, iterations=3), machine.clock
    )
    assert found.warm_up == 4 and len(found.runs) == 8 and found.seconds == 2.0
    assert found.throughput == 4.0
    assert {run.latency for run in found.runs} == {run.compute for run in found.runs} == {0.25}
    summaries = found.summaries()
    assert summaries["enqueue"] is summaries["h2d"] is summaries["d2h"] is None
    latency = summaries["latency"]
    assert latency and latency.median == latency.min == latency.max == 250.0
    assert found.to_json()["enqueue_ms"] is None
    assert found.times()[1] == {
        "startEnqMs": 250.0, "endEnqMs": 250.0, "startH2dMs": 250.0, "endH2dMs": 250.0,
        "startComputeMs": 250.0, "endComputeMs": 500.0, "startD2hMs": 500.0, "endD2hMs": 500.0,
        "h2dMs": 0.0, "computeMs": 250.0, "d2hMs": 0.0, "latencyMs": 250.0,
    }  # fmt: skip


def test_a_run_on_a_device_has_parts() -> None:
    """Work that is enqueued is waited for, and copies belong to the latency."""
    machine = Machine()
    pending: list[float] = []

    def enqueue() -> None:
        machine.now += 0.125
        pending.append(0.5)

    def wait() -> None:
        machine.now += sum(pending)
        pending.clear()

    device = Device(machine.work("in", 1.0), wait, machine.work("out", 2.0))
    found = measure(Computation(enqueue, device), Settings(0.1, 0.1, 1), machine.clock)
    (run,) = found.runs
    assert run.host_to_device == 1.0 and run.device_to_host == 2.0
    assert run.enqueue == 0.125 and run.compute == 0.625 and run.latency == 3.625
    (times,) = found.times()
    assert times["startEnqMs"] == 1000.0 and times["endEnqMs"] == 1125.0
    assert times["latencyMs"] == times["h2dMs"] + times["computeMs"] + times["d2hMs"]


def test_iterations_go_beyond_a_short_duration() -> None:
    machine = Machine()
    found = measure(Computation(machine.work("run", 5.0)), Settings(0.1, 0.1, 7), machine.clock)
    assert found.warm_up == 1 and len(found.runs) == 7


def test_sides_take_turns_and_change_their_order() -> None:
    machine = Machine()
    sides = [Computation(machine.work("a", 1.0)), Computation(machine.work("b", 2.0))]
    a, b = measure_in_turns(sides, Settings(0.5, 6.0, 3), 3, machine.clock)
    assert machine.done == ["a", "b", *"aab", *"baa", *"aab"]
    assert [len(turn) for turn in a.turns] == [2, 2, 2] and b.means == [2.0, 2.0, 2.0]
    assert a.throughput == 1.0 and b.seconds == 6.0


def test_the_real_clock_measures_a_sleep() -> None:
    found = measure(Computation(lambda: time.sleep(0.002)), Settings(0.001, 0.05, 5))
    latency = found.summaries()["latency"]
    assert latency and 2.0 <= latency.min <= latency.median <= latency.max
    assert found.throughput <= 500


def test_percentiles_want_as_many_samples_as_carry_them() -> None:
    assert [least_samples(percent) for percent in (90, 95, 99)] == [44, 90, 459]
    assert percentile(range(43), 90) is None and percentile(range(44), 90) == pytest.approx(38.7)
    for count, known in ((43, 0), (44, 1), (89, 1), (90, 2), (458, 2), (459, 3)):
        found = Latencies.of([float(value) for value in range(count)])
        assert sum(one is not None for one in (found.p90, found.p95, found.p99)) == known
    assert found.p99 == pytest.approx(453.42) and found.mean == found.median == 229.0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((0.0, 3.0, 1), "--warm-up is out of range; expected more than 0 .* got 0"),
        ((0.2, 0.0, 1), "--duration is out of range; expected more than 0 and at most 3600 sec"),
        ((0.2, -1.0, 1), "--duration is out of range"),
        ((0.2, float("nan"), 1), "--duration is out of range"),
        ((float("inf"), 3.0, 1), "--warm-up is out of range"),
        ((0.2, 1e9, 1), "--duration is out of range"),
        ((0.2, 3.0, 0), "--iterations is out of range; expected 1 or more; got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: tuple[float, float, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Settings(*settings)


def test_moments_of_a_run_follow_one_another() -> None:
    run = Run(1.0, 2.0, 4.0, 8.0, 16.0)
    assert (run.host_to_device, run.enqueue, run.compute, run.device_to_host) == (1, 2, 6, 8)
    assert run.latency == run.host_to_device + run.compute + run.device_to_host
