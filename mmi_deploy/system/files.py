"""Atomic writes of files, file hashes and the cache folder. Folders: `output_folder`.

A file is written beside its destination under a temporary name and renamed at the end, so that
Ctrl-C, a full disk or a crash leaves the old file as it was.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO

from mmi_deploy.errors import ConfigError, MmiError

# Environment variable that names the cache folder.
CACHE = "MMI_CACHE"

# Longest file name, in bytes.
_LONGEST = 255


def shortened(name: str, room: int) -> str:
    """`name`, truncated so that `room` more bytes still fit into a file name."""
    encoded = os.fsencode(name)
    if len(encoded) + room <= _LONGEST:
        return name
    return encoded[: _LONGEST - room].decode(errors="ignore")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def temporary_name(path: Path) -> Path:
    """A hidden, unused path in the folder of `path`."""
    ending = f".{secrets.token_hex(8)}.tmp"
    return path.with_name(f".{shortened(path.name, len(ending) + 1)}{ending}")


def write_file(path: Path, data: bytes | str) -> None:
    """Write `path` atomically; an existing file, which must be our own, is replaced."""
    with _written(path, data) as temporary:
        temporary.replace(path)


def write_new_file(path: Path, data: bytes | str) -> None:
    """Write a result to `path` atomically, without replacing any file.

    If a file has appeared there since `prepare_file`, the result gets another name beside it, and
    `MmiError` names that file.
    """
    with _written(path, data) as temporary:
        for number in count(1):
            ending = f"-{number}{path.suffix}"
            name = f"{shortened(path.stem, len(os.fsencode(ending)))}{ending}"
            free = path if number == 1 else path.with_name(name)
            with suppress(FileExistsError):
                _give_name(temporary, free)
                break
    if free != path:
        raise MmiError(
            f"{path} has appeared meanwhile and was left as it is", fix=f"the result is in {free}"
        )


@contextmanager
def _written(path: Path, data: bytes | str) -> Iterator[Path]:
    """A temporary file beside `path` that holds `data`; removed at the end. The umask applies."""
    temporary = temporary_name(path)
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _give_name(file: Path, free: Path) -> None:
    """Give `file` the second name `free`; raises `FileExistsError` if a file has that name."""
    try:
        os.link(file, free)
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        with file.open("rb") as source, free.open("xb") as target:
            try:
                shutil.copyfileobj(source, target)
            except BaseException:
                free.unlink()
                raise


def check_parent(path: Path, shown: Path | None = None) -> None:
    """Raise `MmiError` if nothing can be created at `path`: its name is too long, or a folder above
    it is a file or read-only. shown: the path that the error names."""
    shown = shown or path
    try:
        there = next(above for above in path.absolute().parents if os.path.lexists(above))
        if not there.is_dir():
            raise MmiError(f"{shown} cannot be written: {there} is not a folder")
        with suppress(FileNotFoundError):
            os.lstat(path)  # a name that is too long
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise MmiError(f"{shown} cannot be written: {error.strerror}") from None


def prepare_file(path: Path, *endings: str) -> None:
    """Create the folder of a file that will be written after minutes of work.

    Raises `MmiError` if no file can be written there, if the file exists, or if its name has none
    of `endings`.
    """
    if endings and path.suffix not in endings:
        raise MmiError(
            f"cannot write {path.name}", expected=f"a name that ends in {' or '.join(endings)}"
        )
    check_parent(path)
    if os.path.lexists(path):
        raise MmiError(
            f"{path} is there already, and would be lost", fix="remove it, or give another name"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MmiError(f"{path} cannot be written: {error.strerror}") from None


def cache_folder(*, writes: bool = False) -> Path:
    """Cache folder of compiled kernels and built engines: `$MMI_CACHE`, or `mmi_deploy` in the
    user's cache folder. The folder may not exist yet.

    Raises `ConfigError` if the user has no home folder and `$MMI_CACHE` is not set, and with
    `writes` if `$MMI_CACHE` cannot be written. Without `writes` it may lie on a read-only disk.
    """
    named = os.environ.get(CACHE)
    if not named:
        named = os.environ.get("XDG_CACHE_HOME")
        try:
            return Path(named or Path.home() / ".cache") / "mmi_deploy"
        except RuntimeError:  # neither HOME nor an entry in the list of users, as in a container
            raise ConfigError(
                "there is no home folder to keep compiled kernels and engines in",
                fix=f"name a folder in the environment variable {CACHE}",
            ) from None
    folder = Path(named)
    if writes:
        there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
        try:
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise ConfigError(
                f"{CACHE} names {folder}, which cannot be written: {error.strerror}",
                fix="name another folder in it, or none",
            ) from None
    return folder


def size(count: int) -> str:
    """Format a number of bytes: `9.3 MB`."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises `OSError`, also for pipes, devices and sockets: a read of those may block for ever.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe does not block
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "Not a regular file", str(path))
