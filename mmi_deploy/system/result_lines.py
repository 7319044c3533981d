"""Results of a long run as JSONL, one line per input, that a killed run is resumed from.

NAME.jsonl                one object per line, in the order in which the results came
NAME.files/               files of the results
NAME.files/.mmi-run.json  the run that they belong to

Each line begins with the number of the input that it answers: `{"line": 12, ...`. A line with an
`error` is an attempt that failed. When a run is resumed, such lines and a torn last line are
removed, and nothing else ever is; no file is overwritten. A JSONL or a folder that mmi did not
write is refused, and so are those of another run.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from mmi_deploy.errors import MmiError
from mmi_deploy.system.files import check_parent, open_regular, write_file
from mmi_deploy.system.output_folder import check_run_folder
from mmi_deploy.system.temporary_folder import temporary_folder

SUFFIX = ".jsonl"
RECORD = ".mmi-run.json"

_FILES = ".files"
_FORMAT = 1
_ELSEWHERE = "give another output file"

# Prefix of the folder of unfinished files.
_WORK = ".results-"

# First characters of a line.
_START = b'{"line": '

# Largest line in bytes.
_LONGEST = 2**28


def check_results(path: Path) -> None:
    """Raise `MmiError` if results cannot be written to `path`: its name has another ending, a file
    there was not written by mmi, or nothing can be created there."""
    if path.suffix != SUFFIX:
        raise MmiError(
            f"cannot write {path}",
            expected=f"a name that ends in {SUFFIX}",
            fix=f"give one, as -o results{SUFFIX}",
        )
    check_parent(path)
    folder = path.with_suffix(_FILES)
    check_run_folder(folder)
    if os.path.lexists(folder / RECORD):
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            raise MmiError(f"{path} is not a file", fix=_ELSEWHERE)
        return
    if os.path.lexists(path):
        raise MmiError(
            f"{path} is there already, and holds no results of mmi",
            fix=f"remove it, or {_ELSEWHERE}",
        )
    if folder.is_dir() and (names := [n for n in os.listdir(folder) if not n.startswith(_WORK)]):
        raise MmiError(
            f"{folder} holds {sorted(names)[0]}, which mmi did not write",
            fix=f"move it elsewhere, or {_ELSEWHERE}",
        )


class ResultLines:
    """Opened results; `line in results` is true for an input that has one."""

    def __init__(self, path: Path, work: Path) -> None:
        """work: a folder for unfinished files."""
        self._path, self._folder, self._work = path, path.with_suffix(_FILES), work
        self._done = bytearray()  # 1 at the number of each input that has a result
        self._repair()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o666)

    def __contains__(self, line: int) -> bool:
        return line < len(self._done) and bool(self._done[line])

    @property
    def done(self) -> int:
        """Number of inputs that have a result."""
        return sum(self._done)

    def add_file(self, name: str, data: bytes) -> str:
        """Write a file of a result; returns its path from the folder of the JSONL.

        A file of the same contents, which a killed run may have left, is taken as it is; one of
        other contents stays, and the new one gets another name.
        """
        unfinished = self._work / name
        unfinished.write_bytes(data)
        stem, suffix = os.path.splitext(name)
        for number in count(1):
            path = self._folder / (name if number == 1 else f"{stem}-{number}{suffix}")
            if not os.path.lexists(path):
                unfinished.rename(path)
                break
            if path.is_file() and not path.is_symlink() and path.read_bytes() == data:
                unfinished.unlink()
                break
        return f"{self._folder.name}/{path.name}"

    def add(self, line: int, result: Mapping[str, Any]) -> None:
        """Append the result of input number `line`: the whole line, or nothing if it fails."""
        # ASCII: a line has no other line ends, whatever splits it.
        data = (json.dumps({"line": line, **result}) + "\n").encode()
        size = os.fstat(self._descriptor).st_size
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(self._descriptor, left) :]
        except BaseException:
            os.ftruncate(self._descriptor, size)
            raise

    def close(self) -> None:
        os.close(self._descriptor)

    def _repair(self) -> None:
        """Find what is done; remove a torn last line and failed attempts."""
        if not os.path.lexists(self._path):
            return
        good, bad = self._work / "good", False
        with open_regular(self._path) as file, good.open("wb") as kept:
            for number in count(1):
                data = file.readline(_LONGEST)
                if not data:
                    break
                line = self._line(data, number, file)
                if line:
                    self._mark(line)
                    kept.write(data)
                bad = bad or not line
        if bad:
            good.replace(self._path)
        else:
            good.unlink()

    def _line(self, data: bytes, number: int, file: BinaryIO) -> int:
        """Input number of a line with a result; 0 for one that is torn or holds an error."""
        if not data.endswith(b"\n") and not file.read(1):
            if data.startswith(_START) or _START.startswith(data):
                return 0
        try:
            value = json.loads(data)
            if data.startswith(_START) and type(value["line"]) is int and value["line"] > 0:
                return 0 if "error" in value else int(value["line"])
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise MmiError(
            f"line {number} of {self._path} is not a result of mmi, or was changed",
            fix=f"restore it, or {_ELSEWHERE}",
        )

    def _mark(self, line: int) -> None:
        if line >= len(self._done):
            self._done.extend(bytes(max(line + 1, 2 * len(self._done)) - len(self._done)))
        self._done[line] = 1


@contextmanager
def result_lines(path: Path, run: Mapping[str, Any]) -> Iterator[ResultLines]:
    """Begin results, or resume those of the same run; `run` is what they depend on, for JSON.

    Raises `MmiError` as `check_results` does, if the results at `path` are those of another run,
    and while another process writes them.
    """
    check_results(path)
    folder = path.with_suffix(_FILES)
    folder.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder, _WORK, alone=str(path)) as work:
        record = {"format": _FORMAT, "results": path.name, **json.loads(json.dumps(run))}
        found = _read_record(folder / RECORD) if os.path.lexists(folder / RECORD) else None
        if found is not None and os.path.lexists(path) and os.path.getsize(path):
            _check_record(path, found, record)
        elif found != record:  # a run without results may become another one
            write_file(folder / RECORD, json.dumps(record, indent=1) + "\n")
        lines = ResultLines(path, work)
        try:
            yield lines
        finally:
            lines.close()


def run_of(path: Path) -> dict[str, Any] | None:
    """Settings that the results in `path` depend on, as given to `result_lines`; None for a file
    without such a record. Raises `MmiError` for a damaged one."""
    place = path.with_suffix(_FILES) / RECORD
    if not os.path.lexists(place):
        return None
    found = _read_record(place)
    return {key: value for key, value in found.items() if key not in ("format", "results")}


def _read_record(place: Path) -> dict[str, Any]:
    """Read the record of a run; raises `MmiError` for another file of its name."""
    try:
        with open_regular(place) as file:
            found = json.loads(file.read())
        if place.is_symlink() or not isinstance(found, dict) or found["format"] != _FORMAT:
            raise ValueError("not a record")
    except (OSError, ValueError, KeyError, RecursionError):
        raise MmiError(f"{place} cannot be understood", fix=_ELSEWHERE) from None
    return found


def _check_record(path: Path, found: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Raise `MmiError` if the results belong to another run than `record`."""
    for key in sorted({*record, *found}):
        if record.get(key) != found.get(key):
            raise MmiError(
                f"{path} holds results of another run: {key} differs",
                expected=json.dumps(found.get(key)),
                got=json.dumps(record.get(key)),
                fix=f"run the command with which it was begun, or {_ELSEWHERE}",
            )
