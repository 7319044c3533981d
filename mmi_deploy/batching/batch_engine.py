"""Batch engine: the public API for many documents at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import count
from numbers import Integral
from pathlib import Path
from threading import Condition, Thread

from mmi_deploy.batching.capacity import capacity
from mmi_deploy.batching.document_row import DocumentRow
from mmi_deploy.batching.event_stream import EventStream, wake_all
from mmi_deploy.batching.executor import Executor
from mmi_deploy.batching.job import Job, Sink, Task
from mmi_deploy.batching.scheduler import DEFAULT_POLICY, Policy, Scheduler
from mmi_deploy.batching.warm_up import warm_up as warm_up_executor
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.documents.document import Document, Image
from mmi_deploy.documents.images import resize
from mmi_deploy.errors import BusyError, ConfigError, EngineError
from mmi_deploy.runtime.events import Event, Finished, ImageDone, Reason
from mmi_deploy.runtime.generation import Generation
from mmi_deploy.runtime.options import DEFAULTS, GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.scoring import Score, Scoring
from mmi_deploy.runtime.sequence import TokenSequence
from mmi_deploy.runtime.timings import Timings
from mmi_deploy.spec.backends import AUTO, CPU


@dataclass(frozen=True)
class EngineStats:
    """State of a batch engine, and totals since its start.

    slots: documents at once; running, waiting: documents now. ended: documents by the reason of
    their end, or `error`. tokens, pictures: generated. given_tokens: of the documents when they
    began; cached_tokens: those of them that a slot still had. images, image_hits, image_evictions:
    encoded images kept, found again, dropped. runs, rows, seconds: of each kind of run; rows /
    runs is the mean batch. text_gap_p50, text_gap_p99: seconds between two tokens of a text, None
    before the first; text_gap_bound: the most that a text should wait.
    """

    slots: int
    running: int
    waiting: int
    ended: Mapping[str, int]
    tokens: int
    pictures: int
    given_tokens: int
    cached_tokens: int
    images: int
    image_hits: int
    image_evictions: int
    runs: Mapping[str, int]
    rows: Mapping[str, int]
    seconds: Mapping[str, float]
    text_gap_p50: float | None
    text_gap_p99: float | None
    text_gap_bound: float


class BatchEngine:
    """Generates many documents at once: tokens and denoising steps of all of them share runs.

    What a document gets depends on its own content and options alone. In 32 bits on the CPU, with
    the kernel library, it is equal to the bit to what `generate` gives; without the library, the
    last digits of logits depend on the number of images beside it. Thread-safe; one thread of its
    own does the runs.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        slots: int | None = None,
        image_memory: int | None = None,
        policy: Policy = DEFAULT_POLICY,
        warm_up: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """slots: documents at once; None for as many as the memory holds. image_memory: bytes of
        encoded images to keep. warm_up: load and measure all engines now. Raises `MmiError`."""
        plan = runtime.backend.plan()
        fit = capacity(runtime.graphs, runtime.limits, plan, slots, image_memory)
        executor = Executor(runtime, fit.slots, fit.images)
        self.runtime, self._clock = runtime, clock
        self._scheduler = Scheduler(executor, policy, clock)
        if warm_up:
            warm_up_executor(executor, self._scheduler.runs.times, clock)
        self._owns_runtime = False
        self._changed = Condition()
        self._inbox: list[Job] = []
        self._closed = False
        self._draining = False
        self._broken: Exception | None = None
        self._told: dict[EventStream, None] = {}  # streams with events since the last run
        self._arrivals = count()
        self._thread = Thread(target=self._run, name="mmi-batch-engine", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        bundle: Bundle | Path | str,
        *,
        slots: int | None = None,
        image_memory: int | None = None,
        policy: Policy = DEFAULT_POLICY,
        warm_up: bool = True,
        target: str = CPU,
        kernels: str | Path = AUTO,
        threads: int = 0,
        device: int = 0,
        resident: Collection[str] | None = None,
        unproved: bool = False,
    ) -> BatchEngine:
        """Open a bundle; parameters as in `Runtime.open` and `BatchEngine`. Raises `MmiError`."""
        runtime = Runtime.open(
            bundle,
            target=target,
            kernels=kernels,
            threads=threads,
            device=device,
            resident=resident,
            unproved=unproved,
        )
        try:
            engine = cls(
                runtime, slots=slots, image_memory=image_memory, policy=policy, warm_up=warm_up
            )
        except Exception:
            runtime.close()
            raise
        engine._owns_runtime = True
        return engine

    def submit(
        self,
        document: Document,
        options: GenerationOptions = DEFAULTS,
        *,
        priority: int = 0,
        max_seconds: float | None = None,
        tenant: str = "",
        stream: EventStream | None = None,
    ) -> EventStream:
        """Queue a document; its events come as `generate` yields them.

        priority: documents of a higher one get slots first. max_seconds: time from now until the
        document is ended with `Finished("deadline")`. tenant: documents of different tenants share
        no cache, so that latency does not tell one what another sent. stream: gets the events,
        and is returned; a new one by default. Raises `MmiError` for a document that does not fit
        the model, `BusyError` if the queue is full.
        """
        stream = EventStream() if stream is None else stream
        executor = self._scheduler.executor
        sequence = TokenSequence(executor.config, executor.limits)
        generation = Generation(
            sequence,
            self.runtime.tokenizer,
            _resized(document, executor.config.vision.image_size),
            options,
            self.runtime.denoising_steps(options),
            Timings(),
        )

        def emit(item: Event | Exception | None) -> None:
            self._emit(stream, job, item)

        job = self._job(generation, sequence, emit, priority, max_seconds, tenant)
        stream.connect(lambda: self._cancel(job))
        self._queue(job)
        return stream

    def score(
        self,
        document: Document,
        continuations: Sequence[str],
        *,
        priority: int = 0,
        max_seconds: float | None = None,
        tenant: str = "",
    ) -> Future[list[Score]]:
        """Queue a document whose continuations are scored, as `score` does; the future gets the
        scores, or the error.

        They take as many slots as a run has rows, at most, and share decode runs with the texts of
        other documents. Cancelling the future ends the document. Parameters as in `submit`; beyond
        `max_seconds` the error is a `BusyError`. Raises `MmiError` as `submit` does.
        """
        executor = self._scheduler.executor
        sequence = TokenSequence(executor.config, executor.limits)
        scoring = Scoring(
            sequence,
            self.runtime.tokenizer,
            _resized(document, executor.config.vision.image_size),
            continuations,
            min(executor.rows_of_a_run, len(executor.slots.slots)),
            Timings(),
        )
        found: Future[list[Score]] = Future()
        ends: list[Reason] = []

        def emit(item: Event | Exception | None) -> None:
            if isinstance(item, Finished):
                ends.append(item.reason)
            elif found.set_running_or_notify_cancel():
                _settle(found, item, ends[-1] if ends else "end", scoring)

        job = self._job(scoring, sequence, emit, priority, max_seconds, tenant)
        found.add_done_callback(lambda found: self._cancel(job) if found.cancelled() else None)
        self._queue(job)
        return found

    def _job(
        self,
        task: Task,
        sequence: TokenSequence,
        emit: Sink,
        priority: int,
        max_seconds: float | None,
        tenant: str,
    ) -> Job:
        """Job for a new task. Raises `ConfigError` for parameters of `submit` out of range."""
        # Here, as the thread that all documents share must not meet them.
        seconds: object = max_seconds
        for name, value, fits, expected in (
            ("priority", priority, isinstance(priority, Integral), "a whole number"),
            ("tenant", tenant, isinstance(tenant, str), "a string"),
            (
                "max_seconds",
                seconds,
                seconds is None or (isinstance(seconds, int | float) and seconds >= 0),
                "0 or more seconds",
            ),
        ):
            if not fits:
                raise ConfigError(f"{name} is out of range", expected=expected, got=repr(value))
        now, executor = self._clock(), self._scheduler.executor
        return Job(
            task,
            DocumentRow(sequence, tenant, executor.images, executor.unet_images),
            emit,
            priority=priority,
            deadline=None if max_seconds is None else now + max_seconds,
            arrival=now,
            number=next(self._arrivals),
        )

    def _queue(self, job: Job) -> None:
        with self._changed:
            if self._closed or self._broken:
                reason = f": {self._broken}" if self._broken else ""
                raise EngineError(f"the batch engine is closed{reason}", fix="open a new one")
            if self._draining:
                raise _draining()
            self._scheduler.check(job, len(self._inbox))
            self._inbox.append(job)
            self._changed.notify()

    def stats(self) -> EngineStats:
        """State and totals at this moment."""
        scheduler = self._scheduler
        counts, images = scheduler.runs.counts, scheduler.executor.images
        with self._changed:
            waiting = len(self._inbox) + len(scheduler.waiting)
        return EngineStats(
            slots=len(scheduler.executor.slots.slots),
            running=len(scheduler.running),
            waiting=waiting,
            ended=dict(scheduler.ends),
            tokens=counts.tokens,
            pictures=counts.pictures,
            given_tokens=counts.given,
            cached_tokens=counts.cached,
            images=images.kept,
            image_hits=images.hits,
            image_evictions=images.evictions,
            runs=dict(counts.runs),
            rows=dict(counts.rows),
            seconds=dict(counts.seconds),
            text_gap_p50=counts.gaps.percentile(50),
            text_gap_p99=counts.gaps.percentile(99),
            text_gap_bound=scheduler.text_gap_bound(),
        )

    def drain(self) -> None:
        """Finish the running documents; those that wait, and all later ones, get a `BusyError`."""
        with self._changed:
            self._draining = True  # those that wait are refused before the next run

    def close(self) -> None:
        """Cancel all documents and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        if self._owns_runtime:
            self.runtime.close()

    def __enter__(self) -> BatchEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cancel(self, job: Job) -> None:
        job.cancel()
        with self._changed:
            self._changed.notify()

    def _emit(self, stream: EventStream, job: Job, item: Event | Exception | None) -> None:
        if item is None or isinstance(item, Exception):
            stream.stats = job.stats(self._clock())
        if item is None:
            self.runtime.save_kernels()
        if isinstance(item, ImageDone):  # the receiver may write to it, the document keeps its own
            item = replace(item, rgb=item.rgb.copy())
        stream.emit(item)
        self._told[stream] = None

    def _run(self) -> None:
        """Turns of the scheduler until the engine is closed or breaks; then all documents end."""
        scheduler = self._scheduler
        try:
            self._turns()
            scheduler.cancel_all()
        except Exception as error:
            with self._changed:  # from here on `submit` adds no document
                self._broken = error
                scheduler.waiting += [job for job in self._inbox if job not in scheduler.waiting]
                self._inbox.clear()
            scheduler.fail_all(EngineError(f"the batch engine failed: {error}"))
        self._wake()

    def _wake(self) -> None:
        """Wake the readers of all streams with new events."""
        wake_all(self._told)
        self._told.clear()

    def _turns(self) -> None:
        worked = True
        while True:
            with self._changed:
                # Documents that wait or run always have a next run; without any, it may be long
                # until the next one comes.
                while not (worked or self._inbox or self._closed):
                    self._changed.wait()
                for job in self._inbox:
                    self._scheduler.add(job)
                self._inbox.clear()
                if self._closed:
                    return
            if self._draining:
                self._scheduler.refuse_waiting(_draining())
            worked = self._scheduler.turn()
            self._wake()


def _settle(found: Future[list[Score]], error: object, reason: Reason, scoring: Scoring) -> None:
    """Give the scores, or why there are none, to whoever waits for them."""
    if isinstance(error, Exception):
        found.set_exception(error)
    elif reason == "deadline":
        found.set_exception(BusyError("the continuations were not scored in time"))
    elif reason != "end":
        found.set_exception(EngineError(f"the continuations were not scored: {reason}"))
    else:
        found.set_result(scoring.scores)


def _draining() -> BusyError:
    return BusyError("the service is shutting down", fix="try again at another one")


def _resized(document: Document, side: int) -> Document:
    """The document with copies of its pictures at the model's size, which the caller cannot change
    any more. This takes the caller's time, not that of the thread that all documents share."""

    def resized(image: Image) -> Image:
        rgb = image.rgb
        return Image(rgb.copy() if rgb.shape == (side, side, 3) else resize(rgb, side), image.alt)

    return Document(
        tuple(resized(part) if isinstance(part, Image) else part for part in document.parts)
    )
