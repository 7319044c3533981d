"""Resident memory of this process, as the operating system reports it."""

from __future__ import annotations

import ctypes
import resource
import sys
from contextlib import suppress
from pathlib import Path


def memory_bytes() -> int:
    """Resident memory now, in bytes; its peak if the system does not report the current value."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_bytes()
    return pages * resource.getpagesize()


def peak_bytes() -> int:
    """Peak resident memory of this process, in bytes.

    Linux: VmHWM, because `ru_maxrss` also counts the parent's memory at the time of the fork.
    """
    if (found := _status("VmHWM")) is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def anonymous_bytes() -> int | None:
    """Resident memory that no file backs, in bytes: the heap, without weights and libraries that
    are mapped from files. None where the system does not report it."""
    return _status("RssAnon")


def trim() -> None:
    """Return freed memory to the system, where the C library can (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak() -> bool:
    """Let `peak_bytes` count from now on. False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    """A field of /proc/self/status in bytes; None outside of Linux, and in a sandbox without it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        return None
