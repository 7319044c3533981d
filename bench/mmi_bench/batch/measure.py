"""Measure many documents at once against the same documents one after another, in one process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

from mmi_bench.batch.gains import BATCHED, RunBench, bound, gains_of, shares
from mmi_bench.batch.latency import Beside, SecondTurn, beside_pictures, second_turns
from mmi_bench.batch.sample import (
    Runs,
    Sample,
    at_once,
    check_equal,
    one_after_another,
    wait_until_idle,
)
from mmi_bench.batch.workloads import DOCUMENTS, PICTURES, TEXT, Item, workload
from mmi_bench.compare.cases import one_token_word
from mmi_bench.machine import describe
from mmi_bench.statistics import Statistics, ratios
from mmi_deploy.batching.batch_engine import BatchEngine
from mmi_deploy.batching.scheduler import Policy
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.backends import AUTO, CPU
from mmi_deploy.system.progress import Progress, silent

# Runs are never made smaller for the sake of a text: the policy for throughput.
THROUGHPUT = Policy(text_gap=inf)

# Documents that draw beside a text, and those of the queue whose last one waits.
MANY = 8

# Tokens of the answer before the second turn of a conversation.
_ANSWER = 32


@dataclass(frozen=True)
class Cell:
    """Some documents of a workload: samples of both sides, in pairs. cpu_time: judged by CPU time
    in place of wall time."""

    workload: str
    rows: int
    single: Sequence[Sample]
    together: Sequence[Sample]
    cpu_time: bool = False

    @property
    def speedup(self) -> Statistics:
        """Time one after another over time at once."""
        return self._ratios(self.cpu_time)

    @property
    def other_speedup(self) -> Statistics:
        """Speed-up by the other clock: CPU time, or wall time if CPU time is judged."""
        return self._ratios(not self.cpu_time)

    def _ratios(self, cpu_time: bool) -> Statistics:
        pairs = [[s.time(cpu_time) for s in side] for side in (self.single, self.together)]
        return ratios(*pairs)

    def rate(self, side: Sequence[Sample], unit: str) -> float:
        """Median of tokens or pictures a second."""
        return median(getattr(sample, unit) / sample.time(self.cpu_time) for sample in side)

    @property
    def last_token(self) -> Statistics | None:
        """Time to first token of the last document, over that in the queue."""
        pairs = [
            (t.first_tokens[-1], s.first_tokens[-1])
            for t, s in zip(self.together, self.single, strict=True)
            if t.first_tokens and s.first_tokens
        ]
        return Statistics.of([a / b for a, b in pairs]) if pairs else None

    @property
    def runs(self) -> Runs:
        """Runs of all samples at once."""
        return Runs.total(sample.runs for sample in self.together if sample.runs)

    def to_json(self) -> dict[str, Any]:
        last = self.last_token
        return {
            "workload": self.workload,
            "rows": self.rows,
            "equal": True,  # or the command has failed
            "speedup": self.speedup.to_json(),
            "clock": "CPU" if self.cpu_time else "wall",
            "speedup_by_the_other_clock": self.other_speedup.to_json(),
            "last_first_token_over_queue": last.to_json() if last else None,
            "one_after_another": [sample.to_json() for sample in self.single],
            "at_once": [sample.to_json() for sample in self.together],
        }


@dataclass(frozen=True)
class Bound:
    """Bound for whole documents at `rows` rows, and the measured speed-up's part of it."""

    rows: int
    gains: dict[str, float]
    bound: float
    reached: float


@dataclass(frozen=True)
class BatchResult:
    """All measurements, with their provenance in `about`. shares: of the stages of whole documents.
    run_seconds: stage -> rows -> seconds."""

    about: dict[str, Any]
    cells: Sequence[Cell]
    shares: dict[str, float]
    bounds: Sequence[Bound]
    run_seconds: dict[str, dict[int, float]]
    beside: Beside | None
    second: SecondTurn | None

    def cell(self, name: str, rows: int) -> Cell | None:
        """Cell of a workload, None if it was not measured."""
        found = (cell for cell in self.cells if (cell.workload, cell.rows) == (name, rows))
        return next(found, None)

    def to_json(self) -> dict[str, Any]:
        return {
            "about": self.about,
            "cells": [cell.to_json() for cell in self.cells],
            "stage_shares": self.shares,
            "bounds": [vars(one) for one in self.bounds],
            "run_seconds": self.run_seconds,
            "text_beside_pictures": self.beside.to_json() if self.beside else None,
            "second_turn": self.second.to_json() if self.second else None,
        }


def run(
    bundle: Path,
    *,
    workloads: Sequence[str],
    rows: Sequence[int],
    rounds: int,
    threads: int = 2,
    quick: bool = False,
    target: str = CPU,
    device: int = 0,
    kernels: str = AUTO,
    unproved: bool = False,
    cpu_time: bool = False,
    progress: Progress = silent,
) -> BatchResult:
    """Measure a bundle; see `measure`. Raises `MmiError`."""
    opened = Bundle.open(bundle, unproved=unproved)
    runtime = Runtime.open(
        opened, target=target, device=device, kernels=kernels, threads=threads, unproved=unproved
    )
    try:
        about = {
            "argv": sys.argv,
            "threads": threads,
            "target": target,
            "model": opened.config.name,
            "bundle_sha256": opened.identity,
            "machine": describe(),
        }
        exact = target == CPU
        result = measure(runtime, workloads, rows, rounds, quick, exact, cpu_time, progress)
    finally:
        runtime.close()
    return replace(result, about={**about, **result.about})


def measure(
    runtime: Runtime,
    workloads: Sequence[str],
    rows: Sequence[int],
    rounds: int,
    quick: bool = False,
    exact: bool = True,
    cpu_time: bool = False,
    progress: Progress = silent,
) -> BatchResult:
    """Measure `workloads` with `rows` documents at once; both sides alternate over `rounds` rounds.
    Before comes a warm-up round of all documents, in which token ids are compared as well.

    exact: raise `MmiError` unless every document equals its single run to the byte. cpu_time: judge
    by CPU time, on a machine that other processes disturb.
    """
    if unfit := [count for count in rows if not 1 <= count <= 64]:
        raise ConfigError("--rows is out of range", expected="1 to 64", got=unfit[0])
    rows, most = sorted(set(rows)), max(rows)
    config, context = runtime.config, runtime.limits.context
    schedules = runtime.schedules or (runtime.schedule().schedule.key,)

    def items(name: str, count: int) -> list[Item]:
        return workload(name, count, config, context, runtime.tokenizer, schedules, quick)

    documents = {name: items(name, most) for name in workloads}
    runtime.load()
    bench = RunBench(runtime, min(most, runtime.limits.batch), cpu_time)
    cells: list[Cell] = []
    total = len(workloads) * (1 + len(rows) * rounds) + 2
    with BatchEngine(runtime, slots=most, policy=THROUGHPUT) as engine:
        samples: dict[tuple[str, int], list[tuple[Sample, Sample]]] = {}
        done = 0
        for round_ in range(rounds + 1):
            wait_until_idle()
            bench.measure()
            for name in workloads:
                for count in rows if round_ else [most]:
                    progress(
                        "measuring" if round_ else "warming up",
                        done,
                        total,
                        detail=f"{name}, {count} at once",
                    )
                    done += 1
                    chosen = documents[name][:count]
                    if not round_:
                        chosen = [_with_token_ids(item) for item in chosen]
                    pair = _pair(runtime, engine, chosen, first_single=bool(round_ % 2))
                    if exact:
                        check_equal(name, *pair)
                    if round_:
                        samples.setdefault((name, count), []).append(pair)
        for (name, count), pairs in samples.items():
            single, together = (list(side) for side in zip(*pairs, strict=True))
            cells.append(Cell(name, count, single, together, cpu_time))
        progress("measuring", total - 2, total, detail="second turns")
        first = items(DOCUMENTS, 1)[0]
        question = " ".join([one_token_word(runtime.tokenizer)] * 8)
        answer = 4 if quick else _ANSWER
        second = second_turns(engine, first, question, answer, rounds)
    progress("measuring", total - 1, total, detail="a text beside pictures")
    many = 2 if quick else MANY
    drawn = [_endless(item) for item in items(PICTURES, many)]
    beside = beside_pictures(runtime, items(TEXT, 1)[0], drawn, 1 if quick else 4, Policy())
    whole = [cell for cell in cells if cell.workload == DOCUMENTS]
    share = shares(sample for cell in whole for sample in cell.single) if whole else {}
    bounds = []
    for cell in whole:
        gains = gains_of(bench, BATCHED, min(cell.rows, runtime.limits.batch))
        limit = bound(share, gains)
        bounds.append(Bound(cell.rows, gains, limit, cell.speedup.median / limit))
    seconds = {
        stage: {count: bench.seconds(stage, min(count, runtime.limits.batch)) for count in rows}
        for stage in BATCHED
    }
    about = {
        "quick": quick,
        "rounds": rounds,
        "schedules": list(schedules),
        "slots": most,
        "policy": "text_gap=inf; a text beside pictures: default",
        "exact": exact,
        "clock": "CPU" if cpu_time else "wall",
    }
    return BatchResult(about, cells, share, bounds, seconds, beside, second)


def _pair(
    runtime: Runtime, engine: BatchEngine, items: Sequence[Item], first_single: bool
) -> tuple[Sample, Sample]:
    """Both sides once, each on an idle machine."""
    wait_until_idle()
    if first_single:
        single = one_after_another(runtime, items)
        wait_until_idle()
        return single, at_once(engine, items)
    together = at_once(engine, items)
    wait_until_idle()
    return one_after_another(runtime, items), together


def _with_token_ids(item: Item) -> Item:
    return Item(item.document, replace(item.options, logprobs=0))


def _endless(item: Item) -> Item:
    """The item with as many pictures as fit, so that drawing goes on while a text is written."""
    return Item(item.document, replace(item.options, max_images=8))
