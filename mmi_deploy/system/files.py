"""Files and folders that are either there whole or not at all.

Everything is written beside its destination under a temporary name and renamed at the end, so that
Ctrl-C, a full disk or a crash leaves what was there before.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mmi_deploy.errors import ConfigError, MmiError
from mmi_deploy.system.temporary_folder import temporary_folder

CACHE = "MMI_CACHE"
"""The variable that names the folder of what is made once and used again."""

_ELSEWHERE = "give another output folder"

MARKER = ".mmi"
"""A folder that holds this file was written by us and may be replaced by us."""


def write_file(path: Path, data: bytes | str) -> None:
    """Write `path` whole or not at all."""
    content = data.encode() if isinstance(data, str) else data
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def prepare_file(path: Path, *endings: str) -> None:
    """Make the folder of a file that will be written after minutes of work.

    Raises `MmiError` where no file can be written there, or its name has none of `endings`.
    """
    if endings and path.suffix not in endings:
        raise MmiError(
            f"cannot write {path.name}", expected=f"a name that ends in {' or '.join(endings)}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise MmiError(f"{path} cannot be written: {error.strerror}") from None


def check_replaceable(
    folder: Path, force: bool = False, *, kind: str = "folder", inputs: Sequence[Path] = ()
) -> None:
    """Raise `MmiError` when writing `folder` would destroy something that we did not write.

    Absent and empty folders are free to take; so is one whose marker says that we wrote it and that
    it is of the same `kind`, and, with `force`, any other folder. Never a file, a mount point, the
    current folder, one that contains it, or one that contains any of `inputs`.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise MmiError(f"{folder} is not a folder", fix=_ELSEWHERE)
    if folder.is_mount():
        raise MmiError(
            f"{folder} is where a disk is mounted, and cannot be replaced",
            fix="give a folder in it",
        )
    if Path.cwd().resolve().is_relative_to(folder.resolve()):
        raise MmiError(f"{folder} is the folder you are in, or above it", fix=_ELSEWHERE)
    for path in inputs:
        if path.resolve().is_relative_to(folder.resolve()):
            raise MmiError(
                f"{folder} holds {path}, which is read to write it",
                fix=_ELSEWHERE,
            )
    if not any(folder.iterdir()):
        return
    marker = folder / MARKER
    written = marker.read_text().strip() if marker.is_file() else ""
    if written == kind:
        return
    for path in inputs:
        if path.is_dir() and folder.resolve().is_relative_to(path.resolve()):
            raise MmiError(f"{folder} is part of {path}, which is read to write it", fix=_ELSEWHERE)
    if force:
        return
    if written:
        raise MmiError(
            f"{folder} holds a {written}, not a {kind}",
            fix="give another output folder, or replace it with --force",
        )
    raise MmiError(
        f"{folder} exists and holds files that mmi did not write",
        fix="give another output folder, or replace it with --force",
    )


def cache_folder(*, writes: bool = False) -> Path:
    """Where compiled kernels and built engines are kept: `$MMI_CACHE`, or `mmi_deploy` in the
    user's cache folder. It need not be there yet.

    With `writes`: raises `ConfigError` where `$MMI_CACHE` cannot be written. Who only reads may
    have it on a read-only disk.
    """
    named = os.environ.get(CACHE)
    if not named:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmi_deploy"
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
    """Bytes for people: `9.3 MB`."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


@contextmanager
def new_folder(
    folder: Path, force: bool = False, *, kind: str = "folder", inputs: Sequence[Path] = ()
) -> Iterator[Path]:
    """A temporary folder to fill; when the block ends well it takes the place of `folder`. What a
    killed process left of one goes.

    Raises as `check_replaceable` does, before anything is written.
    """
    check_replaceable(folder, force, kind=kind, inputs=inputs)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder.parent, f".{folder.name}.new-") as work:
        yield work
        (work / MARKER).write_text(kind + "\n")
        work.chmod(0o755)
        _swap(work, folder)


def _swap(work: Path, folder: Path) -> None:
    """Put `work` where `folder` is; what was there is back when the second rename fails."""
    if not folder.exists():
        work.rename(folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", suffix=".tmp", dir=folder.parent))
    try:
        old = folder.rename(aside / folder.name)
        try:
            work.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        with suppress(OSError):  # what is still in it must not go
            aside.rmdir()
