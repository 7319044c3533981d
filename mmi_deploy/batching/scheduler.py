"""Scheduler: which documents run, and which run of an engine comes next.

Every turn is one run (encoding: of two engines). What is computed for a document depends neither on
the order of turns nor on the rows beside it.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import ceil, inf

from mmi_deploy.batching.beam_rows import BeamRows
from mmi_deploy.batching.document_row import DocumentRow
from mmi_deploy.batching.executor import Executor
from mmi_deploy.batching.job import Job
from mmi_deploy.batching.job_runs import JobRuns, piece_sizes
from mmi_deploy.batching.kv_slots import Slot
from mmi_deploy.errors import BusyError, ConfigError, DocumentError
from mmi_deploy.runtime.events import Reason
from mmi_deploy.runtime.session import check_finite

# Runs on the way to a token, and on the way to a picture. Decode runs have a rule of their own.
TEXT = ("encode", "prefill")
PICTURE = ("values", "condition", "denoise", "shallow", "vae")

# Order of the runs while nobody waits for a text. Of a whole and a shallow step, the one of more
# pictures comes first.
RANKS = {"encode": 0, "prefill": 1, "decode": 2, "vae": 3, "values": 4, "condition": 5}
RANKS |= {"denoise": 6, "shallow": 6}

# Runs, over `max_wait`, after which the oldest work comes first in that order.
PATIENCE = 32

# Tokens of a finished document that are computed again in one idle turn.
IDLE_CHUNK = 64


@dataclass(frozen=True)
class Policy:
    """Rules of the scheduler.

    text_gap: seconds that a run may take while a text is being written, which makes runs smaller;
    None for twice a denoising step of one picture. Infinity: nobody waits for a text, and runs are
    as full as can be. picture_share: share of the time that pictures get while prompts wait as
    well, between 0 and 1. max_wait: runs besides decoding after which the run that waits longest
    comes first. overtakes: later documents that may get a slot before a document that does not fit
    yet. queue: documents that may wait for a slot. queue_seconds: time that a document may wait
    for it.
    """

    text_gap: float | None = None
    picture_share: float = 1 / 3
    max_wait: int = 8
    overtakes: int = 16
    queue: int = 64
    queue_seconds: float = inf

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a value out of range."""
        for name, fits, expected in (
            ("text_gap", self.text_gap is None or self.text_gap >= 0, "0 or more seconds"),
            ("picture_share", 0 < self.picture_share < 1, "between 0 and 1"),
            ("max_wait", self.max_wait >= 1, "1 or more"),
            ("overtakes", self.overtakes >= 0, "0 or more"),
            ("queue", self.queue >= 0, "0 or more"),
            ("queue_seconds", self.queue_seconds >= 0, "0 or more seconds"),
        ):
            if not fits:
                raise ConfigError(
                    f"{name} is out of range", expected=expected, got=getattr(self, name)
                )


DEFAULT_POLICY = Policy()


class Scheduler:
    """Documents that wait and run, and the rule that picks the next run. Not thread-safe."""

    def __init__(
        self,
        executor: Executor,
        policy: Policy = DEFAULT_POLICY,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.executor, self.policy, self.clock = executor, policy, clock
        self.runs = JobRuns(executor, clock, self._advance, self._fail)
        self.waiting: list[Job] = []  # in the order of admission
        self.running: list[Job] = []
        self.ends: Counter[str] = Counter()  # documents by the reason of their end, or `error`
        self._round: list[Job] = []  # texts to decode before another run may come
        self._spent = {"text": 0.0, "picture": 0.0}  # seconds over share
        self._reserved = 0  # rows of the image pool that running documents may need
        # Finished documents that idle turns prepare for their next turn.
        self._unsettled: OrderedDict[Slot, DocumentRow] = OrderedDict()

    def check(self, job: Job, ahead: int = 0) -> None:
        """Raise `BusyError` if the queue is full, `DocumentError` for a document that can never
        run. ahead: documents that will be added before it. Any thread may call it."""
        most = self.executor.images.rows
        given, slots = len(job.task.encoded.images), len(self.executor.slots.slots)
        if job.slots > slots:
            raise ConfigError(
                "beams are more than the service has slots",
                expected=f"at most {slots}",
                got=job.slots,
                fix="ask for fewer beams, or give the service more slots with --slots",
            )
        if given > most:
            raise DocumentError(
                "the document has more pictures than the pool of images has rows",
                expected=f"at most {most}",
                got=given,
                fix="give the service more memory for images",
            )
        if len(self.waiting) + ahead >= self.policy.queue + max(self._free_slots, 0):
            raise BusyError(
                "the queue is full",
                expected=f"at most {self.policy.queue} waiting documents",
                fix="try again later",
            )

    def add(self, job: Job) -> None:
        """Queue a document that `check` has passed."""
        wanted = len(job.task.encoded.images) + job.task.drawable
        job.images = min(wanted, self.executor.images.rows, self.executor.limits.images)
        insort(self.waiting, job, key=lambda other: (-other.priority, other.number))

    @property
    def idle(self) -> bool:
        """True if no document waits or runs."""
        return not self.waiting and not self.running

    def turn(self) -> bool:
        """Do one run; False if there is nothing to do."""
        self._stop_early()
        self._admit()
        ready = self._ready()
        if not ready:
            self._round = []
            return self._settle()
        if self.text_gap() == inf:
            self.runs.run(self._fullest(ready), inf)
        else:
            self._take_turns(ready)
        return True

    def refuse_waiting(self, error: Exception) -> None:
        """End the documents that wait for a slot with an error."""
        for job in list(self.waiting):
            self._fail(job, error)

    def cancel_all(self) -> None:
        """End all documents as cancelled."""
        for job in [*self.running, *self.waiting]:
            self._stop(job, "cancelled")

    def fail_all(self, error: Exception) -> None:
        """End all documents with an error, after one that leaves the state of the runs unknown. No
        document can be added afterwards."""
        for job in [*self.running, *self.waiting]:
            self.ends["error"] += 1
            with suppress(Exception):
                job.fail(error)
                job.end()
        self.running.clear()
        self.waiting.clear()

    def text_gap(self) -> float:
        """Seconds that a run besides decoding should take at most while a text is written."""
        if self.policy.text_gap is not None:
            return self.policy.text_gap
        return 2 * self.runs.times.expected("denoise", 1)

    def text_gap_bound(self) -> float:
        """Seconds that a running text waits at most for its next token, from the longest of the
        last runs: one other run, of the size that the text gap allows, and the decode runs of all
        slots. Infinity if nobody waits for a text."""
        gap, times, executor = self.text_gap(), self.runs.times, self.executor
        if gap == inf:
            return inf
        sizes = executor.row_counts
        other = [
            times.worst(kind, times.largest(kind, sizes, gap)) for kind in ("encode", *PICTURE)
        ]
        pieces = piece_sizes(executor.limits.context)
        other.append(times.worst("prefill", times.largest("prefill", pieces, gap)))
        # The beams of a document share a run, so that the last rows of one may stay empty.
        widest = max((job.slots for job in self.running.copy()), default=1)
        runs = ceil(len(executor.slots.slots) / (executor.rows_of_a_run - widest + 1))
        return max(other) + runs * times.worst("decode", executor.rows_of_a_run)

    # Joining and leaving.

    @property
    def _free_slots(self) -> int:
        return len(self.executor.slots.slots) - sum(job.slots for job in self.running.copy())

    def _stop_early(self) -> None:
        """End the documents that were cancelled, or whose time is over."""
        now = self.clock()
        for job in [*self.running, *self.waiting]:
            reason = job.stopped(now)
            if reason is not None:
                self._stop(job, reason)
        seconds = self.policy.queue_seconds
        for job in [job for job in self.waiting if now - job.arrival > seconds]:
            self._fail(job, BusyError(f"the document waited {seconds:g} s for a slot"))

    def _admit(self) -> None:
        """Give slots to waiting documents in their order. One that does not fit does not stop those
        behind it, unless too many have overtaken it."""
        passed: list[Job] = []
        for job in list(self.waiting):
            if not self._free_slots:
                return
            too_many_images = self._reserved + job.images > self.executor.images.rows
            if too_many_images or job.slots > self._free_slots:
                if job.overtaken >= self.policy.overtakes:
                    return
                passed.append(job)
                continue
            for other in passed:
                other.overtaken += 1
            self.waiting.remove(job)
            self.runs.guarded(job, partial(self._begin, job))

    def _begin(self, job: Job) -> None:
        self.running.append(job)
        self._reserved += job.images
        job.admitted = self.clock()
        if job.advance():
            self._leave(job, job.reason)
            return
        ids = job.row.sequence.token_ids
        slot, *further = self._take_slots(job)
        job.row.begin(slot)
        job.beams = BeamRows(job.row, further, self.executor.slots)
        job.given, job.cached = len(ids), job.row.processed
        self.runs.counts.given += job.given
        self.runs.counts.cached += job.cached
        job.refresh(self.runs.turn)

    def _take_slots(self, job: Job) -> list[Slot]:
        """Slots for a job: the first with a prefix of its document, the others empty."""
        slots, row = self.executor.slots, job.row
        taken = [slots.take(row.salt, row.sequence.token_ids, row.keys)]
        taken += [slots.take(row.salt, [], []) for _ in range(job.slots - 1)]
        for slot in taken:
            assert slot is not None, "a slot is free"
            self._unsettled.pop(slot, None)
        return [slot for slot in taken if slot is not None]

    def _advance(self, job: Job, result: object) -> None:
        """Hand over the result of a run: the job's next work becomes ready, or it ends."""
        if job.advance(result):
            self._leave(job, job.reason)
        else:
            job.refresh(self.runs.turn)

    def _stop(self, job: Job, reason: Reason) -> None:
        if self.runs.guarded(job, partial(job.stop, reason)):
            self._leave(job, reason)

    def _fail(self, job: Job, error: Exception) -> None:
        job.fail(error)
        self._leave(job, "error")

    def _leave(self, job: Job, reason: str) -> None:
        """Take a document that has ended out of the queue, or out of its slot and rows; then say
        so."""
        self.ends[reason] += 1
        job.stage = "ended"
        if job in self.waiting:
            self.waiting.remove(job)
        else:
            self.running.remove(job)
            self._free(job, failed=reason == "error")
        with suppress(Exception):  # a sink that raises must not end other documents
            job.end()

    def _free(self, job: Job, failed: bool) -> None:
        """Let go of all that a running document holds."""
        self._reserved -= job.images
        self.runs.leave_picture(job)
        job.row.release()
        if failed:  # its cause may be values that are not finite, by a fault of one run
            for pool in (self.executor.images, self.executor.unet_images):
                pool.forget(job.row.keys)
        slots, slot = self.executor.slots, job.row.slot
        if slot is None:
            return
        if job.beams is not None:
            job.beams.end_search()
            for further in job.beams.slots[1:]:
                further.truncate(0, job.row.sequence.config.tokens.boi)  # the first to be reused
                slots.release(further, failed)
        if slots.exact:
            slot.truncate(slot.exact, job.row.sequence.config.tokens.boi)
        slots.release(slot, failed)
        if not failed:
            self._unsettled[slot] = job.row

    # Choosing.

    def _ready(self) -> list[Job]:
        """Documents that are ready for a run, the oldest first."""
        full = len(self.runs.drawing) == self.executor.pictures.rows
        ready = [
            job
            for job in self.running
            if not (full and job.picture_row is None and job.stage in ("values", "condition"))
        ]
        return sorted(ready, key=lambda job: (job.ready, -job.priority, job.number))

    def _take_turns(self, ready: list[Job]) -> None:
        """Decode all texts after every other run, so that none of them waits long."""
        texts = [job for job in ready if job.stage == "decode"]
        others = [job for job in ready if job.stage != "decode"]
        self._round = [job for job in self._round if job in texts]
        if not self._round and not others:
            self._round = texts
        if self._round:
            chosen = self._first_rows(self._round)
            self._round = self._round[len(chosen) :]
            self.runs.run(chosen, inf)
        else:
            self._run_other(others, self.text_gap() if texts else inf)
            self._round = [job for job in self.running if job.stage == "decode"]

    def _run_other(self, others: list[Job], gap: float) -> None:
        """Run what is due of `others`, for at most `gap` seconds."""
        text = [job for job in others if job.stage in TEXT]
        picture = [job for job in others if job.stage in PICTURE]
        spent = self._spent
        if self.runs.turn - others[0].ready > 2 * self.policy.max_wait:  # decode runs count too
            kind = "text" if others[0].stage in TEXT else "picture"
        elif text and picture:
            kind = "text" if spent["text"] <= spent["picture"] else "picture"
        else:
            kind, other = ("text", "picture") if text else ("picture", "text")
            # The share of a kind that has nothing to do is not saved up.
            spent[other] = max(spent[other], spent[kind])
        due = text if kind == "text" else picture
        same = [job for job in due if job.stage == due[0].stage]
        seconds = self.runs.run(same, gap)
        share = self.policy.picture_share if kind == "picture" else 1 - self.policy.picture_share
        spent[kind] += seconds / share

    def _fullest(self, ready: list[Job]) -> list[Job]:
        """Documents for the next run if nobody waits for a text: the cheap runs first, so that
        pictures gather for full denoising runs, which take most of the time."""
        stages = Counter(job.stage for job in ready)
        stage = min(stages, key=lambda stage: (RANKS[stage], -stages[stage]))
        if self.runs.turn - ready[0].ready > PATIENCE * self.policy.max_wait:
            stage = ready[0].stage
        same = [job for job in ready if job.stage == stage]
        return self._first_rows(same) if stage == "decode" else same

    def _first_rows(self, jobs: list[Job]) -> list[Job]:
        """The first of the jobs, as many as a decode run has rows for."""
        ends = accumulate(job.decoded_rows for job in jobs)
        return jobs[: sum(end <= self.executor.rows_of_a_run for end in ends)]

    def _settle(self) -> bool:
        """Prepare a finished document for its next turn, with one run; False if there is nothing to
        do. Its last pictures are encoded, and tokens that were decoded one by one are computed
        again in a longer run."""
        slots = self.executor.slots
        while self._unsettled:
            slot, row = next(iter(self._unsettled.items()))
            # One place stays free for the idle rows of a run.
            pending = min(len(row.sequence.token_ids), slots.context - 1) - row.processed
            count = min(pending, IDLE_CHUNK)
            count -= pending - count == 1
            images = self.executor.images
            pictures = dict(zip(row.keys, row.sequence.pictures, strict=True))
            missing = [key for key in pictures if key not in images]
            if len(pictures) > images.rows or not (missing or count > 1):
                del self._unsettled[slot]
                continue
            try:
                row.images.missing(row.keys)  # holds the others
                if missing:
                    few = missing[: self.executor.rows_of_a_run]
                    self.executor.encode({key: pictures[key] for key in few})
                else:
                    row.begin(slot)
                    check_finite(self.executor.prefill(row, count), "the logits")
            except Exception:  # no document waits for it
                del self._unsettled[slot]
                slots.release(slot, failed=True)
            row.release()
            return True
        return False
