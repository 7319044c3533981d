"""How much memory this process holds, as the system tells it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def memory_bytes() -> int:
    """What this process holds now; where the system does not tell, the most that it ever held."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_bytes()
    return pages * resource.getpagesize()


def peak_bytes() -> int:
    """The most memory that this process has held.

    Linux: VmHWM, because `ru_maxrss` also counts the parent's memory at the time of the fork.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):  # another system, or a sandbox that leaves it out
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
