"""How much memory this process can still take, as the system tells it, and what a lack of it looks
like."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from mmi_deploy.errors import EngineError

_MEMINFO = Path("/proc/meminfo")
_MEMBERSHIP = Path("/proc/self/cgroup")
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
"""Of cgroups version 2, alone and beside version 1, and version 1: the controller as
/proc/self/cgroup names it, where the tree of groups is mounted, the files with a group's limit and
use, and which line of `memory.stat` says how much of the use is files that were read, which go when
room is wanted."""


def free_memory(swap: bool = True) -> int:
    """Bytes that can still be taken: memory, and swap where that counts, or what a container leaves
    of them; all that is installed where the system does not tell."""
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
    """The folder of this process's group and of all above it: each has a limit of its own. In a
    container the path may be the host's, of which only the root can be seen."""
    with suppress(OSError):
        for line in _MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                group = root / path.lstrip("/")
                return [group, *(above for above in group.parents if above.is_relative_to(root))]
    return [root]


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
