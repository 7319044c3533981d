"""Resident memory of this process, as the operating system reports it."""

from __future__ import annotations

import resource
import sys
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
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):  # not Linux, or a sandbox without this file
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
