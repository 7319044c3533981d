"""Runs of the scheduler: jobs in, an engine's run, its results handed to each job.

An error ends the job that is its cause, and no other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mmi_deploy.batching.document_row import DocumentRow
from mmi_deploy.batching.executor import Executor
from mmi_deploy.batching.image_rows import Key
from mmi_deploy.batching.job import Job
from mmi_deploy.batching.run_times import Recent, RunTimes
from mmi_deploy.documents.images import Rgb, to_rgb
from mmi_deploy.runtime.sampling import Sampled, sample_rows
from mmi_deploy.runtime.session import Logits, check_finite
from mmi_deploy.runtime.timings import Timing
from mmi_deploy.runtime.work import BeamStep, Condition, DecodeLatents, Denoise, NextToken
from mmi_deploy.system.nvtx import profiler_range

# Smallest piece of a prompt, in tokens. At least 3: a piece must not leave a single token.
CHUNK = 16


@dataclass
class Counts:
    """Totals since the start.

    runs, rows, seconds: of each kind of run; rows are documents, images or tokens. given, cached:
    tokens of the documents, and those of them that were found in a slot. gaps: seconds between two
    tokens of a text.
    """

    runs: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    pictures: int = 0
    given: int = 0
    cached: int = 0
    gaps: Recent = field(default_factory=Recent)


class JobRuns:
    """Runs for jobs: each is measured, and each job gets its result."""

    def __init__(
        self,
        executor: Executor,
        clock: Callable[[], float],
        advance: Callable[[Job, object], None],
        fail: Callable[[Job, Exception], None],
    ) -> None:
        """advance: hands a result to a job. fail: ends a job with an error."""
        self.executor, self.clock = executor, clock
        self.times, self.counts = RunTimes(), Counts()
        self.drawing: list[Job] = []  # by row of the pictures
        self.turn = 0  # runs so far
        self._advance, self._fail = advance, fail

    def guarded(self, job: Job, do: Callable[[], None]) -> bool:
        """Do something for one job; an error ends this job alone. Returns False if it did."""
        try:
            do()
        except Exception as error:
            self._fail(job, error)
            return False
        return True

    def leave_picture(self, job: Job) -> None:
        """Free the row of the job's picture; the others stay dense."""
        if job.picture_row is None:
            return
        self._swap(job.picture_row, len(self.drawing) - 1)
        self.drawing.pop()
        job.picture_row = None
        job.row.unet_images.release()

    def run(self, jobs: Sequence[Job], gap: float) -> float:
        """Do the run that `jobs` of one stage, the oldest first, are ready for, for as many of them
        as take at most `gap` seconds; returns its seconds."""
        self.turn += 1
        before = sum(self.counts.seconds.values())
        match jobs[0].stage:
            case "encode":
                self._encode(jobs, gap)
            case "prefill":
                self._prefill(jobs[0], gap)
            case "decode":
                self._isolated(jobs, self._decode)
            case "values" | "condition":
                self._condition(jobs[0], gap)
            case "denoise" | "shallow":
                self._isolated(self._most(jobs, gap), self._denoise)
            case "vae":
                self._isolated(self._most(jobs, gap), self._decode_latents)
        return sum(self.counts.seconds.values()) - before

    def _swap(self, row: int, other: int) -> None:
        """Exchange two rows of pictures."""
        if row == other:
            return
        self.executor.pictures.swap(row, other)
        drawing = self.drawing
        drawing[row], drawing[other] = drawing[other], drawing[row]
        drawing[row].picture_row, drawing[other].picture_row = row, other

    def _most(self, jobs: Sequence[Job], gap: float) -> Sequence[Job]:
        """The first of `jobs`, as many as fit into a run of at most `gap` seconds."""
        sizes = self.executor.row_counts
        return jobs[: self.times.largest(jobs[0].stage, sizes, gap)]

    def _isolated(self, jobs: Sequence[Job], run: Callable[[Sequence[Job]], None]) -> None:
        """Do a run for `jobs`. If it raises, it is repeated for each job alone, so that only the
        one that is the cause ends."""
        try:
            run(jobs)
        except Exception as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return
            for job in jobs:
                self._isolated([job], run)

    @contextmanager
    def _measured(self, kind: str, size: int, shares: Mapping[Job, int]) -> Iterator[None]:
        """Measure the block as a run, unless it raises. size: rows, images or tokens with padding.
        shares: job -> its own."""
        start = self.clock()
        with profiler_range(kind):
            yield
        seconds = self.clock() - start
        counts = self.counts
        self.times.add(kind, size, seconds)
        counts.runs[kind] += 1
        counts.rows[kind] += sum(shares.values())
        counts.seconds[kind] = counts.seconds.get(kind, 0.0) + seconds
        stage = "denoise" if kind == "shallow" else kind
        for job, count in shares.items():
            job.task.timings.runs.append(Timing(stage, seconds, count))

    def _encode(self, jobs: Sequence[Job], gap: float) -> None:
        """Encode pictures that jobs wait for, those of the oldest job first."""
        wanted: dict[Key, tuple[Rgb, Job]] = {}
        for job in jobs:
            pictures = dict(zip(job.row.keys, job.row.sequence.pictures, strict=True))
            for key in job.row.images.missing(pictures):
                wanted.setdefault(key, (pictures[key], job))
        most = self.times.largest("encode", self.executor.row_counts, gap)
        chosen = list(wanted.items())[:most]
        owners = list(dict.fromkeys(job for _, (_, job) in chosen))

        def run(jobs: Sequence[Job]) -> None:
            pictures = {key: rgb for key, (rgb, job) in chosen if job in jobs}
            shares = Counter(job for _, (_, job) in chosen if job in jobs)
            with self._measured("encode", self.executor.padded(len(pictures)), shares):
                self.executor.encode(pictures)

        if owners:
            self._isolated(owners, run)
        for job in jobs:
            if job.stage == "encode":  # not if it has ended with an error
                job.refresh(self.turn if job in owners else job.ready)

    def _prefill(self, job: Job, gap: float) -> None:
        """Run the LLM over a piece of a job's pending tokens."""
        row = job.row
        assert row.slot is not None, "a job that runs has a slot"
        if not job.searched:
            # Only now: a document that began earlier may have computed the same prefix meanwhile.
            job.searched = True
            # Unless it has begun with a decode run, of the one token that a prefix had left.
            if row.processed == job.cached and self.executor.slots.extend(
                row.slot, row.salt, row.sequence.token_ids, row.keys
            ):
                row.begin(row.slot)
                self.counts.cached += row.processed - job.cached
                job.cached = row.processed
        count = self._piece(len(row.pending), gap)

        def run(_: Sequence[Job]) -> None:
            with self._measured("prefill", _power_of_two(count), {job: count}):
                logits = self.executor.prefill(row, count)
            self._take_logits(job, [logits])

        self._isolated([job], run)

    def _piece(self, pending: int, gap: float) -> int:
        """Number of the pending tokens to run at once."""
        count = min(pending, self.times.largest("prefill", piece_sizes(pending), gap))
        # A run of a single token would round differently from a longer one.
        return count - 1 if pending - count == 1 else count

    def _decode(self, jobs: Sequence[Job]) -> None:
        of_jobs = {job: _decoded(job) for job in jobs}
        rows = [row for of_job in of_jobs.values() for row in of_job]
        shares = {job: len(of_job) for job, of_job in of_jobs.items()}
        with self._measured("decode", self.executor.padded(len(rows)), shares):
            logits = iter(self.executor.decode(rows))
        for job, of_job in of_jobs.items():
            self.guarded(job, partial(self._take_logits, job, [next(logits) for _ in of_job]))

    def _take_logits(self, job: Job, logits: Sequence[Logits]) -> None:
        """Take the logits [u] after the job's tokens, or after each of its beams: sample its token,
        or hand them to its search, if all its tokens are processed and it wants one."""
        for row in logits:
            check_finite(row, f"the logits after {job.row.processed} tokens")
        if job.row.pending or not isinstance(job.work, NextToken | BeamStep):
            job.refresh(self.turn)
            return
        found: Sampled | Sequence[Logits] = logits
        begins_picture = False
        if isinstance(job.work, NextToken):
            (sampled,) = sample_rows(logits[0][None], [job.work.request])
            begins_picture = sampled.token == job.row.sequence.config.tokens.boi
            found = sampled
        if job.task.writes:
            self._count_token(job, begins_picture)
        self._advance(job, found)

    def _count_token(self, job: Job, begins_picture: bool) -> None:
        now = self.clock()
        self.counts.tokens += 1
        if job.first is None:
            job.first = now
        if job.last_token is not None:
            self.counts.gaps.add(now - job.last_token)
        job.last_token = None if begins_picture else now

    def _condition(self, job: Job, gap: float) -> None:
        """Compute the U-Net's values of the images that a picture may see, or else its condition.
        The job keeps a row of the pictures from here on."""
        work, row = job.work, job.row
        assert isinstance(work, Condition), "only a condition is made from values"
        if job.picture_row is None:
            job.picture_row = len(self.drawing)
            self.drawing.append(job)
        missing = row.unet_images.missing(row.seen_by_picture(work.picture.index))
        most = self.times.largest("values", range(1, max(len(missing), 1) + 1), gap)
        images = {key: row.images.row(key) for key in missing[:most]}
        at = job.picture_row

        def values(_: Sequence[Job]) -> None:
            with self._measured("values", len(images), {job: len(images)}):
                self.executor.unet_values(images)
            job.refresh(self.turn)

        def condition(_: Sequence[Job]) -> None:
            with self._measured("condition", 1, {job: 1}):
                self.executor.condition(row, work.picture, at)
            self._advance(job, None)

        self._isolated([job], values if images else condition)

    def _denoise(self, jobs: Sequence[Job]) -> None:
        """Run a step of some pictures, whose rows are brought to the front before."""
        rows = [job.picture_row for job in jobs if job.picture_row is not None]
        holes = [row for row in range(len(rows)) if row not in rows]
        outside = [row for row in rows if row >= len(rows)]
        for row, hole in zip(outside, holes, strict=True):
            self._swap(row, hole)
        jobs = self.drawing[: len(rows)]
        kind = jobs[0].stage
        steps = [job.work for job in jobs if isinstance(job.work, Denoise)]
        with self._measured(kind, self.executor.padded(len(jobs)), dict.fromkeys(jobs, 1)):
            self.executor.denoise(steps)
        for job in jobs:
            self.guarded(job, partial(self._end_step, job))

    def _end_step(self, job: Job) -> None:
        """Hand over the preview of the job's step, if it wants one; read after the run, which is
        measured and repeated without it."""
        work, row = job.work, job.picture_row
        assert isinstance(work, Denoise) and row is not None, "a step has a row"
        if not work.preview:
            self._advance(job, None)
            return
        pixels = self.executor.pictures.preview(row)
        check_finite(pixels, f"the pixels of a preview of picture {work.picture.index}")
        self._advance(job, to_rgb(pixels))

    def _decode_latents(self, jobs: Sequence[Job]) -> None:
        rows = [job.picture_row for job in jobs if job.picture_row is not None]
        with self._measured("vae", self.executor.padded(len(jobs)), dict.fromkeys(jobs, 1)):
            pictures = self.executor.decode_latents(rows)
        for job, pixels in zip(jobs, pictures, strict=True):
            self.guarded(job, partial(self._end_picture, job, pixels))

    def _end_picture(self, job: Job, pixels: NDArray[np.float32]) -> None:
        assert isinstance(job.work, DecodeLatents), "a picture ends with its latents"
        check_finite(pixels, f"the pixels of picture {job.work.picture.index}")
        self.leave_picture(job)
        self.counts.pictures += 1
        if job.first is None:
            job.first = self.clock()
        self._advance(job, to_rgb(pixels))


def _decoded(job: Job) -> list[DocumentRow]:
    """Rows that a decode run computes for a job: one, or in a search that of each beam."""
    if job.beams is not None and isinstance(job.work, BeamStep) and job.work.tokens:
        return job.beams.grow(job.work)
    return [job.row]


def piece_sizes(tokens: int) -> list[int]:
    """Sizes of pieces of a prompt of `tokens` tokens, the smallest first."""
    sizes = [CHUNK]
    while sizes[-1] < tokens:
        sizes.append(2 * sizes[-1])
    return sizes


def _power_of_two(count: int) -> int:
    """Smallest power of two of at least `count`."""
    return 1 << (count - 1).bit_length()
