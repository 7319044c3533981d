"""Indexes of shards, made once and kept in the cache folder of mmi, never beside the shards.

An index belongs to a shard's path, size and time of change: a shard that has changed gets another.
Small shards are indexed anew whenever they are opened, and without a folder that can be written
all are.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from mmi_deploy.errors import MmiError
from mmi_deploy.system.files import cache_folder, write_file

Arrays = Mapping[str, np.ndarray]

# Smallest shard whose index is kept, in bytes.
SMALLEST = 2**22


def indexed(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """Index of the shard `path`, from the cache if it is there. Raises what `make` raises."""
    try:
        about = path.stat()
        file = cache_folder() / "data_index" / f"{_key(path, about.st_size, about.st_mtime_ns)}.npz"
    except (OSError, MmiError):
        return make()
    if about.st_size < SMALLEST:
        return make()
    try:
        with np.load(file, allow_pickle=False) as kept:
            return {name: kept[name] for name in kept.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # not there, or damaged
        found = make()
    content = io.BytesIO()
    np.savez(content, **found)  # type: ignore[arg-type]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, content.getvalue())
    except (OSError, MmiError):  # a full or read-only disk: the index is made again next time
        pass
    return found


def _key(path: Path, size: int, changed: int) -> str:
    return hashlib.sha256(f"{path.resolve()} {size} {changed}".encode()).hexdigest()[:32]
