"""Job: one document in the service, from its submission to its last event."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from mmi_deploy.batching.beam_rows import BeamRows
from mmi_deploy.batching.document_row import DocumentRow
from mmi_deploy.documents.document import EncodedDocument
from mmi_deploy.runtime.events import Event, Finished, Reason
from mmi_deploy.runtime.generation import Steps, Stopped
from mmi_deploy.runtime.timings import Timings
from mmi_deploy.runtime.work import BeamStep, Condition, DecodeLatents, Denoise, Work


class Task(Protocol):
    """Work on one document: a `Generation`, or a `Scoring`.

    rows: of the KV cache that it takes. drawable: pictures that it may draw beyond those that the
    document asks for. writes: False if it writes no text.
    """

    @property
    def rows(self) -> int: ...

    @property
    def drawable(self) -> int: ...

    @property
    def writes(self) -> bool: ...

    @property
    def encoded(self) -> EncodedDocument: ...

    @property
    def timings(self) -> Timings: ...

    def run(self) -> Steps:
        """Events and work, to the end."""


# Gets every event in order; at last an error, or None after `Finished`.
Sink = Callable[[Event | Exception | None], None]


@dataclass(frozen=True)
class JobStats:
    """Measurements of one document.

    queued: seconds until it got a slot. first: seconds until its first token or picture, None
    without one. total: seconds until its end. given: tokens of the document when it began; cached:
    those of them that were found in a slot.
    """

    queued: float
    first: float | None
    total: float
    given: int
    cached: int


class Job:
    """A task, and its progress in the service."""

    def __init__(
        self,
        task: Task,
        row: DocumentRow,
        emit: Sink,
        *,
        priority: int = 0,
        deadline: float | None = None,
        arrival: float = 0.0,
        number: int = 0,
    ) -> None:
        """deadline: time of the clock at which the document ends. arrival: time of submission.
        number: in the order of submission."""
        self.task, self.row, self.emit = task, row, emit
        self.priority, self.deadline = priority, deadline
        self.arrival, self.number = arrival, number
        self.work: Work | None = None
        self.picture_row: int | None = None
        self.slots = task.rows  # that it holds while it runs
        self.beams: BeamRows | None = None  # in its slots, while it runs
        # Run that its present work needs next: encode, prefill, decode, values, condition, denoise,
        # shallow or vae; and the number of the turn in which it became ready.
        self.stage, self.ready = "", 0
        self.overtaken = 0  # later documents that got a slot first
        self.images = 0  # rows of the image pool that it may need
        self.admitted: float | None = None
        self.first: float | None = None
        self.last_token: float | None = None  # time, None after a picture
        self.given = self.cached = 0
        self.searched = False  # for a prefix in the other slots
        self.reason: Reason = "end"  # of the document's end
        self._cancelled = False
        self._last: list[Event | Exception | None] = []
        self._steps = task.run()

    def cancel(self) -> None:
        """Ask for the end of the document. Thread-safe."""
        self._cancelled = True

    def stopped(self, now: float) -> Reason | None:
        """Reason to stop the document early."""
        if self._cancelled:
            return "cancelled"
        return "deadline" if self.deadline is not None and now >= self.deadline else None

    def advance(self, result: Any = None) -> bool:
        """Hand over the result of the present work and emit events up to the next work; returns
        True at the end of the document, which `end` emits."""
        return self._emit_until_work(lambda: self._steps.send(result))

    def stop(self, reason: Reason) -> None:
        """End the document early with the events that this takes."""
        if self.work is None:  # a generator that has not begun cannot catch
            self._steps.close()
            self._last = [Finished(reason, 0, 0, self.task.timings), None]
        else:
            self._emit_until_work(lambda: self._steps.throw(Stopped(reason)))

    def fail(self, error: Exception) -> None:
        """End the document with an error."""
        self._steps.close()
        self._last = [error]

    def end(self) -> None:
        """Emit the end of the document that `advance`, `stop` or `fail` came to. Not before it has
        left its slot: whoever reads the end may submit the next document at once."""
        for item in self._last:
            self.emit(item)

    def _emit_until_work(self, begin: Callable[[], Event | Work]) -> bool:
        try:
            item = begin()
            while not isinstance(item, Work):
                if isinstance(item, Finished):
                    self.reason = item.reason
                    self._last = [item, None]
                else:
                    self.emit(item)
                item = next(self._steps)
        except StopIteration:
            self.work = None
            return True
        self.work = item
        return False

    def stats(self, now: float) -> JobStats:
        """Measurements so far."""
        queued = (now if self.admitted is None else self.admitted) - self.arrival
        first = None if self.first is None else self.first - self.arrival
        return JobStats(queued, first, now - self.arrival, self.given, self.cached)

    @property
    def decoded_rows(self) -> int:
        """Rows of a decode run that the present work takes."""
        return max(len(self.work.tokens), 1) if isinstance(self.work, BeamStep) else 1

    def refresh(self, turn: int) -> None:
        """Find the run that the present work needs next."""
        if self.beams is not None and not self._in_search:
            self.beams.end_search()
        self.stage, self.ready = self._next_run(), turn

    @property
    def _in_search(self) -> bool:
        return isinstance(self.work, BeamStep) and bool(self.work.tokens)

    def _next_run(self) -> str:
        if self._in_search:
            return "decode"
        match self.work:
            case Denoise():
                return "denoise" if self.work.full else "shallow"
            case DecodeLatents():
                return "vae"
        row = self.row
        if row.images.missing(row.keys):
            return "encode"
        if pending := row.pending:
            text = len(pending) == 1 and pending[0] != row.sequence.config.tokens.image
            return "decode" if text else "prefill"
        assert isinstance(self.work, Condition), "a token is wanted only after a pending one"
        # Without a row for its picture it holds no image yet: the pool has room for the rows alone.
        if self.picture_row is None:
            return "values"
        if row.unet_images.missing(row.seen_by_picture(self.work.picture.index)):
            return "values"
        return "condition"
