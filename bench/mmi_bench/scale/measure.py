"""Measurement of growth: documents of a session along each axis, and runs of several rows.

Rounds visit all points, each round in the reverse order of the one before; the first is a warm-up.
So a machine that becomes slower or faster meanwhile shifts all points alike.
"""

from __future__ import annotations

import gc
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mmi_bench.machine import describe
from mmi_bench.scale.cases import (
    DECODE,
    DENOISE,
    ENCODE,
    IMAGES,
    MEMORY,
    PICTURE,
    PREFILL,
    QUANTITIES,
    ROWS,
    STEPS,
    TOKENS,
    VAE,
    Plan,
    plan,
)
from mmi_bench.scale.expectations import MISSED, Expectation, expectation
from mmi_bench.scale.fit import Fit, fit
from mmi_deploy.batching.executor import Executor
from mmi_deploy.batching.run_times import RunTimes
from mmi_deploy.batching.warm_up import warm_up
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.backend import find_kernel_library
from mmi_deploy.runtime.buffers import HOST, Memory
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.session import Session
from mmi_deploy.runtime.timings import Timing, Timings
from mmi_deploy.runtime.work import Picture
from mmi_deploy.spec.backends import AUTO, CPU, NONE
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.system.process_memory import (
    anonymous_bytes,
    forget_peak,
    memory_bytes,
    peak_bytes,
    trim,
)
from mmi_deploy.system.progress import Progress, silent

# Tokens of a document whose number of steps varies.
_SHORT = 16

Sample = dict[str, float]


class CpuTimings(Timings):
    """Timings by the CPU time of the process."""

    @contextmanager
    def measure(self, stage: str, count: int = 1, memory: Memory = HOST) -> Iterator[None]:
        start = time.process_time()
        yield
        self.runs.append(Timing(stage, time.process_time() - start, count))


@dataclass(frozen=True)
class Series:
    """Growth of one quantity along an axis: seconds, or bytes of memory, by round and point."""

    axis: str
    quantity: str
    points: tuple[int, ...]
    rounds: Sequence[Sequence[float]]
    fit: Fit

    @property
    def medians(self) -> list[float]:
        """Median of the rounds at each point."""
        return [median(values) for values in zip(*self.rounds, strict=True)]

    @property
    def expectation(self) -> Expectation | None:
        return expectation(self.quantity, self.axis)

    @property
    def verdict(self) -> str | None:
        """`met`, `missed` or `undecided`; None if nothing is expected."""
        return self.expectation.verdict(self.fit) if self.expectation else None

    def to_json(self) -> dict[str, Any]:
        expected = self.expectation
        return {
            "axis": self.axis,
            "quantity": self.quantity,
            "unit": "bytes" if self.quantity == MEMORY else "seconds",
            "points": list(self.points),
            "medians": self.medians,
            "rounds": [list(values) for values in self.rounds],
            **self.fit.to_json(),
            "expectation": {**vars(expected), "verdict": self.verdict} if expected else None,
        }


@dataclass(frozen=True)
class ScaleResult:
    """All series, with their provenance in `about`."""

    about: dict[str, Any]
    series: Sequence[Series]

    @property
    def missed(self) -> list[Series]:
        return [one for one in self.series if one.verdict == MISSED]

    def to_json(self) -> dict[str, Any]:
        return {"about": self.about, "series": [one.to_json() for one in self.series]}


def run(
    bundle: Path,
    *,
    rounds: int = 7,
    quick: bool = False,
    threads: int = 2,
    target: str = CPU,
    device: int = 0,
    kernels: str = AUTO,
    unproved: bool = False,
    cpu_time: bool = False,
    progress: Progress = silent,
) -> ScaleResult:
    """Measure a bundle; see `measure`. Raises `MmiError`."""
    opened = Bundle.open(bundle, unproved=unproved)
    library = find_kernel_library(target, kernels)
    runtime = Runtime.open(
        opened, target=target, kernels=library or NONE, threads=threads, device=device
    )
    about = {
        "argv": sys.argv,
        "model": opened.config.name,
        "bundle_sha256": opened.identity,
        "target": target,
        "threads": threads,
        "kernels": library.name if library else NONE,
        "machine": describe(),
    }
    try:
        found = measure(runtime, rounds, quick, cpu_time, progress)
    finally:
        runtime.close()
    return ScaleResult({**about, **found.about}, found.series)


def measure(
    runtime: Runtime,
    rounds: int,
    quick: bool = False,
    cpu_time: bool = False,
    progress: Progress = silent,
) -> ScaleResult:
    """Measure every series over `rounds` rounds after a warm-up round.

    cpu_time: of the process, in place of wall time; right with one thread alone, since some wait
    busily. Raises `ConfigError` for a bundle whose context is too short, and for fewer rounds than
    an interval takes.
    """
    if rounds < 2:
        raise ConfigError("--rounds is out of range", expected="2 or more", got=rounds)
    longest = max(runtime.schedules or (None,), key=lambda k: runtime.schedule(k).schedule.steps)
    steps = runtime.schedule(longest).schedule.steps
    planned = plan(runtime.config, runtime.limits, steps, quick)
    runtime.load()
    work = _Work(runtime, planned, longest, cpu_time)
    visits = [(axis, x) for axis, points in planned.points.items() for x in points]
    samples: defaultdict[tuple[str, int], list[Sample]] = defaultdict(list)
    with _frozen():
        for number in range(rounds + 1):
            for index, (axis, x) in enumerate(reversed(visits) if number % 2 else visits):
                progress(
                    "measuring" if number else "warming up",
                    number * len(visits) + index,
                    (rounds + 1) * len(visits),
                    detail=f"{x} {axis}",
                )
                sample = work.at(axis, x)
                if number:
                    samples[axis, x].append(sample)
    about = {
        "rounds": rounds,
        "quick": quick,
        "clock": "CPU" if cpu_time else "wall",
        "schedule": longest or runtime.schedule().schedule.key,
        "context": planned.context,
        "memory": work.memory_kind,
    }
    if (memory := runtime.backend.plan()) is not None:
        about["memory_plan_bytes"] = memory.total
    return ScaleResult(about, list(_series(planned, samples)))


@contextmanager
def _frozen() -> Iterator[None]:
    """Keep what exists out of garbage collections, which then take no time beside the documents."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _series(planned: Plan, samples: Mapping[tuple[str, int], Sequence[Sample]]) -> Iterator[Series]:
    """Series of every quantity with three points or more on an axis."""
    for axis, points in planned.points.items():
        for quantity in QUANTITIES:
            known = tuple(x for x in points if quantity in samples[axis, x][0])
            if len(known) < 3:
                continue
            by_point = [[sample[quantity] for sample in samples[axis, x]] for x in known]
            rounds = list(zip(*by_point, strict=True))
            yield Series(axis, quantity, known, rounds, fit(known, rounds))


class _Work:
    """Documents and runs of one model."""

    def __init__(
        self, runtime: Runtime, planned: Plan, schedule: str | None, cpu_time: bool
    ) -> None:
        self._cpu_time = cpu_time
        self._clock = time.process_time if cpu_time else time.perf_counter
        self._runtime, self._plan, self._schedule = runtime, planned, schedule
        self._ids = _text_ids(runtime.config, runtime.limits.context)
        side = runtime.config.vision.image_size
        draw = np.random.default_rng(0)
        most = max(planned.points[IMAGES])
        self._pictures = draw.integers(0, 256, (most, side, side, 3), np.uint8)
        self._peaks = forget_peak()
        self._on_host = runtime.memory.device == HOST.device
        self._visits: dict[str, Callable[[int], Sample]] = {
            IMAGES: self._at_images,
            TOKENS: self._at_tokens,
            ROWS: self._at_rows,
            STEPS: self._at_steps,
        }

    @property
    def memory_kind(self) -> str:
        """Measure of memory."""
        if not self._on_host:
            return "of the GPU, planned"
        if self._peaks:
            return "peak above the loaded engines"
        return "held above the loaded engines" if anonymous_bytes() is not None else "not measured"

    def at(self, axis: str, x: int) -> Sample:
        """Measure a point: quantity -> seconds or bytes."""
        return self._visits[axis](x)

    def _at_images(self, images: int) -> Sample:
        """A document of `images` images, filled up with text to an equal length, some tokens and a
        picture."""
        sample: Sample = {}
        with self._memory(sample):
            session = self._document(self._plan.context, images)
            sample |= self._read(session)
            if images:
                sample[ENCODE] = sum(session.timings.seconds("encode"))
            sample |= self._draw(session, self._plan.drawn)
        return sample

    def _at_tokens(self, tokens: int) -> Sample:
        """A document of `tokens` tokens of text, some more, and a picture."""
        sample: Sample = {}
        with self._memory(sample):
            session = self._document(tokens, 0)
            sample |= self._read(session)
            sample[PICTURE] = self._draw(session, self._plan.drawn)[PICTURE]
        return sample

    def _at_steps(self, steps: int) -> Sample:
        """A picture of `steps` steps after a short document: the first ones of the sampler."""
        sample: Sample = {}
        with self._memory(sample):
            session = self._document(_SHORT, 0)
            session.next_logits()
            sample |= self._draw(session, steps)
        return sample

    def _at_rows(self, rows: int) -> Sample:
        """Runs of `rows` rows on the buffers of as many documents at once."""
        sample: Sample = {}
        with self._memory(sample):
            executor, times = Executor(self._runtime, rows, rows), RunTimes()
            warm_up(executor, times, self._clock)
            for kind in (DECODE, VAE, ENCODE, DENOISE):
                if kind != DENOISE or rows <= executor.pictures.rows:
                    sample[kind] = times.expected(kind, rows)
        return sample

    def _document(self, tokens: int, images: int) -> Session:
        """A document of `tokens` tokens that begins with `images` images."""
        session = Session(self._runtime)
        session.timings = CpuTimings() if self._cpu_time else Timings()
        session.append_text([self._runtime.config.tokens.bos])
        for rgb in self._pictures[:images]:
            session.append_image(rgb)
        session.append_text(self._ids[: tokens - len(session.token_ids)])
        return session

    def _read(self, session: Session) -> Sample:
        """Read the document, then decode tokens one by one."""
        session.next_logits()
        for token in self._ids[: self._plan.decoded]:
            session.append_text([token])
            session.next_logits()
        timings = session.timings
        return {
            PREFILL: sum(timings.seconds("prefill")),
            DECODE: median(timings.seconds("decode")),
        }

    def _draw(self, session: Session, steps: int) -> Sample:
        """Draw a picture of `steps` steps."""
        guidance = session.config.image_decoder.guidance_of(None)
        picture = Picture(session.images, self._schedule, guidance, seed=0)
        session.append_text([self._runtime.config.tokens.boi])
        session.next_logits()  # the token belongs to the text
        start = self._clock()
        session.begin(picture)
        for step in range(steps):
            session.denoise(picture, step)
        session.decode_latents(picture)
        seconds = self._clock() - start
        return {PICTURE: seconds, DENOISE: median(session.timings.seconds("denoise"))}

    @contextmanager
    def _memory(self, sample: Sample) -> Iterator[None]:
        """Add the memory of the block: its peak, or what it holds at its end."""
        gc.collect()  # buffers of the last document
        trim()
        if not self._on_host:
            yield
            return
        forget_peak()
        before = memory_bytes() if self._peaks else anonymous_bytes()
        yield
        after = peak_bytes() if self._peaks else anonymous_bytes()
        if before is not None and after is not None:
            # A fit needs positive numbers: a page at least.
            sample[MEMORY] = float(max(after - before, 4096))


def _text_ids(config: ModelConfig, count: int) -> list[int]:
    """`count` ids of text."""
    tokens = config.tokens
    special = {tokens.bos, tokens.pad, tokens.boi, tokens.image, *tokens.ends}
    usual = [token for token in range(config.llama.vocab) if token not in special]
    draw = np.random.default_rng(0)
    return [usual[index] for index in draw.integers(0, len(usual), count)]
