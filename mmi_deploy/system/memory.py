"""Free memory as the operating system reports it, and the errors of running out of memory."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from mmi_deploy.errors import EngineError

_MEMINFO = Path("/proc/meminfo")
_MEMBERSHIP = Path("/proc/self/cgroup")

# Mount points of cgroup version 2, version 2 beside version 1, and version 1. Each row: the
# controller as /proc/self/cgroup names it, the mount point, the files with a group's limit and
# usage, and the line of `memory.stat` with the part of the usage that is page cache, which the
# kernel frees on demand.
_CGROUPS = (
    ("", Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    ("", Path("/sys/fs/cgroup/unified"), "memory.max", "memory.current", "inactive_file"),
    (
        "memory",
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def free_memory(swap: bool = True) -> int:
    """Bytes that can still be allocated: free memory, and with `swap` free swap, within the limits
    of the container. All installed memory if the system does not report what is free."""
    kinds = ("MemAvailable:", "SwapFree:") if swap else ("MemAvailable:",)
    try:
        lines = _MEMINFO.read_text().splitlines()
        free = sum(1024 * int(line.split()[1]) for line in lines if line.startswith(kinds))
    except OSError:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for controller, root, limit, used, files in _CGROUPS:
        for folder in _groups(root, controller):
            with suppress(OSError, ValueError):  # no such group, or one without a limit
                room = int((folder / limit).read_text()) - int((folder / used).read_text())
                stat = (folder / "memory.stat").read_text().splitlines()
                counts = dict(line.split() for line in stat)
                free = min(free, max(0, room + int(counts.get(files, 0))))
    return free


def _groups(root: Path, controller: str) -> list[Path]:
    """Folders of this process's cgroup and of its ancestors: each has a limit of its own.

    In a container the path may be that of the host, of which only the root is visible.
    """
    with suppress(OSError):
        for line in _MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                group = root / path.lstrip("/")
                return [group, *(above for above in group.parents if above.is_relative_to(root))]
    return [root]


# Messages of libraries that report a failed allocation by their text alone.
_SHORTAGES = (
    "std::bad_alloc",  # ONNX Runtime while it loads a graph
    "Failed to allocate memory",  # ONNX Runtime while it runs one
    os.strerror(errno.ENOMEM),  # torch on the CPU, and the system
    "out of memory",  # torch and ONNX Runtime on a GPU
    "array is too big",  # NumPy, beyond what an address can count
    "Maximum allowed dimension exceeded",  # NumPy again
    "Storage size calculation overflowed",  # torch
)


def is_out_of_memory(error: BaseException) -> bool:
    """True if `error` reports a failed allocation."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in _SHORTAGES)


def out_of_memory(what: str) -> EngineError:
    """Out-of-memory error; `what` names the purpose, as in "to load llm.onnx"."""
    return EngineError(
        f"there is not enough memory {what}",
        got=f"{free_memory() / 1e9:.1f} GB free",
        fix="close other programs, or use a smaller context, or a target of lower precision",
    )
