"""Temporary folders that are cleaned up even after their process was killed.

A marker file in each folder names its work. The process holds an advisory lock (`flock`) on the
marker, which the kernel releases when the process ends. The next process that begins the same work
in the same place removes the folders whose marker is not locked, and nothing else. On disks without
locks (some network disks) folders of killed processes stay.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from mmi_deploy.errors import MmiError
from mmi_deploy.system.files import shortened

# Marker file of a folder of unfinished work: JSON with the folder's name and the work.
UNFINISHED = ".mmi-unfinished"

# State of unfinished work: its process is alive, it has ended, or locks are not available.
State = Literal["held", "left", "unknown"]

# Seconds to wait for a lock that other processes hold only briefly.
_PATIENCE = 2.0

# Number of characters that `tempfile` adds to a name.
_RANDOM = 8


def remove_work(folder: Path) -> None:
    """Remove a folder of unfinished work, its marker last; any other folder is left alone."""
    if not (folder / UNFINISHED).is_file():
        return
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        elif entry.name != UNFINISHED:
            with suppress(OSError):
                os.unlink(entry.path)
    with suppress(OSError):
        (folder / UNFINISHED).unlink()
        folder.rmdir()


@contextmanager
def temporary_folder(
    parent: Path, prefix: str, *, alone: str = "", clear: Callable[[Path], None] = remove_work
) -> Iterator[Path]:
    """Create a folder below `parent` and remove it at the end; after a killed process, the next
    call with the same `prefix` removes it.

    `alone`: for work that only one process may do at a time, the folder that it writes; `MmiError`
    is raised while another process does it. `clear`: removes a folder, or restores what must stay.
    """
    work, descriptor = _begin(parent, prefix, alone)
    try:
        for left in _named(parent, prefix):
            with _state(left, prefix) as state:
                if state == "left":
                    clear(left)
        yield work
    finally:
        try:
            clear(work)
        finally:
            os.close(descriptor)


def in_use(parent: Path, prefix: str) -> bool:
    """True if a living process has a folder of this `prefix` in `parent`."""
    with _guarded(parent):
        return _held(parent, prefix)


def state_of(folder: Path) -> State | None:
    """State of the work in `folder`; None if it is not a folder of unfinished work."""
    with _state(folder, None) as state:
        return state


def in_use_error(folder: str) -> MmiError:
    """Error for the second process that writes `folder`."""
    return MmiError(
        f"another process of mmi writes {folder} just now",
        fix="wait until it is done, or give another output folder",
    )


def try_lock(descriptor: int) -> bool:
    """Try to lock an open file without waiting; True if this process holds the lock now."""
    return _lock(descriptor) is True


def _lock(descriptor: int) -> bool | None:
    """Try to lock an open file without waiting; None if locks are not available."""
    import fcntl  # absent on Windows

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _begin(parent: Path, prefix: str, alone: str) -> tuple[Path, int]:
    """Create a folder; returns it and the open, locked marker. Closing the marker unlocks it."""
    with _guarded(parent):
        if alone and _held(parent, prefix):
            raise in_use_error(alone)
        work = Path(tempfile.mkdtemp(prefix=shortened(prefix, _RANDOM), dir=parent))
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            descriptor = os.open(work / UNFINISHED, flags, 0o600)
            _lock(descriptor)
            os.write(descriptor, json.dumps({"folder": work.name, "work": prefix}).encode())
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    return work, descriptor


def _held(parent: Path, prefix: str) -> bool:
    for path in _named(parent, prefix):
        with _state(path, prefix) as state:
            if state == "held":
                return True
    return False


def _named(parent: Path, prefix: str) -> list[Path]:
    start = shortened(prefix, _RANDOM)
    try:
        names = sorted(os.listdir(parent))
    except OSError:
        return []
    return [parent / name for name in names if name.startswith(start)]


@contextmanager
def _state(folder: Path, work: str | None) -> Iterator[State | None]:
    """State of the work in `folder`, which no other process can clear inside the `with` block.

    None: not a folder of unfinished work, or of other work than `work`.
    """
    try:
        descriptor = os.open(folder / UNFINISHED, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        yield None
        return
    try:
        locked = _lock(descriptor)
        if not _says(descriptor, folder.name, work):
            yield None
        else:
            yield "unknown" if locked is None else "left" if locked else "held"
    finally:
        os.close(descriptor)


def _says(descriptor: int, folder: str, work: str | None) -> bool:
    """True if the marker was written for this folder, not copied or renamed with another one."""
    try:
        found = json.loads(os.read(descriptor, 2**16))
        return found["folder"] == folder and work in (None, found["work"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


@contextmanager
def _guarded(parent: Path) -> Iterator[None]:
    """Lock the folder `parent`, so that checking for other work and beginning one's own is atomic.

    A lock that somebody else keeps for longer than `_PATIENCE` is ignored.
    """
    try:
        descriptor = os.open(parent, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        end = time.monotonic() + _PATIENCE
        while _lock(descriptor) is False and time.monotonic() < end:
            time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)
