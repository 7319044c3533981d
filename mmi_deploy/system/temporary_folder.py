"""Folders of unfinished work, which go even when their process is killed.

Whoever works in one holds the kernel's lock on it, which ends with the process; the next one that
makes such a folder removes those that nobody holds. Where there are no locks (some network disks,
Windows) what a killed process leaves stays.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A folder below `parent` that goes at the end, unless it was renamed by then, or, when its
    process is killed, as soon as another one of the same `prefix` is made here."""
    for left in parent.glob(f"{escape(prefix)}*"):
        with _opened(left) as descriptor:
            if descriptor is not None and taken(descriptor):
                shutil.rmtree(left, ignore_errors=True)
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
    work = parent / new.name.replace(".new-", prefix, 1)
    with _opened(new) as descriptor:
        try:
            if descriptor is not None:
                taken(descriptor)
            new.rename(work)  # seen by others only now that it is locked
            yield work
        finally:
            for path in (new, work):
                shutil.rmtree(path, ignore_errors=True)


def taken(descriptor: int) -> bool:
    """Whether the lock of an open file is ours now, without waiting."""
    import fcntl  # where there is none, no folder can be opened

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def _opened(folder: Path) -> Iterator[int | None]:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)
