"""Many documents through one batch engine: reading, running, progress."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mmi_deploy.batching.batch_engine import BatchEngine
from mmi_deploy.batching.scheduler import Policy
from mmi_deploy.cli.console import remarks
from mmi_deploy.cli.generate_output import Output
from mmi_deploy.cli.machine import Machine
from mmi_deploy.cli.program import disk_is_full
from mmi_deploy.documents.document import Document, encode_document
from mmi_deploy.errors import DocumentError, EngineError, MmiError
from mmi_deploy.runtime.events import Event, ImageDone, ImageProgress, ImageStarted
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.system.progress import LogLines

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

T = TypeVar("T")

# Documents that are read while all slots are taken, so that a free slot does not wait.
AHEAD = 4

# Nobody reads along: runs are as large as they can be. `run_all` bounds the queue.
POLICY = Policy(text_gap=inf, queue=2**20)

# Seconds before the log has lines about documents that have not ended.
PATIENCE = 5.0

# Names of failed documents that the last line lists.
_LISTED = 3


class EngineStopped(EngineError):
    """The batch engine takes no more documents: an error of all of them."""


def most_images(runtime: Runtime) -> int:
    """Most pictures of a document, given and drawn."""
    return min(runtime.limits.images, runtime.config.llm_mmfs.images - 1)


def check_fits(document: Document, options: GenerationOptions, runtime: Runtime) -> None:
    """Raise `MmiError` if the document or its options do not fit the model; loads no engine."""
    limits = runtime.limits
    encode_document(document, runtime.tokenizer, runtime.config, limits.context, limits.images)
    options.sampling.check_ids(runtime.config.llama.vocab)
    runtime.schedule(options.schedule)


@contextmanager
def opened_engine(runtime: Runtime, machine: Machine, board: Board) -> Iterator[BatchEngine]:
    """Load the engines for as many documents as `machine` says."""
    board.say("loading the engines")
    with BatchEngine(runtime, slots=machine.slots, policy=POLICY) as engine:
        yield engine


async def generated(
    engine: BatchEngine,
    name: str,
    document: Document,
    options: GenerationOptions,
    board: Board,
) -> tuple[Output, float]:
    """Generate one document; returns its output, and its seconds since it got a slot."""
    output = Output(document, engine.runtime, options)
    try:
        events = engine.submit(document, options)
    except EngineError as error:
        raise EngineStopped(str(error)) from None
    with events as stream:
        async for event in stream:
            output.add(event)
            board.show(name, event)
    assert stream.stats is not None, "a document that has ended has statistics"
    return output, stream.stats.total - stream.stats.queued


def run_all(jobs: Iterable[T], do: Callable[[T], Awaitable[None]], most: int) -> None:
    """Do all jobs, at most `most` at once, begun in their order. An error ends all of them."""
    asyncio.run(_run_all(jobs, do, most))


async def _run_all(jobs: Iterable[T], do: Callable[[T], Awaitable[None]], most: int) -> None:
    running: set[asyncio.Future[None]] = set()

    async def wait() -> None:
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
            running.discard(task)

    try:
        for job in jobs:
            running.add(asyncio.ensure_future(do(job)))
            while len(running) >= most:
                await wait()
        while running:
            await wait()
    finally:
        for task in running:
            if task.done() and not task.cancelled():
                task.exception()  # known: asyncio would print the errors of the others


class Failures:
    """Documents that failed while others go on."""

    def __init__(self) -> None:
        self._errors: list[tuple[str, Exception]] = []
        self.count = 0

    def add(self, name: str, error: Exception) -> str:
        """Count a failure; returns its line."""
        self.count += 1
        unexpected = not isinstance(error, MmiError)
        if len(self._errors) < _LISTED or unexpected and self.unexpected is None:
            self._errors.append((name, error))
        return line_of(error)

    @property
    def unexpected(self) -> Exception | None:
        """First error that is no `MmiError`."""
        return next((one for _, one in self._errors if not isinstance(one, MmiError)), None)

    def check(self, of: int) -> None:
        """Raise an error if one of the `of` documents failed: an unexpected one as it was."""
        if self.unexpected is not None:
            raise self.unexpected
        if self.count:
            names = ", ".join(name for name, _ in self._errors[:_LISTED])
            more = ", ..." if self.count > _LISTED else ""
            raise MmiError(f"{self.count} of {of} documents failed: {names}{more}")


def of_all(error: Exception) -> bool:
    """True for an error that the documents after this one would have as well."""
    return isinstance(error, EngineStopped) or disk_is_full(error)


def line_of(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    line = " ".join(str(error).split()) or "no message"
    return line if isinstance(error, MmiError) else f"unexpected {type(error).__name__}: {line}"


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Add a document's file to the `MmiError` of a block that does not name it."""
    try:
        yield
    except MmiError as error:
        if str(path) in str(error):
            raise
        raise DocumentError(f"{path}: {error}") from None


class Board:
    """Progress on stderr: in a terminal a line for each document that is running, in a log one line
    from time to time; and a line for each document that has ended, if it is given.

    total: number of documents. quiet: show nothing, for --json.
    """

    def __init__(self, total: int, quiet: bool) -> None:
        self._console, self._total, self._quiet = remarks(), total, quiet
        self._ended = 0
        self._stack = ExitStack()
        self._bars: Bars | None = None
        self._lines: dict[str, TaskID] = {}
        self._log = LogLines(self.print, patience=PATIENCE)

    def __enter__(self) -> Board:
        if self._console.is_terminal and not self._quiet:
            from rich.progress import Progress as Bars
            from rich.progress import TextColumn, TimeElapsedColumn

            columns = (
                TextColumn("{task.description}", markup=False),
                TextColumn("{task.fields[state]}", markup=False),
                TimeElapsedColumn(),
            )
            bars = Bars(*columns, console=self._console, transient=True)
            self._bars = self._stack.enter_context(bars)
            self._all = bars.add_task("documents", total=None, state="")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def print(self, line: str) -> None:
        """Print a line that stays."""
        if not self._quiet:
            self._console.print(line)

    def say(self, state: str) -> None:
        """Show the state of all documents."""
        if self._bars is not None:
            self._bars.update(self._all, state=state)
        else:
            self.print(state)

    def show(self, name: str, event: Event) -> None:
        """Show an event of the document `name`."""
        self._say_ended()
        if self._bars is None:
            return
        if name not in self._lines:
            self._lines[name] = self._bars.add_task(name, total=None, state="writing")
        match event:
            case ImageStarted(index, steps):
                self._bars.update(self._lines[name], state=_drawing(index, 0, steps))
            case ImageProgress(index, step, steps):
                self._bars.update(self._lines[name], state=_drawing(index, step, steps))
            case ImageDone():
                self._bars.update(self._lines[name], state="writing")

    def end(self, name: str, line: str = "") -> None:
        """Take a document off, and print a line about it."""
        self._ended += 1
        if self._bars is not None and name in self._lines:
            self._bars.remove_task(self._lines.pop(name))
        if line:
            self.print(line)
        self._say_ended()

    def _say_ended(self) -> None:
        if self._bars is not None:
            self._bars.update(self._all, state=f"{self._ended} of {self._total} done")
        elif not self._quiet and self._ended < self._total:
            self._log("generating", self._ended, self._total)


def _drawing(index: int, step: int, steps: int) -> str:
    return f"drawing picture {index + 1} ({step} of {steps} steps)"
