"""Shards of lines: text files, or zip files of one, with random access to every line.

Byte offsets of all lines are found when the shards are opened. A shard that cannot be read is
noted, and the others are used.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from mmi_deploy.errors import DocumentError
from mmi_deploy.system.files import open_regular
from mmi_train.data.readers.folder import MOST_LINE
from mmi_train.data.readers.shard_index import Arrays, indexed

# Largest unpacked member of a zip: a shard of MMC4 has some 50 MB, and a small zip can unpack to
# terabytes.
MOST_UNPACKED = 2**30


class LineShards:
    """Lines of several shards, one after the other. `damaged`: shards left out, with the reason."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths: list[Path] = []
        self.damaged: dict[Path, str] = {}
        starts = []
        for path in paths:
            try:
                found = indexed(path, partial(_index, path))["starts"]
            except DocumentError as error:
                self.damaged[path] = str(error)
                continue
            self.paths.append(path)
            starts.append(found)
        self._starts = starts
        self._ends = np.cumsum([len(found) for found in starts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> bytes:
        """Line `index` without its end."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[shard - 1]) if shard else 0
        start = int(self._starts[shard][index - before])
        path = self.paths[shard]
        if path.suffix == ".zip":
            content = _unpacked(path, path.stat().st_mtime_ns)
            end = content.find(b"\n", start)
            return content[start : end if end >= 0 else len(content)]
        with open_regular(path) as file:
            file.seek(start)
            return file.readline(MOST_LINE + 1).rstrip(b"\r\n")


def _index(path: Path) -> Arrays:
    return {"starts": np.fromiter(_starts(path), np.int64)}


def _starts(path: Path) -> Iterator[int]:
    """Byte offset of each line that is not blank; raises `DocumentError`."""
    if path.suffix == ".zip":
        content = _unpacked(path, path.stat().st_mtime_ns)
        at = 0
        for line in content.splitlines(keepends=True):
            if line.strip():
                yield at
            at += len(line)
        return
    try:
        with open_regular(path) as file:
            at = 0
            for line in file:
                if line.strip():
                    yield at
                at += len(line)
    except OSError as error:
        raise DocumentError(f"cannot read the shard {path}: {error.strerror}") from None


@lru_cache(maxsize=2)
def _unpacked(path: Path, changed: int) -> bytes:
    """Contents of the one member of a zip file, `changed` at this time; raises `DocumentError`."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            members = [one for one in archive.infolist() if not one.is_dir()]
            if len(members) != 1:
                raise DocumentError(
                    f"the shard {path} holds {len(members)} files", expected="one of lines"
                )
            with archive.open(members[0]) as member:  # its size in the header may be a lie
                content = member.read(MOST_UNPACKED + 1)
    except DocumentError:
        raise
    except OSError as error:
        raise DocumentError(f"cannot read the shard {path}: {error.strerror or error}") from None
    except Exception as error:  # zipfile and zlib raise many types for damaged files
        raise DocumentError(f"the shard {path} is damaged: {error}") from None
    if len(content) > MOST_UNPACKED:
        raise DocumentError(
            f"the shard {path} unpacks to more than {MOST_UNPACKED >> 30} GB: it is not opened"
        )
    return content
