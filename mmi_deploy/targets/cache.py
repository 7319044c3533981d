"""Built engines, kept under the hash of all that they depend on.

An entry is a folder that is written under a temporary name and renamed: a killed build, a full disk
or Ctrl-C leaves nothing. Locks are the kernel's, so they end with the process that holds them.
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
from mmi_deploy.system.temporary_folder import taken, temporary_folder

log = logging.getLogger(__name__)

LIMIT = "MMI_ENGINE_CACHE_GB"
# Gigabytes of engines that are kept where the variable `LIMIT` says nothing else.
DEFAULT_LIMIT = 50

_ENTRY = "entry.json"
_WORK = ".work-"
_LOCKS = ".locks"


def key_of(parts: Mapping[str, str]) -> str:
    """The name of the entry that depends on `parts`."""
    return hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class EngineCache:
    """Engines in `folder`, at most `limit` bytes of them: those used longest ago go first."""

    folder: Path
    limit: int

    @classmethod
    def of_user(cls) -> EngineCache:
        """`engines` in the cache folder; raises `ConfigError` where that or `LIMIT` is wrong."""
        folder = cache_folder(writes=True) / "engines"
        text = os.environ.get(LIMIT) or str(DEFAULT_LIMIT)
        try:
            gigabytes = float(text)
        except ValueError:
            gigabytes = -1.0
        if not 0 <= gigabytes < float("inf"):
            raise ConfigError(f"{LIMIT} is no size", expected="gigabytes, such as 50", got=text)
        return cls(folder, int(gigabytes * 1e9))

    def has(self, key: str) -> bool:
        """Whether an entry is there, its bytes not looked at."""
        return (self.folder / key / _ENTRY).is_file()

    def obtain(
        self,
        key: str,
        make: Callable[[Path], None],
        into: Path,
        *,
        parts: Mapping[str, str] | None = None,
        afresh: bool = False,
        waits: Callable[[], None] = lambda: None,
    ) -> bool:
        """Put the files of entry `key` into the folder `into`; True when they were there already.

        Otherwise (or with `afresh`) `make(folder)` writes them. Who asks for an entry that another
        process is making calls `waits()` and waits for it. Files are hard links where the file
        system allows, so they must not be changed. `parts` is written down beside them.
        """
        self._prepare()
        with self._lock(key, waits):
            entry = self.folder / key
            found = not afresh and self._sound(entry)
            if not found:
                self._make(entry, make, parts or {})
            os.utime(entry / _ENTRY)
            for name in _files_of(entry):
                link_or_copy(entry / name, into / name)
        self._trim()
        return found

    def _make(self, entry: Path, make: Callable[[Path], None], parts: Mapping[str, str]) -> None:
        with self.work_folder() as work:
            made = work / entry.name
            made.mkdir()
            make(made)
            files = {
                path.name: [path.stat().st_size, sha256_of(path)] for path in sorted(made.iterdir())
            }
            about = {"files": files, "key": dict(parts)}
            write_file(made / _ENTRY, json.dumps(about, indent=2) + "\n")
            _remove(entry)
            made.rename(entry)

    def _sound(self, entry: Path) -> bool:
        """Whether every file of an entry has the bytes that were written; if not, it goes."""
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
        """Remove what was used longest ago until the rest fits; never what is in use."""
        with self._lock("", lambda: None):
            entries = []
            for path in self.folder.glob(f"*/{_ENTRY}"):
                if not _files_in(path):
                    continue  # somebody else's
                with suppress(FileNotFoundError):  # another process makes it again just now
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
        """A temporary folder in the cache's file system. Those of killed processes go first."""
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
    def _lock(self, key: str, waits: Callable[[], None]) -> Iterator[None]:
        with (self.folder / _LOCKS / (key or "all")).open("a") as file:
            if not taken(file.fileno()):
                waits()
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _try_lock(self, key: str) -> Iterator[bool]:
        with (self.folder / _LOCKS / key).open("a") as file:
            yield taken(file.fileno())


def _files_of(entry: Path) -> list[str]:
    return sorted(_files_in(entry / _ENTRY))


def _files_in(path: Path) -> dict[str, list[Any]]:
    """The files that an entry's list names, with sizes and hashes; none where it is no such
    list."""
    try:
        found = json.loads(path.read_bytes())
        assert isinstance(found["key"], dict)
        assert all(Path(name).name == name for name in found["files"])
        return {name: [int(size), str(sha256)] for name, (size, sha256) in found["files"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError):
        return {}


def _remove(entry: Path) -> None:
    """Remove an entry: the files that it names, damaged ones too. Whatever else is in the folder is
    somebody's, who finds it beside the entry."""
    if not os.path.lexists(entry):
        return
    with suppress(OSError):
        for name in (*(named := _files_in(entry / _ENTRY)), *([_ENTRY] if named else [])):
            (entry / name).unlink(missing_ok=True)
        entry.rmdir()
    if os.path.lexists(entry):
        kept = entry.with_name(f"{entry.name}-{secrets.token_hex(4)}")
        entry.rename(kept)
        log.warning("%s holds what mmi did not write; it is in %s now", entry, kept)


def _bytes_of(entry: Path) -> int:
    return sum(path.stat().st_size for path in entry.iterdir())


def link_or_copy(source: Path, to: Path) -> None:
    """Give a file a second name, or where that cannot be, its bytes."""
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
