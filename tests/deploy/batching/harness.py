"""Scheduler and jobs under a fake clock, and the answers that they are compared with.

`Service` drives a `Scheduler` turn by turn. `Alone` is a document by itself, computed by `generate`
over a `Session`, with the result of each item of work: from these the events of a document that is
stopped after any of them are replayed without an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deploy.batching.exact_model import Hooks
from mmi_deploy.batching.document_row import DocumentRow
from mmi_deploy.batching.executor import Executor
from mmi_deploy.batching.job import Job
from mmi_deploy.batching.scheduler import DEFAULT_POLICY, Policy, Scheduler
from mmi_deploy.documents.document import Document, Part, Text, document_of
from mmi_deploy.documents.document import Image as Given
from mmi_deploy.errors import MmiError
from mmi_deploy.runtime.events import Event, Finished, ImageDone, ImageProgress, Reason, TextDelta
from mmi_deploy.runtime.generation import Generation, Stopped
from mmi_deploy.runtime.options import DEFAULTS, GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.sequence import TokenSequence
from mmi_deploy.runtime.session import Session
from mmi_deploy.runtime.timings import Timings
from mmi_deploy.runtime.work import BeamStep, Work

# Turns after which a schedule counts as one that never ends.
MOST_TURNS = 20_000


def told(event: Event) -> tuple[Any, ...]:
    """An event without its timings, to compare."""
    match event:
        case ImageDone(index, rgb):
            return "done", index, rgb.shape, rgb.tobytes()
        case ImageProgress(index, step, of, preview):
            shown = None if preview is None else (preview.shape, preview.tobytes())
            return "progress", index, step, of, shown
        case Finished(reason, tokens, images):
            return "finished", reason, tokens, images
    return (event,)


class Alone:
    """A document that `generate` reads and continues alone."""

    def __init__(
        self, runtime: Runtime, document: Document, options: GenerationOptions = DEFAULTS
    ) -> None:
        self.runtime, self.document, self.options = runtime, document, options
        self.events: list[Event] = []
        self.error: Exception | None = None
        session = Session(runtime, options.beams)
        self._results: list[Any] = []
        steps = self._generation(session.sequence).run()
        result = None
        try:
            while True:
                item = steps.send(result)
                result = None
                if isinstance(item, Work):
                    result = session.do(item)
                    if isinstance(item, BeamStep):  # views, valid until the next work
                        result = [row.copy() for row in result]
                    self._results.append(result)
                else:
                    self.events.append(item)
        except StopIteration:
            pass
        except MmiError as error:
            self.error = error
        self.told = [told(event) for event in self.events]
        self.token_ids = list(session.sequence.token_ids)
        self._stopped: dict[int, list[tuple[Any, ...]]] = {}

    @property
    def works(self) -> int:
        """Number of items of work that it took."""
        return len(self._results)

    def stopped(self, after: int, reason: Reason) -> list[tuple[Any, ...]]:
        """Events if the document is stopped in place of the result of work number `after`."""
        if after not in self._stopped:
            sequence = TokenSequence(self.runtime.config, self.runtime.limits)
            steps = self._generation(sequence).run()
            events: list[tuple[Any, ...]] = []
            results = iter(self._results[:after])
            item = next(steps, None)
            while item is not None:
                if not isinstance(item, Work):
                    events.append(told(item))
                    item = next(steps, None)
                    continue
                try:
                    item = steps.send(next(results))
                except StopIteration:  # of the results
                    item = steps.throw(Stopped("cancelled"))
            self._stopped[after] = events
        *before, (_, _, tokens, images) = self._stopped[after]
        return [*before, ("finished", reason, tokens, images)]

    def could_be_stopped_as(self, events: Sequence[tuple[Any, ...]], reason: Reason) -> bool:
        """True if `events` are those of this document, stopped after some item of work or before
        its begin."""
        if list(events) == [("finished", reason, 0, 0)]:
            return True
        return any(self.stopped(after, reason) == list(events) for after in range(self.works + 1))

    def second_turn(self, *more: Part) -> Document:
        """The document, what was generated, and more."""
        drawn = iter([event for event in self.events if isinstance(event, ImageDone)])
        parts: list[Part] = [
            part if isinstance(part, Text | Given) else Given(next(drawn).rgb)
            for part in self.document.parts
        ]
        asked = sum(not isinstance(part, Text | Given) for part in self.document.parts)
        for event in self.events:
            match event:
                case ImageDone(_, rgb):
                    asked -= 1
                    if asked < 0:
                        parts.append(Given(rgb))
                case TextDelta(text):
                    parts.append(Text(text))
        return document_of(*parts, Text(" "), *more)

    def _generation(self, sequence: TokenSequence) -> Generation:
        runtime = self.runtime
        steps = runtime.schedule(self.options.schedule).schedule.steps
        return Generation(
            sequence, runtime.tokenizer, self.document, self.options, steps, Timings()
        )


@dataclass(eq=False)
class Sent:
    """A document that was submitted, and what came of it."""

    alone: Alone
    job: Job
    items: list[Event | Exception | None] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return bool(self.items) and (self.items[-1] is None or self.error is not None)

    @property
    def error(self) -> Exception | None:
        return self.items[-1] if self.items and isinstance(self.items[-1], Exception) else None

    @property
    def events(self) -> list[Event]:
        return [item for item in self.items if isinstance(item, Event)]

    @property
    def reason(self) -> str | None:
        """Reason of the end; None after an error."""
        last = self.events[-1] if self.events else None
        return last.reason if isinstance(last, Finished) and not self.error else None

    def check(self) -> None:
        """Raise `AssertionError` unless the document has ended with the events that it has alone:
        all of them, those up to the work after which it was stopped, or those before an error."""
        assert self.ended, "the document has not ended"
        events = [told(event) for event in self.events]
        assert sum(not isinstance(item, Event) for item in self.items) == 1, "one end"
        if self.error is not None:
            assert events == self.alone.told[: len(events)], "other events before the error"
        elif self.reason in ("cancelled", "deadline"):
            assert self.alone.could_be_stopped_as(events, self.reason), "not those of a stop"
        else:
            assert self.alone.error is None, "an error alone, and none here"
            assert events == self.alone.told, "not the events that `generate` gives"


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Service:
    """A scheduler with its executor, driven turn by turn."""

    def __init__(
        self,
        runtime: Runtime,
        hooks: Hooks,
        *,
        slots: int = 4,
        images: int = 8,
        policy: Policy = DEFAULT_POLICY,
        clock: Clock | None = None,
        row_counts: Sequence[int] | None = None,
        exact: bool = True,
        executor: Executor | None = None,
    ) -> None:
        """row_counts: padded sizes of runs, as on a device. exact: as in `KvSlots`. executor: one
        of an earlier service, with what its caches hold."""
        self.runtime, self.hooks = runtime, hooks
        self.clock = clock or Clock()
        self.executor = executor or Executor(runtime, slots, images)
        if row_counts is not None:
            most = self.executor.rows_of_a_run
            self.executor.row_counts = (*(n for n in row_counts if n < most), most)
        self.executor.slots.exact = exact
        self.scheduler = Scheduler(self.executor, policy, self.clock)
        self.sent: list[Sent] = []
        self.turns = 0

    def submit(
        self,
        alone: Alone,
        *,
        priority: int = 0,
        max_seconds: float | None = None,
        tenant: str = "",
    ) -> Sent:
        """Queue a document as `BatchEngine.submit` does. Raises `MmiError`."""
        executor = self.executor
        sequence = TokenSequence(executor.config, executor.limits)
        now = self.clock()
        items: list[Event | Exception | None] = []
        job = Job(
            alone._generation(sequence),
            DocumentRow(sequence, tenant, executor.images, executor.unet_images),
            items.append,
            priority=priority,
            deadline=None if max_seconds is None else now + max_seconds,
            arrival=now,
            number=len(self.sent),
        )
        self.scheduler.check(job)
        sent = Sent(alone, job, items)
        self.scheduler.add(job)
        self.sent.append(sent)
        return sent

    def turn(self) -> bool:
        """One turn of the scheduler."""
        self.turns += 1
        assert self.turns < MOST_TURNS, "the schedule does not end"
        before = self.scheduler.runs.turn
        worked = self.scheduler.turn()
        scheduler = self.scheduler
        assert self.scheduler.runs.turn <= before + 1, "more than one run in a turn"
        assert worked or scheduler.idle, "documents wait for a turn that never comes"
        return worked

    def until_idle(self) -> None:
        """Turns until there is nothing to do."""
        while self.turn():
            pass

    def run(self, *alone: Alone, **how: Any) -> list[Sent]:
        """Submit documents at once and run them to their ends."""
        sent = [self.submit(each, **how) for each in alone]
        self.until_idle()
        return sent

    def check(self) -> None:
        """Raise `AssertionError` unless all documents ended as they do alone, and nothing of the
        service is lost or held."""
        for sent in self.sent:
            sent.check()
        self.check_whole()

    def check_whole(self) -> None:
        """Raise `AssertionError` if an idle service holds a slot or row."""
        scheduler, executor = self.scheduler, self.executor
        assert scheduler.idle
        assert not scheduler._reserved and not scheduler._unsettled and not scheduler._round
        assert not scheduler.runs.drawing
        assert not any(slot.running for slot in executor.slots.slots)
        assert [slot.index for slot in executor.slots.slots] == [*range(len(executor.slots.slots))]
        for pool in (executor.images, executor.unet_images):
            assert not pool.in_use
            assert len(pool._free) + pool.kept == pool.rows
            assert sorted([*pool._free, *pool._row.values()]) == [*range(1, pool.rows + 1)]
            assert set(pool._unused) == set(pool._row)
