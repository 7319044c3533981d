"""One measurement: documents at once or one after another, their outputs and latencies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from mmi_bench.batch.workloads import Item
from mmi_deploy.batching.batch_engine import BatchEngine, EngineStats
from mmi_deploy.batching.event_stream import EventStream
from mmi_deploy.documents.images import Rgb, to_png
from mmi_deploy.errors import MmiError
from mmi_deploy.runtime.events import Event, Finished, ImageDone, ImageStarted, TextDelta
from mmi_deploy.runtime.generation import generate
from mmi_deploy.runtime.runtime import Runtime

# Seconds between two looks at a process that should become idle, its CPU seconds between them if it
# is, and the most seconds to wait.
_LOOK, _IDLE, _PATIENCE = 0.05, 0.005, 20.0

# Every document has a tenant of its own: no measurement finds anything in the caches.
_tenants = map(str, count())


@dataclass
class Record:
    """Output of one document and its latencies, in seconds after `start`.

    first_token: None without one. gaps: from one text event to the next, no picture between.
    stages: seconds and count of each stage of its runs.
    """

    start: float
    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # if its options ask for log probabilities
    pictures: list[Rgb] = field(default_factory=list)
    tokens: int = 0
    reason: str = ""
    first_token: float | None = None
    gaps: list[float] = field(default_factory=list)
    seconds: float = 0.0
    stages: dict[str, tuple[float, int]] = field(default_factory=dict)
    _last: float | None = None

    def add(self, event: Event, now: float) -> None:
        """Add an event that came at `now`."""
        self.seconds = now - self.start
        match event:
            case TextDelta(text, logprobs):
                self.text += text
                self.token_ids += [sampled.token for sampled in logprobs]
                if self.first_token is None:
                    self.first_token = self.seconds
                if self._last is not None:
                    self.gaps.append(now - self._last)
                self._last = now
            case ImageStarted():
                self._last = None
            case ImageDone(_, rgb):
                self.pictures.append(rgb)
            case Finished(reason, tokens, _, timings):
                self.tokens, self.reason = tokens, reason
                self.stages = timings.totals()

    def difference(self, other: Record) -> str | None:
        """First part of the output that differs; None if both are equal to the byte."""
        parts = ("token_ids", "text", "tokens", "reason")
        for name in parts:
            if getattr(self, name) != getattr(other, name):
                return name.replace("_", " ")
        if len(self.pictures) != len(other.pictures):
            return "number of pictures"
        pairs = enumerate(zip(self.pictures, other.pictures, strict=True), 1)
        differ = (f"picture {index}" for index, (a, b) in pairs if to_png(a) != to_png(b))
        return next(differ, None)


@dataclass(frozen=True)
class Runs:
    """Runs of an engine in a measurement: number, rows and seconds of each kind."""

    runs: Mapping[str, int]
    rows: Mapping[str, int]
    seconds: Mapping[str, float]

    @classmethod
    def between(cls, before: EngineStats, after: EngineStats) -> Runs:
        kinds = [kind for kind, n in after.runs.items() if n > before.runs.get(kind, 0)]
        return cls(
            {kind: after.runs[kind] - before.runs.get(kind, 0) for kind in kinds},
            {kind: after.rows[kind] - before.rows.get(kind, 0) for kind in kinds},
            {kind: after.seconds[kind] - before.seconds.get(kind, 0.0) for kind in kinds},
        )

    @classmethod
    def total(cls, several: Iterable[Runs]) -> Runs:
        """Sums over several measurements."""
        several = list(several)
        kinds = {kind: None for one in several for kind in one.runs}

        def sums(of: Callable[[Runs], Mapping[str, Any]]) -> dict[str, Any]:
            return {kind: sum(of(one).get(kind, 0) for one in several) for kind in kinds}

        return cls(sums(lambda o: o.runs), sums(lambda o: o.rows), sums(lambda o: o.seconds))

    def mean_batch(self, kind: str) -> float | None:
        """Rows of an average run of a kind; None without one."""
        return self.rows[kind] / self.runs[kind] if kind in self.runs else None


@dataclass(frozen=True)
class Sample:
    """Documents of one measurement. seconds: from the start to the last event. cpu: seconds of all
    threads of the process. runs: of the engine, None without one."""

    seconds: float
    cpu: float
    records: Sequence[Record]
    runs: Runs | None = None

    def time(self, cpu: bool) -> float:
        """CPU seconds, or seconds of the wall clock."""
        return self.cpu if cpu else self.seconds

    @property
    def tokens(self) -> int:
        return sum(record.tokens for record in self.records)

    @property
    def pictures(self) -> int:
        return sum(len(record.pictures) for record in self.records)

    @property
    def gaps(self) -> list[float]:
        return [gap for record in self.records for gap in record.gaps]

    @property
    def first_tokens(self) -> list[float]:
        """Seconds to the first token of each document that has one, in the order of the end."""
        return sorted(r.first_token for r in self.records if r.first_token is not None)

    def to_json(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu,
            "tokens": self.tokens,
            "pictures": self.pictures,
            "first_tokens": self.first_tokens,
            "text_gaps": self.gaps,
            "runs": vars(self.runs) if self.runs else None,
        }


def one_after_another(runtime: Runtime, items: Sequence[Item]) -> Sample:
    """Generate the documents of a queue, each alone; all of them have been due since the start."""
    start, cpu = time.perf_counter(), time.process_time()
    records = []
    for item in items:
        record = Record(start)
        for event in generate(runtime, item.document, item.options):
            record.add(event, time.perf_counter())
        records.append(record)
    return Sample(time.perf_counter() - start, time.process_time() - cpu, records)


def at_once(engine: BatchEngine, items: Sequence[Item]) -> Sample:
    """Generate all documents at once; one thread reads their events."""
    before = engine.stats()

    async def read() -> Sample:
        start, cpu = time.perf_counter(), time.process_time()
        records = [Record(start) for _ in items]
        streams = [
            engine.submit(item.document, item.options, tenant=next(_tenants)) for item in items
        ]
        pairs = zip(streams, records, strict=True)
        await asyncio.gather(*(follow(stream, record) for stream, record in pairs))
        seconds, spent = time.perf_counter() - start, time.process_time() - cpu
        return Sample(seconds, spent, records, Runs.between(before, engine.stats()))

    return asyncio.run(read())


async def follow(stream: EventStream, record: Record) -> None:
    """Read a stream to its end."""
    async for event in stream:
        record.add(event, time.perf_counter())


def new_tenant() -> str:
    """A tenant that no document has had."""
    return next(_tenants)


def check_equal(name: str, single: Sample, together: Sample) -> None:
    """Raise `MmiError` for the first document whose output is not that of its single run."""
    pairs = zip(single.records, together.records, strict=True)
    for number, (alone, batched) in enumerate(pairs, 1):
        if part := alone.difference(batched):
            raise MmiError(
                f"{name}: document {number} of {len(single.records)} at once differs from its "
                f"single run in its {part}",
                expected="equal tokens and PNG bytes",
                fix="report this: rows must not depend on their neighbours",
            )


def wait_until_idle() -> None:
    """Wait until no thread of the process works: an engine tidies its caches after documents."""
    end = time.perf_counter() + _PATIENCE
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(_LOOK)
        if time.process_time() - before < _IDLE:
            return
