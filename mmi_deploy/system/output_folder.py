"""Create, replace and remove output folders: the folders that commands write.

mmi removes only what it wrote itself. Each output folder holds a marker, `.mmi`, which lists its
files with sizes and hashes. A folder is replaced if it holds exactly these files, all unchanged;
otherwise the run is refused before its work starts, and the error names the first such file.
`--force` overrules the kind of an output folder, never its contents. The home folder, the root of a
repository, a mount point, the current folder and the folders above them are never replaced.

A new folder is filled beside its destination in a folder of unfinished work, `.NAME.new-*`, which
holds `new` and, during the exchange, `old`:

    check NAME; rename NAME to old; check old; rename new to NAME; remove our own files from old

If the process is killed during the exchange, the next run moves `old` back. A new folder that
cannot replace the old one at the end is kept beside it as `NAME-new`, and the error names it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from mmi_deploy.errors import MmiError
from mmi_deploy.system.files import check_parent, sha256_of, shortened, write_file
from mmi_deploy.system.temporary_folder import (
    UNFINISHED,
    in_use,
    in_use_error,
    remove_work,
    state_of,
    temporary_folder,
)

log = logging.getLogger(__name__)

# Marker of an output folder: JSON list of the files that were written.
MARKER = ".mmi"

# Cache of verified hashes in a bundle or target, written by readers.
CHECKED = ".checked.json"

_FORMAT = 1
_NEW, _OLD = "new", "old"
_ELSEWHERE = "give another output folder"
_MOVE = "move it elsewhere, or give another output folder"
_REPOSITORIES = (".git", ".hg", ".svn")

# Kind of an output folder -> its subfolder that holds further output folders, and their kind.
_PARTS = {"bundle": ("engines", "target")}

# Files of this many bytes or more are not hashed again if their times are those in the marker.
_LARGE = 2**26

# Nanoseconds after which the times of a file are reliable: within one tick of the file system's
# clock a second change would not show in them.
_SETTLED = 3 * 10**9

Hashed = Callable[[Path], str]
Signature = tuple[int, ...]


def new_folder(
    folder: Path,
    force: bool | None = False,
    *,
    kind: str = "folder",
    inputs: Sequence[Path] = (),
    hashed: Hashed = sha256_of,
) -> _NewFolder:
    """Fill a temporary folder in a `with` block; if the block succeeds, it replaces `folder`.

    The marker is written at the end. Arguments and errors are those of `check_replaceable`, which
    runs before anything is written, and again before the exchange: if `folder` cannot be replaced
    then, it stays, the new folder gets a name beside it, and `MmiError` names that. `hashed`
    returns the hash of a file.
    """
    return _NewFolder(folder, force, kind, inputs, hashed)


def check_replaceable(
    folder: Path,
    force: bool | None = False,
    *,
    kind: str = "folder",
    inputs: Sequence[Path] = (),
) -> None:
    """Raise `MmiError` unless `folder` can be written without removing what mmi did not write.

    Accepted: an absent or empty folder, and an unchanged output folder of the same `kind` or, with
    `force`, of any kind (None: the command has no `--force`). Refused: the folders that the
    module's docstring names, a link, a file, a folder that holds any of `inputs`, and a folder that
    another process is writing.
    """
    place = _place(folder)
    with _readable(folder):
        _check_place(folder, place)
        check_parent(place, folder)
        if in_use(place.parent, _prefix(place)):
            raise in_use_error(str(folder))
        _check_contents(folder, place, force, kind, inputs)


@contextmanager
def run_folder(folder: Path, kind: str) -> Iterator[None]:
    """Lock a folder to which one run at a time adds output folders and files.

    The folder may hold other files too. Raises `MmiError` as `check_replaceable` does, but accepts
    a mount point.
    """
    place = _place(folder)
    with ExitStack() as stack:
        check_run_folder(folder)
        with _readable(folder):
            place.mkdir(parents=True, exist_ok=True)
            stack.enter_context(temporary_folder(place, f".{kind}-", alone=str(folder)))
        yield


def check_run_folder(folder: Path) -> None:
    """Raise `MmiError` where `run_folder` would; runs of other processes are not looked for."""
    place = _place(folder)
    with _readable(folder):
        _check_place(folder, place, mounts=True)
        check_parent(place, folder)


def written_files(folder: Path) -> tuple[str, dict[str, tuple[int, str]]] | None:
    """Kind of an output folder, and size and SHA-256 of each of its files when it was written,
    links aside; None for a folder without a marker. Raises `MmiError` for a marker that cannot be
    understood."""
    marker = _read_marker(folder, folder)
    if marker is None:
        return None
    files = {
        name: (entry["size"], entry["sha256"])
        for name, entry in marker.files.items()
        if isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)
    }
    return marker.kind, files


def rewrite_file(folder: Path, name: str, data: bytes | str) -> None:
    """Replace one file of an output folder and its entry in the marker."""
    marker = None
    with suppress(MmiError):  # the marker of an earlier version lists no files
        marker = _read_marker(folder, folder)
    write_file(folder / name, data)
    if marker is not None:
        entry = _entry(folder / name, sha256_of)
        about = {**marker.about, "files": {**marker.files, name: entry}}
        write_file(folder / MARKER, _text(about))


def remove_folder(folder: Path) -> None:
    """Remove an output folder; raises `MmiError` if it holds anything that mmi did not write."""
    place = _place(folder)
    with _readable(folder):
        _check_place(folder, place)
        if in_use(place.parent, _prefix(place)):
            raise in_use_error(str(folder))
        _remove(place, _examine(place, folder).entries)
        if os.path.lexists(place):
            raise MmiError(f"{folder} could not be removed completely: look at what is left")


class _NewFolder:
    """Context manager of `new_folder`."""

    def __init__(
        self,
        folder: Path,
        force: bool | None,
        kind: str,
        inputs: Sequence[Path],
        hashed: Hashed,
    ) -> None:
        self.folder, self.place, self.kind = folder, _place(folder), kind
        self._check = partial(_check_contents, folder, self.place, force, kind, inputs)
        self._hashed = hashed

    def __enter__(self) -> Path:
        place = self.place
        with ExitStack() as stack, _readable(self.folder):
            _check_place(self.folder, place)
            check_parent(place, self.folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            self._wrapper = stack.enter_context(
                temporary_folder(
                    place.parent, _prefix(place), alone=str(self.folder), clear=self._settle
                )
            )
            self._before = self._check()
            self._work = self._wrapper / _NEW
            self._work.mkdir()
            self._stack = stack.pop_all()
        return self._work

    def __exit__(self, kind: type[BaseException] | None, *about: Any) -> None:
        with self._stack:
            if kind is None:
                self._finish()

    def _finish(self) -> None:
        try:
            about = _listing(self._work, self.kind, self.place.name, self._hashed)
            write_file(self._work / MARKER, _text(about))
            self._exchange()
        except (MmiError, OSError) as error:
            kept = _keep(self._work, self.place, _NEW)
            if kept is None:  # no name beside it can be had: keep the work folder itself
                kept = self._work
                (self._wrapper / UNFINISHED).unlink(missing_ok=True)
            reason = error if isinstance(error, MmiError) else error.strerror
            raise MmiError(
                f"{self.folder} was left as it is: {reason}",
                fix=f"The new {self.kind} is in {self._spelled(kept)}",
            ) from None

    def _spelled(self, beside: Path) -> Path:
        """Path of a folder beside the output folder, spelled as the user spells the latter."""
        if beside.parent == self.place.parent and self.folder.name == self.place.name:
            return self.folder.with_name(beside.name)
        return beside

    def _exchange(self) -> None:
        place, before = self.place, self._check()
        if before is not None and before != self._before:
            raise MmiError(f"{self.folder} was written by somebody else meanwhile")
        if before is None:  # the rename fails if a file or a filled folder has appeared meanwhile
            self._work.rename(place)
            return
        old = place.rename(self._wrapper / _OLD)
        try:
            _examine(old, self.folder)
            self._work.rename(place)
        except BaseException:
            with suppress(OSError):
                old.rename(place)
            raise

    def _settle(self, wrapper: Path) -> None:
        """Clear unfinished work: restore the old folder in it, or remove it if the new one is in
        place."""
        old, place = wrapper / _OLD, self.place
        if os.path.lexists(old) and not os.path.lexists(place):
            with suppress(OSError):
                old.rename(place)
        elif os.path.lexists(old):
            with suppress(MmiError, OSError):
                _remove(old, _examine(old, self.folder).entries)
            if os.path.lexists(old) and (kept := _keep(old, place, _OLD)):
                log.warning(
                    "%s was replaced; what it held besides is in %s, and is yours",
                    self.folder,
                    self._spelled(kept),
                )
        if not os.path.lexists(old):
            remove_work(wrapper)


@dataclass(frozen=True)
class _Marker:
    """Contents of a marker. `written`: its modification time in ns."""

    about: dict[str, Any]
    written: int

    @property
    def kind(self) -> str:
        return str(self.about["kind"])

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        found = self.about["files"]
        assert isinstance(found, dict)
        return found


@dataclass
class _Found:
    """An unchanged output folder: its marker, and the entries that may be removed."""

    marker: _Marker
    entries: dict[str, Signature] = field(default_factory=dict)


def _place(folder: Path) -> Path:
    """Canonical path of `folder`; a link as its last component is not followed."""
    with _readable(folder):
        if folder.name in ("", ".."):
            return Path(os.path.realpath(folder))
        return Path(os.path.realpath(folder.parent)) / folder.name


def _prefix(place: Path) -> str:
    return f".{place.name}.new-"


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turn an `OSError` into a `MmiError` that names `folder`; a full disk stays an `OSError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise MmiError(
            f"{folder} cannot be written: {error.strerror or error}", fix=_ELSEWHERE
        ) from None


def _check_place(folder: Path, place: Path, *, mounts: bool = False) -> None:
    """Raise `MmiError` for a place that is never replaced, regardless of its contents."""
    with suppress(FileNotFoundError):
        if _holds(place, Path.cwd()):
            raise MmiError(f"{folder} is the folder you are in, or above it", fix=_ELSEWHERE)
    if place == Path(place.anchor):
        raise MmiError(f"{folder} is the root of the file system", fix=_ELSEWHERE)
    for home in _homes():
        if _holds(place, home):
            raise MmiError(f"{folder} is your home folder, or above it", fix=_ELSEWHERE)
    if not os.path.lexists(place):
        return
    if place.is_symlink():
        raise MmiError(f"{folder} is a link, not a folder", fix=_ELSEWHERE)
    if not place.is_dir():
        raise MmiError(f"{folder} is not a folder", fix=_ELSEWHERE)
    for name in _REPOSITORIES:
        if os.path.lexists(place / name):
            raise MmiError(
                f"{folder} is the root of a repository: {name} is in it", fix="give a folder in it"
            )
    if not mounts and place.is_mount():
        raise MmiError(
            f"{folder} is where a disk is mounted, and cannot be replaced",
            fix="give a folder in it",
        )


def _homes() -> list[Path]:
    """The user's home folder according to the environment and to the user database."""
    found = []
    if named := os.environ.get("HOME"):
        found.append(Path(named))
    with suppress(ImportError, KeyError):  # another system, or a user without an entry
        import pwd

        found.append(Path(pwd.getpwuid(os.getuid()).pw_dir))
    return [home for home in found if home.is_absolute()]


def _holds(place: Path, other: Path) -> bool:
    """True if `place` is `other` or an ancestor of it, also by another path to the same folder."""
    other = Path(os.path.realpath(other))
    if other.is_relative_to(place):
        return True
    with suppress(OSError):
        own = os.stat(place)
        return any(
            os.path.samestat(own, os.stat(path))
            for path in (other, *other.parents)
            if path.exists()
        )
    return False


def _check_contents(
    folder: Path, place: Path, force: bool | None, kind: str, inputs: Sequence[Path]
) -> bytes | None:
    """Raise `MmiError` unless `place` may be replaced. Returns its marker's bytes, or None where it
    is absent or empty."""
    if not os.path.lexists(place):
        return None
    for path in inputs:
        if _holds(place, path):
            raise MmiError(f"{folder} holds {path}, which is read to write it", fix=_ELSEWHERE)
    if place.is_symlink() or not place.is_dir():
        raise MmiError(f"{folder} is not a folder", fix=_ELSEWHERE)
    if not os.listdir(place):
        return None
    found = _examine(place, folder)
    written = found.marker.kind
    for path in inputs:
        if written != kind and path.is_dir() and _holds(Path(os.path.realpath(path)), place):
            raise MmiError(f"{folder} is part of {path}, which is read to write it", fix=_ELSEWHERE)
    if written != kind and not force:
        further = "" if force is None else ", or replace it with --force"
        raise MmiError(f"{folder} holds a {written}, not a {kind}", fix=_ELSEWHERE + further)
    return _text(found.marker.about).encode()


def _foreign(shown: Path, name: str, why: str = "which mmi did not write") -> MmiError:
    name = name if name.isprintable() else ascii(name)
    return MmiError(f"{shown} holds {name}, {why}", fix=_MOVE)


def _examine(place: Path, shown: Path) -> _Found:
    """List the contents of an output folder. shown: the path that errors name.

    Raises `MmiError` for an entry that mmi did not write, or that was changed since.
    """
    marker = _read_marker(place, shown)
    if marker is None:
        if not (names := sorted(os.listdir(place))):
            raise MmiError(f"{shown} is empty and has no {MARKER}: mmi did not write it")
        raise _foreign(shown, names[0])
    found = _Found(marker, {MARKER: _signature(os.lstat(place / MARKER))})
    _walk(place, "", shown, found)
    return found


def _walk(place: Path, inside: str, shown: Path, found: _Found) -> None:
    folder = place / inside
    effective = os.access in os.supports_effective_ids
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=effective):
        raise MmiError(f"{shown / inside} cannot be changed: {os.strerror(errno.EACCES)}")
    marker, (parts, part) = found.marker, _PARTS.get(found.marker.kind, ("", ""))
    for entry in _sorted(folder):
        name = f"{inside}{entry.name}"
        if name == MARKER:
            continue
        status = entry.stat(follow_symlinks=False)
        if not entry.is_dir(follow_symlinks=False):
            _check_file(place, name, shown, status, marker)
        elif name in marker.about["folders"] or name == parts:
            _walk(place, f"{name}/", shown, found)
        elif os.path.lexists(Path(entry.path, UNFINISHED)):
            _walk_unfinished(place, name, shown, found)
        elif inside == f"{parts}/":
            nested = _examine(place / name, shown / name)
            about = nested.marker.about
            if (about["kind"], about["folder"]) != (part, entry.name):
                raise _foreign(shown, name)
            found.entries |= {f"{name}/{below}": seen for below, seen in nested.entries.items()}
        else:
            raise _foreign(shown, name)
        found.entries[name] = _signature(status)


def _walk_unfinished(place: Path, name: str, shown: Path, found: _Found) -> None:
    """Add the unfinished work of a killed process to `found`: all of it was written by mmi."""
    state = state_of(place / name)
    if state == "held":
        raise in_use_error(str(shown))
    if state != "left" or os.path.lexists(place / name / _OLD):
        raise _foreign(shown, name)
    for above, folders, files in os.walk(place / name):
        for below in (*folders, *files):
            path = Path(above, below)
            found.entries[path.relative_to(place).as_posix()] = _signature(os.lstat(path))


def _check_file(
    place: Path, name: str, shown: Path, status: os.stat_result, marker: _Marker
) -> None:
    """Raise `MmiError` unless mmi wrote this file and it is unchanged."""
    path, entry = place / name, marker.files.get(name)
    if entry is None:
        if path.name != CHECKED or not _remembers(path, status):
            raise _foreign(shown, name)
    elif not _is_as(path, status, entry, marker.written):
        raise _foreign(shown, name, "which was changed since mmi wrote it")


def _is_as(path: Path, status: os.stat_result, entry: dict[str, Any], written: int) -> bool:
    if stat.S_ISLNK(status.st_mode):
        return entry.get("link") == os.readlink(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size != entry.get("size"):
        return False
    times = [status.st_mtime_ns, status.st_ctime_ns]
    if status.st_size >= _LARGE and entry.get("times") == times:
        if status.st_ctime_ns + _SETTLED < written:
            return True
    return _hash_of(path, status) == entry.get("sha256")


# Hashes of large files, cached in this process because a folder is checked more than once.
_hashes: dict[Signature, str] = {}


def _hash_of(path: Path, status: os.stat_result) -> str:
    key = (*_signature(status), status.st_ctime_ns)
    if key in _hashes:
        return _hashes[key]
    settled = status.st_size >= _LARGE and status.st_ctime_ns + _SETTLED < time.time_ns()
    found = sha256_of(path)
    if settled:
        _hashes[key] = found
    return found


def _remembers(path: Path, status: os.stat_result) -> bool:
    """True for a cache of verified hashes (`CHECKED`): name -> size, two times and a hash."""
    if not stat.S_ISREG(status.st_mode):
        return False
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and all(
        isinstance(seen, list) and [type(one) for one in seen] == [int, int, int, str]
        for seen in found.values()
    )


def _signature(status: os.stat_result) -> Signature:
    """Identity of a file or folder, which another one of the same name does not have."""
    if stat.S_ISDIR(status.st_mode):
        return (status.st_dev, status.st_ino)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _sorted(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _read_marker(place: Path, shown: Path) -> _Marker | None:
    """Read the marker of an output folder; None if there is none. Raises `MmiError` for a marker
    that cannot be read or lists no files."""
    path = place / MARKER
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise _foreign(shown, MARKER)
    text = path.read_bytes()
    fix = f"look through it and remove it yourself, or {_ELSEWHERE}"
    if old := re.fullmatch(rb"([a-z][a-z ]{0,31})\n", text):
        raise MmiError(
            f"{shown} holds a {old[1].decode()} of an earlier mmi, which kept no list of its files",
            fix=fix,
        )
    try:
        about = json.loads(text)
        if not (  # no assert: what decides over removal is checked under `python -O` too
            isinstance(about["kind"], str)
            and isinstance(about["folder"], str)
            and all(isinstance(entry, dict) for entry in about["files"].values())
            and isinstance(about["folders"], list)
            and about["format"] == _FORMAT
        ):
            raise ValueError("a field of another type")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise MmiError(f"{shown / MARKER} cannot be understood", fix=fix) from None
    return _Marker(about, status.st_mtime_ns)


def _listing(work: Path, kind: str, name: str, hashed: Hashed) -> dict[str, Any]:
    """Contents of the marker for the folder `work`."""
    files, folders = {}, []
    for above, below, names in os.walk(work):
        for one in (*below, *names):
            path = Path(above, one)
            relative = path.relative_to(work).as_posix()
            if path.is_dir() and not path.is_symlink():
                folders.append(relative)
            elif one != CHECKED:
                files[relative] = _entry(path, hashed)
    files, folders = dict(sorted(files.items())), sorted(folders)
    return {"format": _FORMAT, "kind": kind, "folder": name, "files": files, "folders": folders}


def _entry(path: Path, hashed: Hashed) -> dict[str, Any]:
    if path.is_symlink():
        return {"link": os.readlink(path)}
    status = path.stat()
    times = [status.st_mtime_ns, status.st_ctime_ns]
    return {"size": status.st_size, "sha256": hashed(path), "times": times}


def _text(about: dict[str, Any]) -> str:
    return json.dumps(about, indent=1) + "\n"


def _keep(path: Path, place: Path, what: str) -> Path | None:
    """Rename a folder to an unused name beside `place`; None if that is not possible."""
    for number in count(1):
        ending = f"-{what}" if number == 1 else f"-{what}-{number}"
        free = place.with_name(f"{shortened(place.name, len(ending))}{ending}")
        try:
            free.mkdir()
            return path.rename(free)
        except FileExistsError:
            continue
        except OSError:
            with suppress(OSError):
                free.rmdir()
            break
    return None


def _remove(place: Path, entries: dict[str, Signature]) -> None:
    """Remove `entries` and the folders that are empty afterwards; anything else stays, and with it
    the folder."""
    for above, folders, files, descriptor in os.fwalk(place, topdown=False):
        inside = Path(above).relative_to(place)
        for name in sorted((*files, *folders), key=lambda name: name == MARKER):  # the marker last
            known = entries.get((inside / name).as_posix())
            with suppress(OSError):
                status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                if known == _signature(status):
                    remove = os.rmdir if stat.S_ISDIR(status.st_mode) else os.unlink
                    remove(name, dir_fd=descriptor)
    with suppress(OSError):
        place.rmdir()


def main(folders: Sequence[str]) -> int:
    """Remove output folders and report those that are not removed; returns the exit code."""
    left = 0
    for folder in map(Path, folders):
        if os.path.lexists(folder):
            try:
                remove_folder(folder)
            except MmiError as error:
                print(f"mmi: kept: {error}", file=sys.stderr)
                left = 2
    return left


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
