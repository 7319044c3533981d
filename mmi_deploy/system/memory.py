"""How much memory this process can still take, as the system tells it, and what a lack of it looks
like."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from mmi_deploy.errors import EngineError

_MEMINFO = Path("/proc/meminfo")
_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)
"""Where a container's limit and use stand, and which line of `memory.stat` says how much of the use
is files that were read, which go when room is wanted: cgroups version 2 and version 1."""


def free_memory(swap: bool = True) -> int:
    """Bytes that can still be taken: memory, and swap where that counts, or what a container leaves
    of them; all that is installed where the system does not tell."""
    kinds = ("MemAvailable:", "SwapFree:") if swap else ("MemAvailable:",)
    try:
        lines = _MEMINFO.read_text().splitlines()
        free = sum(1024 * int(line.split()[1]) for line in lines if line.startswith(kinds))
    except OSError:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder, limit, used, files in _CGROUPS:
        with suppress(OSError, ValueError):  # no such container, or one without a limit
            room = int((folder / limit).read_text()) - int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free = min(free, room + int(stat.get(files, 0)))
    return free


_SHORTAGES = (
    "std::bad_alloc",  # ONNX Runtime while it loads a graph
    "Failed to allocate memory",  # ONNX Runtime while it runs one
    os.strerror(errno.ENOMEM),  # torch on the CPU, and the system
    "out of memory",  # torch and ONNX Runtime on a GPU
    "array is too big",  # NumPy, beyond what an address can count
    "Maximum allowed dimension exceeded",  # NumPy again
    "Storage size calculation overflowed",  # torch
)
"""What libraries say in their text alone when they get no memory."""


def is_shortage(error: BaseException) -> bool:
    """Whether `error` says that there was not enough memory."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in _SHORTAGES)


def shortage(what: str) -> EngineError:
    """The error for a lack of memory; `what` it was wanted for, as in "to load llm.onnx"."""
    return EngineError(
        f"there is not enough memory {what}",
        got=f"{free_memory() / 1e9:.1f} GB free",
        fix="close other programs, or use a smaller context, or a target of lower precision",
    )
