"""Each engine is built in a process of its own.

So its memory goes back when it is done and can be measured, TensorRT's aborts and the kernel's
killing become errors in one line, and Ctrl-C ends a build at once: TensorRT itself asks only
between its steps.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from mmi_deploy.errors import EngineError, MmiError
from mmi_deploy.system.progress import Cancelled, Progress, Unit
from mmi_deploy.targets.tensorrt_build import Built, Job, build_engine, open_tensorrt

_EVERY = 0.02  # seconds between two looks at the memory
_TELL_EVERY = 0.1  # seconds between two lines of progress
_GIVE_BACK_EVERY = 0.1  # seconds between two times that read weights are given back
_PR_SET_PDEATHSIG = 1
_MADV_DONTNEED = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of a process: before the graph was parsed, and at most. `private` leaves out what is
    mapped from files (the weights), which the kernel drops when it needs room."""

    before: int = 0
    private_before: int = 0
    peak: int = 0
    private_peak: int = 0

    def seen(self, resident: int, shared: int) -> Memory:
        """With one more look."""
        return Memory(
            self.before,
            self.private_before,
            max(self.peak, resident),
            max(self.private_peak, resident - shared),
        )

    @property
    def added(self) -> int:
        """What the build itself took at most, mapped weights included."""
        return max(0, self.peak - self.before)

    @property
    def private_added(self) -> int:
        """What the build itself took at most and could not be taken back."""
        return max(0, self.private_peak - self.private_before)


@dataclass(frozen=True)
class Measured:
    """A finished build, how long it took in seconds, and its memory."""

    built: Built
    seconds: float
    memory: Memory


def build_in_process(job: Job, progress: Progress) -> Measured:
    """Build `job` in a new process. Raises what `build_engine` raises, and `EngineError` when the
    process is killed. Whatever goes wrong, the process is gone when this returns."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job, sender), daemon=True)
    started = time.monotonic()
    process.start()
    sender.close()
    try:
        built, memory = _follow(process, receiver, progress)
    except EOFError:
        process.join()
        raise _died(job, process.exitcode) from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    return Measured(built, time.monotonic() - started, memory)


def _follow(process: BaseProcess, receiver: Connection, progress: Progress) -> tuple[Built, Memory]:
    memory = Memory()
    observed = psutil.Process(process.pid)
    while True:
        with suppress(psutil.Error):
            info = observed.memory_info()
            memory = memory.seen(info.rss, getattr(info, "shared", 0))
        if not receiver.poll(_EVERY):
            continue
        kind, value = receiver.recv()
        if kind == "progress":
            progress(*value)
        elif kind == "ready":
            resident, shared = value
            private = resident - shared
            memory = Memory(resident, private, resident, private)
        elif kind == "built":
            return value, memory
        else:
            raise value


def _died(job: Job, code: int | None) -> EngineError:
    what = f"the build of {job.graph} for {job.architecture}"
    if code == -signal.SIGKILL:
        return EngineError(
            f"{what} was killed, as the system does when memory runs out",
            fix="Close other programs, add swap, or build on a machine with more memory: "
            "`mmi build --dry-run` says how much it takes",
        )
    reason = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
    return EngineError(f"{what} ended without a result: TensorRT stopped the process ({reason})")


def _child(job: Job, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    _die_with_parent()
    os.dup2(2, 1)  # whatever libraries print must not mix with the results on stdout
    try:
        trt = open_tensorrt(job.plugin, job.runtime, job.architecture)
        info = psutil.Process().memory_info()
        sender.send(("ready", (info.rss, getattr(info, "shared", 0))))
        with _weights_given_back(job.source.parent):
            built = build_engine(trt, job, _Teller(sender))
        sender.send(("built", built))
    except (MmiError, OSError) as error:
        sender.send(("failed", error))
    except Exception as error:
        sender.send(("failed", RuntimeError(f"{type(error).__name__}: {error}")))


@contextmanager
def _weights_given_back(folder: Path) -> Iterator[None]:
    """TensorRT maps the weights beside a graph and copies them; what it has read of the map is
    given back while it works, so that the process holds them once (Linux).

    Only read-only maps are touched, whose pages the system reads again when they are wanted.
    """
    if sys.platform != "linux":
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_give_back, args=(str(folder.resolve()), done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _give_back(folder: str, done: threading.Event) -> None:
    libc: Any = ctypes.CDLL(None)
    while not done.wait(_GIVE_BACK_EVERY):
        for line in Path("/proc/self/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[1] == "r--p" and fields[5].startswith(f"{folder}/"):
                start, end = (int(number, 16) for number in fields[0].split("-"))
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


class _Teller:
    """Passes progress on, not more often than anyone can read; stops when nobody listens."""

    def __init__(self, sender: Connection) -> None:
        self._sender, self._last = sender, 0.0

    def __call__(
        self, what: str, done: int = 0, total: int = 0, *, detail: str = "", unit: Unit = "steps"
    ) -> None:
        now = time.monotonic()
        if now - self._last < _TELL_EVERY:
            return
        self._last = now
        try:
            self._sender.send(("progress", (what, done, total)))
        except OSError:
            raise Cancelled from None


def _die_with_parent() -> None:
    """A parent that is killed takes the build with it (Linux; elsewhere the next step does)."""
    if sys.platform == "linux":
        libc: Any = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
