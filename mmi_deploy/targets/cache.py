"""Cache of built engines, keyed by a hash of everything that an engine depends on.

An entry is a folder that is written under a temporary name and renamed: a killed build, a full disk
or Ctrl-C leaves no partial entry. Entries are locked with `flock`: the kernel releases the lock
when the process ends.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmi_deploy.bundle.manifest import sha256_of
from mmi_deploy.errors import ConfigError, MmiError
from mmi_deploy.system.files import CACHE, cache_folder, write_file
from mmi_deploy.system.temporary_folder import temporary_folder, try_lock

log = logging.getLogger(__name__)

LIMIT_VARIABLE = "MMI_ENGINE_CACHE_GB"
# Size limit in gigabytes, unless the environment variable `LIMIT_VARIABLE` sets another.
DEFAULT_LIMIT_GB = 50

_ENTRY = "entry.json"
_WORK = ".work-"
_LOCKS = ".locks"


def key_of(key_parts: Mapping[str, str]) -> str:
    """Key of a cache entry: the hash of `key_parts`."""
    return hashlib.sha256(json.dumps(dict(key_parts), sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class EngineCache:
    """LRU cache of engines in `folder`, limited to `limit` bytes."""

    folder: Path
    limit: int

    @classmethod
    def of_user(cls) -> EngineCache:
        """Open the user's cache. Raises `ConfigError` where its folder or limit is invalid."""
        folder = cache_folder(writes=True) / "engines"
        text = os.environ.get(LIMIT_VARIABLE) or str(DEFAULT_LIMIT_GB)
        try:
            gigabytes = float(text)
        except ValueError:
            gigabytes = -1.0
        if not 0 <= gigabytes < float("inf"):
            raise ConfigError(
                f"{LIMIT_VARIABLE} is not a size", expected="gigabytes, such as 50", got=text
            )
        return cls(folder, int(gigabytes * 1e9))

    def has(self, key: str) -> bool:
        """Return True if the entry exists; its files are not hashed."""
        return (self.folder / key / _ENTRY).is_file()

    def obtain(
        self,
        key: str,
        make: Callable[[Path], None],
        into: Path,
        *,
        key_parts: Mapping[str, str] | None = None,
        rebuild: bool = False,
        on_wait: Callable[[], None] = lambda: None,
    ) -> bool:
        """Link the files of entry `key` into the folder `into`. Returns True on a cache hit.

        On a miss, or with `rebuild`, `make(folder)` writes the files. While another process makes
        the same entry, this call runs `on_wait()` once and blocks. Files are hard links where the
        file system has them, so they must not be changed. `key_parts` are stored with the entry.
        """
        self._prepare()
        with self._lock(key, on_wait):
            entry = self.folder / key
            found = not rebuild and self._intact(entry)
            if not found:
                self._make(entry, make, key_parts or {})
            os.utime(entry / _ENTRY)
            for name in _files_of(entry):
                link_or_copy(entry / name, into / name)
        self._trim()
        return found

    def _make(
        self, entry: Path, make: Callable[[Path], None], key_parts: Mapping[str, str]
    ) -> None:
        with self.work_folder() as work:
            made = work / entry.name
            made.mkdir()
            make(made)
            files = {
                path.name: [path.stat().st_size, sha256_of(path)] for path in sorted(made.iterdir())
            }
            about = {"files": files, "key": dict(key_parts)}
            write_file(made / _ENTRY, json.dumps(about, indent=2) + "\n")
            _remove(entry)
            made.rename(entry)

    def _intact(self, entry: Path) -> bool:
        """Return True if every file of an entry has its recorded hash; remove the entry if not."""
        if not entry.exists():
            return False
        try:
            files = _files_in(entry / _ENTRY)
            if files and all(
                (entry / name).stat().st_size == size and sha256_of(entry / name) == sha256
                for name, (size, sha256) in files.items()
            ):
                return True
        except OSError:
            pass
        _remove(entry)
        return False

    def _trim(self) -> None:
        """Evict the least recently used entries until the rest fits; entries in use stay."""
        with self._lock("", lambda: None):
            entries = []
            for path in self.folder.glob(f"*/{_ENTRY}"):
                if not _files_in(path):
                    continue  # not an entry of this cache
                with suppress(FileNotFoundError):  # another process is rebuilding it
                    entries.append((path.stat().st_mtime, path.parent, _bytes_of(path.parent)))
            total = sum(size for _, _, size in entries)
            for _, entry, size in sorted(entries):
                if total <= self.limit:
                    break
                with self._try_lock(entry.name) as free:
                    if free:
                        total -= size
                        _remove(entry)

    @contextmanager
    def work_folder(self) -> Iterator[Path]:
        """Temporary folder in the cache's file system. Removes those of killed processes first."""
        with temporary_folder(self.folder, _WORK) as work:
            yield work

    def _prepare(self) -> None:
        try:
            (self.folder / _LOCKS).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise MmiError(
                f"the engine cache {self.folder} cannot be written: {error.strerror}",
                fix=f"Name another folder in the environment variable {CACHE}",
            ) from None

    @contextmanager
    def _lock(self, key: str, on_wait: Callable[[], None]) -> Iterator[None]:
        with (self.folder / _LOCKS / (key or "all")).open("a") as file:
            if not try_lock(file.fileno()):
                on_wait()
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _try_lock(self, key: str) -> Iterator[bool]:
        with (self.folder / _LOCKS / key).open("a") as file:
            yield try_lock(file.fileno())


def _files_of(entry: Path) -> list[str]:
    return sorted(_files_in(entry / _ENTRY))


def _files_in(path: Path) -> dict[str, list[Any]]:
    """Files of an entry with size and hash, from its `entry.json`; empty if that is invalid."""
    try:
        found = json.loads(path.read_bytes())
        # No assert: what decides over removal is checked under `python -O` too.
        inside = all(Path(name).name == name for name in found["files"])
        if not (inside and isinstance(found["key"], dict)):
            return {}
        return {name: [int(size), str(sha256)] for name, (size, sha256) in found["files"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _remove(entry: Path) -> None:
    """Remove the files that an entry lists, damaged ones too.

    Other files in its folder belong to the user: the folder is renamed instead of removed.
    """
    if not os.path.lexists(entry):
        return
    with suppress(OSError):
        for name in (*(named := _files_in(entry / _ENTRY)), *([_ENTRY] if named else [])):
            (entry / name).unlink(missing_ok=True)
        entry.rmdir()
    if os.path.lexists(entry):
        kept = entry.with_name(f"{entry.name}-{secrets.token_hex(4)}")
        entry.rename(kept)
        log.warning("%s holds files that mmi did not write; moved to %s", entry, kept)


def _bytes_of(entry: Path) -> int:
    return sum(path.stat().st_size for path in entry.iterdir())


def link_or_copy(source: Path, to: Path) -> None:
    """Hard-link a file, or copy it where the file system has no hard links."""
    try:
        os.link(source, to)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EEXIST):
            raise
        try:
            shutil.copyfile(source, to)
        except BaseException:
            to.unlink(missing_ok=True)
            raise
