"""Folders of unfinished work, which go even when their process is killed.

A file in such a folder says that it is one, and of which work; its process holds the kernel's lock
on that file, which ends with the process. Whoever begins the same work in the same place clears
away what nobody holds any more. Nothing else is touched, whatever its name. Where there are no
locks (some network disks) what a killed process leaves stays.
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

UNFINISHED = ".mmi-unfinished"
"""The file in a folder of unfinished work: JSON, its folder's name and its work."""

State = Literal["held", "left", "unknown"]
"""Of unfinished work: its process is alive; it is not; or there are no locks that would tell."""

_PATIENCE = 2.0
"""Seconds to wait for a lock that others hold for a moment only."""

_RANDOM = 8
"""Characters that `tempfile` adds to a name."""


def remove_work(folder: Path) -> None:
    """Remove a folder of unfinished work, the file that says so last; no other folder."""
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
    """A folder below `parent` that goes at the end, or, when its process is killed, as soon as
    another one of the same `prefix` is made here.

    `alone`: for work that only one process may do at a time, the folder that it writes: `MmiError`
    is raised where another one does. `clear`: removes a folder, or puts back what must not go.
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


def in_work(parent: Path, prefix: str) -> bool:
    """Whether a living process has a folder of this `prefix` in `parent`."""
    with _guarded(parent):
        return _held(parent, prefix)


def state_of(folder: Path) -> State | None:
    """What has become of the work in `folder`; None where it is no folder of unfinished work."""
    with _state(folder, None) as state:
        return state


def refuse_second(folder: str) -> MmiError:
    """The error for whoever comes second."""
    return MmiError(
        f"another process of mmi writes {folder} just now",
        fix="wait until it is done, or give another output folder",
    )


def taken(descriptor: int) -> bool:
    """Whether the lock of an open file is ours now, without waiting."""
    return _lock(descriptor) is True


def _lock(descriptor: int) -> bool | None:
    """As `taken`; None where there are no locks."""
    import fcntl  # where there is none, no folder can be opened

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _begin(parent: Path, prefix: str, alone: str) -> tuple[Path, int]:
    """A new folder, and the file in it that is locked while that is open."""
    with _guarded(parent):
        if alone and _held(parent, prefix):
            raise refuse_second(alone)
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
    """What has become of the work in `folder`, and nobody else may clear it meanwhile. None: it is
    no such folder, or not of this `work`."""
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
    """Whether the file was written for this folder, not for another that was copied or renamed."""
    try:
        found = json.loads(os.read(descriptor, 2**16))
        return found["folder"] == folder and work in (None, found["work"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


@contextmanager
def _guarded(parent: Path) -> Iterator[None]:
    """Hold the lock of the folder `parent` for a moment: of two that look for each other and begin,
    one is first. Who keeps that lock for other ends does not stop us."""
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
