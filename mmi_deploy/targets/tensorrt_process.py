"""Build each engine in a child process.

The child's memory is measured and returned when the build ends. An abort in TensorRT or a kill by
the OOM killer becomes a one-line error. Ctrl-C ends a build at once, while TensorRT itself can only
be cancelled between its steps.
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
from mmi_deploy.system.nvidia_driver import visible_device
from mmi_deploy.system.progress import Cancelled, Progress, Unit
from mmi_deploy.targets.tensorrt_build import BuildResult, Job, build_engine, open_tensorrt

# Seconds between two events.
_MEMORY_INTERVAL = 0.02
_PROGRESS_INTERVAL = 0.1
_RELEASE_INTERVAL = 0.1

# Constants of <sys/prctl.h> and <sys/mman.h>.
_PR_SET_PDEATHSIG = 1
_MADV_DONTNEED = 4


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process in bytes: before the graph was parsed, and the peak. `private`
    excludes file mappings (the weights), which the kernel can drop under memory pressure."""

    before: int = 0
    private_before: int = 0
    peak: int = 0
    private_peak: int = 0

    def updated(self, resident: int, shared: int) -> Memory:
        """Add one sample of resident and shared bytes."""
        return Memory(
            self.before,
            self.private_before,
            max(self.peak, resident),
            max(self.private_peak, resident - shared),
        )

    @property
    def added(self) -> int:
        """Peak bytes of the build itself, mapped weights included."""
        return max(0, self.peak - self.before)

    @property
    def private_added(self) -> int:
        """Peak bytes of the build itself, file mappings excluded."""
        return max(0, self.private_peak - self.private_before)


@dataclass(frozen=True)
class MeasuredBuild:
    """A finished build with its duration in seconds and its memory."""

    built: BuildResult
    seconds: float
    memory: Memory


def build_in_process(job: Job, progress: Progress) -> MeasuredBuild:
    """Build `job` in a child process, which has always ended when this returns.

    Raises what `build_engine` raises, and `EngineError` when the process is killed.
    """
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
        raise _exit_error(job, process.exitcode) from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    return MeasuredBuild(built, time.monotonic() - started, memory)


def _follow(
    process: BaseProcess, receiver: Connection, progress: Progress
) -> tuple[BuildResult, Memory]:
    memory = Memory()
    observed = psutil.Process(process.pid)
    while True:
        with suppress(psutil.Error):
            info = observed.memory_info()
            memory = memory.updated(info.rss, getattr(info, "shared", 0))
        if not receiver.poll(_MEMORY_INTERVAL):
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


def _exit_error(job: Job, code: int | None) -> EngineError:
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent kills the child
    _die_with_parent()
    os.dup2(2, 1)  # output of libraries must not mix with results on stdout
    if job.device:
        # Before anything asks the driver. The builder's own threads then have no other GPU.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_device(visible, job.device)
    try:
        trt = open_tensorrt(job.plugin, job.runtime, job.architecture)
        info = psutil.Process().memory_info()
        sender.send(("ready", (info.rss, getattr(info, "shared", 0))))
        with _mapped_weights_released(job.source.parent):
            built = build_engine(trt, job, _ProgressSender(sender))
        sender.send(("built", built))
    except (MmiError, OSError) as error:
        sender.send(("failed", error))
    except Exception as error:
        sender.send(("failed", RuntimeError(f"{type(error).__name__}: {error}")))


@contextmanager
def _mapped_weights_released(folder: Path) -> Iterator[None]:
    """Drop the pages of the weight files below `folder` from memory while TensorRT copies them.

    TensorRT maps the weights and copies them, so without this the process holds them twice. Only
    read-only mappings are released: the kernel reads their pages again on access. Linux only.
    """
    if sys.platform != "linux":
        yield
        return
    done = threading.Event()
    thread = threading.Thread(
        target=_release_mapped_weights, args=(str(folder.resolve()), done), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _release_mapped_weights(folder: str, done: threading.Event) -> None:
    libc: Any = ctypes.CDLL(None)
    while not done.wait(_RELEASE_INTERVAL):
        for line in Path("/proc/self/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[1] == "r--p" and fields[5].startswith(f"{folder}/"):
                start, end = (int(number, 16) for number in fields[0].split("-"))
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


class _ProgressSender:
    """Sends progress to the parent, rate-limited. Raises `Cancelled` when the parent is gone."""

    def __init__(self, sender: Connection) -> None:
        self._sender, self._last = sender, 0.0

    def __call__(
        self, what: str, done: int = 0, total: int = 0, *, detail: str = "", unit: Unit = "steps"
    ) -> None:
        now = time.monotonic()
        if now - self._last < _PROGRESS_INTERVAL:
            return
        self._last = now
        try:
            self._sender.send(("progress", (what, done, total)))
        except OSError:
            raise Cancelled from None


def _die_with_parent() -> None:
    """Kill this process when its parent dies (Linux; elsewhere the next progress call stops it)."""
    if sys.platform == "linux":
        libc: Any = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
