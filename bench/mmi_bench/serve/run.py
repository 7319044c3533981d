"""One measurement of a server: warm-up, the measured window, drain."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from statistics import mean
from typing import Any, Literal

from mmi_bench.serve.client import Client
from mmi_bench.serve.definitions import STEADY_REQUESTS
from mmi_bench.serve.load import Load
from mmi_bench.serve.measures import first_output
from mmi_bench.serve.records import RequestRecord
from mmi_bench.serve.steadiness import client_bound, is_over_saturated, is_warm
from mmi_bench.serve.wire import Wire, decoded
from mmi_bench.serve.workloads import Prompt, Workload
from mmi_deploy.documents.document import Document, Image, Text, document_of
from mmi_deploy.errors import MmiError
from mmi_deploy.system.progress import Progress, silent

# Prompts of a run begin at a multiple of this number: no two runs share one.
RUN_STRIDE = 10_000_000

# Seconds between two looks at the requests in flight, and between two judgements of saturation, the
# latter also as a share of the window so far.
_LOOK, _JUDGE, _JUDGE_SHARE = 0.1, 1.0, 0.05

# Seconds of a window before saturation is judged.
_SETTLED = 10.0

# Requests in flight while a fixed set of requests is warmed up for.
_WARM_CONCURRENCY = 4

# Requests that are prepared ahead.
_AHEAD = 32

# Requests that fail at the beginning, with no success, before the benchmark gives up.
_HOPELESS = 10


@dataclass(frozen=True)
class Plan:
    """Size of a run.

    The window ends when `min_seconds` have passed and `requests` have succeeded (never fewer than
    five times those in flight), or after `max_seconds`. warm_up: most seconds of warm-up. drain:
    seconds that requests in flight at the end have to finish. check_every: one in so many keeps
    its output for the comparison; 0 for none.
    """

    requests: int = 1
    min_seconds: float = 30.0
    max_seconds: float = 600.0
    warm_up: float = 60.0
    drain: float = 60.0
    check_every: int = 20


@dataclass(frozen=True)
class Kept:
    """Output of a request that is compared, with the document and the prompt that it answers."""

    record: RequestRecord
    document: Document
    prompt: Prompt


@dataclass
class Run:
    """One run. Times are seconds of the client's clock.

    fixed: the requests are a fixed set, measured from the first to the last.
    warm_up_records, records: requests that began before and in the window. in_flight: pairs of a
    time in the window and the requests in flight.
    """

    number: int
    fixed: bool = False
    warm: bool = False
    warm_up_seconds: float = 0.0
    begin: float = 0.0
    end: float | None = None
    complete: bool = False
    steady: bool = False
    over_saturated: bool = False
    client_bound: str | None = None
    client_cpu: float = 0.0
    peak_in_flight: int = 0
    warm_up_records: list[RequestRecord] = field(default_factory=list)
    records: list[RequestRecord] = field(default_factory=list)
    cut: set[int] = field(default_factory=set)
    in_flight: list[tuple[float, float]] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Length of the window."""
        return max(0.0, (self.begin if self.end is None else self.end) - self.begin)

    @property
    def mean_in_flight(self) -> float:
        return mean(count for _, count in self.in_flight) if self.in_flight else 0.0

    @property
    def successes(self) -> list[RequestRecord]:
        """Requests that began and ended well within the window: those of the latencies."""
        return [r for r in self.records if r.outcome == "done" and r.number not in self.cut]

    @property
    def ended(self) -> list[RequestRecord]:
        """Requests that ended well within the window, whenever they began: those of the rates."""
        before = (
            record
            for record in self.warm_up_records
            if record.outcome == "done" and record.end and self.begin <= record.end
            and (self.end is None or record.end <= self.end)
        )  # fmt: skip
        found = [*before, *self.successes]
        return sorted(found, key=lambda record: record.end or 0.0)

    def counts(self) -> dict[str, int]:
        """Requests that began in the window, by what became of them."""
        found = dict.fromkeys(("done", "rejected", "failed", "cut"), 0)
        for record in self.records:
            found["cut" if record.number in self.cut else record.outcome] += 1
        return {"sent": len(self.records), **found}


# Number of a request, its prompt and its body.
_Prepared = tuple[int, Prompt, bytes]


class Measurement:
    """Drives one run; `run` holds what was recorded, also if the measurement is stopped."""

    def __init__(
        self,
        client: Client,
        workload: Workload,
        load: Load,
        plan: Plan,
        wire: Wire,
        number: int = 0,
        progress: Progress = silent,
    ) -> None:
        """number: of the run."""
        self.run = Run(number, load.is_fixed)
        self._client, self._workload, self._load = client, workload, load
        self._plan, self._wire, self._progress = plan, wire, progress
        self._phase: Literal["warm-up", "window", "drain"] = "warm-up"
        self._ready: dict[str, asyncio.Queue[_Prepared]] = {}  # requests by phase
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[object]] = set()
        self._flying = 0
        self._checked: set[int] = set()  # identities of records
        self._latencies: list[float] = []  # of warm-up, in the order of their ends
        self._due_left = False  # requests of a fixed set that are not sent yet
        self._over = self._done = 0  # requests of the window that ended, and ended well
        self._judge_at = 0.0
        self._failure: BaseException | None = None  # of a task

    async def measure(self) -> Run:
        """Warm up, measure, drain. Raises `MmiError` if requests keep failing."""
        drain = 0.0
        self._ready = {phase: asyncio.Queue(_AHEAD) for phase in ("warm-up", "window")}
        fillers = [asyncio.create_task(self._fill(phase)) for phase in self._ready]
        for filler in fillers:
            filler.add_done_callback(self._ended)
        try:
            await self._warm_up()
            while not self._ready["window"].full():  # preparing takes no time of the window
                await self._change()
            cpu = time.process_time()
            await self._window()
            self.run.client_cpu = time.process_time() - cpu
            self.run.complete = not self.run.over_saturated
            drain = self._plan.drain
        finally:  # also when the benchmark is stopped: what was recorded is a result
            if self._phase == "window":
                self._end_window()
            await self._settle(drain)
            for filler in fillers:
                filler.cancel()
            await asyncio.gather(*fillers, return_exceptions=True)
        lags = [r.sent - r.due for r in self.run.records if r.due is not None]
        self.run.client_bound = client_bound(lags, self.run.seconds, self.run.client_cpu)
        return self.run

    # Phases

    async def _warm_up(self) -> None:
        begun, run = self._client.now(), self.run
        if self._load.is_fixed:
            for worker in range(_WARM_CONCURRENCY):
                self._start(self._worker(worker, _WARM_CONCURRENCY, "warm-up"))
        elif self._load.is_open:
            self._start(self._arrivals("warm-up", self._client.now()))
        else:
            for worker in range(self._load.concurrency):
                self._start(self._worker(worker, self._load.concurrency, None))
        while (seconds := self._client.now() - begun) < self._plan.warm_up:
            self._check_hope(run.warm_up_records)
            self._report("warming up", seconds, self._plan.warm_up)
            ramping = seconds < self._load.ramp_up
            if not ramping and is_warm(self._latencies, run.peak_in_flight):
                run.warm = True
                break
            await self._change()
        run.warm_up_seconds = self._client.now() - begun
        if self._load.is_fixed:  # the set begins on an idle server
            await self._settle(self._plan.drain)

    async def _window(self) -> None:
        run, load = self.run, self._load
        self._phase = "window"
        run.begin, run.peak_in_flight = self._client.now(), self._flying
        if load.kind == "offline":
            self._due_left = True
            self._start(self._all_at_once())
        elif load.is_open:
            self._due_left = load.kind == "trace"
            self._start(self._arrivals("window", run.begin))
        while not self._is_over():
            self._check_hope(run.records)
            await self._change()
        self._end_window()

    def _end_window(self) -> None:
        """End the window: requests in flight are cut."""
        self._phase, self.run.end = "drain", self._client.now()
        self.run.cut = {r.number for r in self.run.records if r.outcome == "running"}

    async def _settle(self, seconds: float) -> None:
        """Let requests in flight finish, at most `seconds`, then cancel what is left."""
        self._phase = "drain"
        end = self._client.now() + seconds
        while self._flying and self._client.now() < end:
            self._report("finishing requests in flight", 0, 0)
            await self._change()
        left = list(self._tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _is_over(self) -> bool:
        """True at the end of the window."""
        run, plan, now = self.run, self._plan, self._client.now()
        seconds = now - run.begin
        if not run.in_flight or now - run.in_flight[-1][0] >= _LOOK:
            run.in_flight.append((now, self._flying))
        if self._load.is_fixed:
            self._report("measuring", self._over, max(self._over, len(run.records)))
            run.steady = not self._due_left and not self._tasks
            return run.steady or seconds >= plan.max_seconds
        wanted = max(plan.requests, STEADY_REQUESTS * run.peak_in_flight)
        run.steady = seconds >= plan.min_seconds and self._done >= wanted
        share = min(seconds / max(plan.min_seconds, 1e-9), self._done / wanted)
        self._report("measuring", share, 1)
        if self._load.is_open and seconds >= _SETTLED and now >= self._judge_at:
            # Seldom in a long window: looking at every request takes time.
            self._judge_at = now + max(_JUDGE, seconds * _JUDGE_SHARE)
            outputs = [(r.start, first_output(r)) for r in run.records]
            known = [(start, output) for start, output in outputs if output is not None]
            run.over_saturated = is_over_saturated(run.in_flight, known)
        return run.steady or run.over_saturated or seconds >= plan.max_seconds

    def _check_hope(self, records: list[RequestRecord]) -> None:
        """Raise `MmiError` if the latest requests have all failed."""
        least = max(_HOPELESS, 2 * self.run.peak_in_flight)
        ended = [r for r in records[-2 * least :] if r.outcome != "running"]
        if len(ended) >= least and all(r.outcome == "failed" for r in ended):
            raise MmiError(
                f"the last {len(ended)} requests have all failed",
                got=f"status {ended[-1].status}: {ended[-1].error}",
                fix="look at the log of the server",
            )

    # Requests

    async def _worker(self, index: int, count: int, phase: str | None) -> None:
        """Send one request after another, until the drain or the end of `phase`."""
        await asyncio.sleep(self._load.ramp_up * index / count)
        while self._phase != "drain" and phase in (None, self._phase):
            if not await self._converse(await self._ready[self._phase].get()):
                await asyncio.sleep(_LOOK)  # a server that refuses is not flooded

    async def _arrivals(self, phase: str, origin: float) -> None:
        """Send requests when they are due, while the phase lasts."""
        part = self.run.number + 1 if phase == "window" else 0
        for due in self._load.due_times(phase == "warm-up", part):
            prepared = await self._ready[phase].get()
            if (left := origin + due - self._client.now()) > 0:
                await asyncio.sleep(left)
            if self._phase != phase:
                return
            self._start(self._converse(prepared, origin + due))
        self._due_left = False

    async def _all_at_once(self) -> None:
        """Prepare a fixed number of requests, then send them all."""
        prepared = [await self._ready["window"].get() for _ in range(self._plan.requests)]
        self.run.begin = self._client.now()  # preparing is not part of the window
        self.run.in_flight.clear()
        for one in prepared:
            self._start(self._converse(one))
        self._due_left = False

    async def _fill(self, phase: str) -> None:
        """Prepare requests ahead, in a thread: encoding pictures takes milliseconds. Numbers of
        warm-up are negative."""
        first, step = (0, 1) if phase == "window" else (-1, -1)
        for number in count(first, step):
            place = number + step * self.run.number * RUN_STRIDE
            await self._ready[phase].put(await asyncio.to_thread(self._prepare, number, place))

    def _prepare(self, number: int, place: int) -> _Prepared:
        prompt = self._workload.prompt(place)
        return number, prompt, self._wire.body(prompt.document, prompt.options)

    async def _converse(self, prepared: _Prepared, due: float | None = None) -> bool:
        """Send the requests of a prompt, one after another; returns false if one failed."""
        number, prompt, body = prepared
        document, records = prompt.document, []
        for turn, more in enumerate(((), *prompt.more)):
            if turn:
                document = document_of(*document.parts, *more)
                body = await asyncio.to_thread(self._wire.body, document, prompt.options)
                due = None
            if turn and self._phase == "drain":
                break
            record = await self._request(number, turn, prompt, document, body, due)
            records.append(record)
            if record.outcome != "done":
                return False
            if turn < len(prompt.more):
                document = document_of(*document.parts, *_reply_parts(record))
        for record in records:
            if id(record) not in self._checked:
                record.reply.drop_pictures()
        return True

    async def _request(
        self,
        number: int,
        turn: int,
        prompt: Prompt,
        document: Document,
        body: bytes,
        due: float | None,
    ) -> RequestRecord:
        in_window, every = self._phase == "window" and number >= 0, self._plan.check_every
        records = self.run.records if in_window else self.run.warm_up_records
        record = RequestRecord(len(records), prompt.id, self._client.now(), due, turn)
        records.append(record)
        check = in_window and every > 0 and record.number % every == 0
        self._flying += 1
        self.run.peak_in_flight = max(self.run.peak_in_flight, self._flying)
        try:
            keep = check or bool(prompt.more)
            await self._client.generate(record, self._wire.endpoint, body, keep)
        finally:
            self._flying -= 1
            self._over += in_window
            self._done += in_window and record.outcome == "done"
            self._changed.set()
        if self._phase == "warm-up" and record.outcome == "done" and record.end is not None:
            self._latencies.append(record.end - record.start)
        if check and record.outcome == "done":
            self.run.kept.append(Kept(record, document, prompt))
            self._checked.add(id(record))
        return record

    # Tasks

    def _start(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        self._changed.set()
        if not task.cancelled() and task.exception() is not None:
            self._failure = task.exception()

    async def _change(self) -> None:
        """Wait until a request ends, or a moment; raises the error of a task that failed."""
        # Not `wait_for`, which in Python 3.11 may lose the cancellation of its caller.
        with suppress(TimeoutError):
            async with asyncio.timeout(_LOOK):
                await self._changed.wait()
        self._changed.clear()
        if self._failure is not None:
            raise self._failure

    def _report(self, what: str, done: float, total: float) -> None:
        scale = 100 / total if total else 0
        self._progress(
            what, int(done * scale), 100 if total else 0, detail=f"{self._flying} in flight"
        )


def _reply_parts(record: RequestRecord) -> list[Text | Image]:
    """Parts of a reply, for the next turn."""
    return [
        Text(part) if isinstance(part, str) else Image(decoded(part))
        for part in record.reply.parts
        if part is not None
    ]
