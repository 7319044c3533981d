"""Pictures that answers were given about: their sizes, times and checksums, beside the answers.

An answering that goes on after days compares them, so that a picture that was replaced meanwhile is
not mixed with answers about the old one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mmi_deploy.errors import DocumentError
from mmi_deploy.system.files import open_regular, sha256_of
from mmi_train.data.readers.data_set import DataSet
from mmi_train.data.readers.pictures import Clip, FilePicture, Frame, LabelMap, Picture
from mmi_train.data.readers.sample import Sample, Skipped

# Key of a line of answers: for each given picture its size in bytes, its time of change in
# nanoseconds, and the first digits of its SHA-256.
SEEN = "seen"
_DIGITS = 16


def seen(sample: Sample) -> list[list[Any]]:
    """State of the files of the pictures that a question shows."""
    return [_state(path, _checksum(path)) for path in _paths(sample)]


def check_seen(answers: Path, questions: DataSet[Any]) -> None:
    """Raise `DocumentError` if a picture of an answered question was replaced since.

    A file of the same size and another time of change, such as a copy, is read again. Lines that
    cannot be read are left to the reader of results.
    """
    known: dict[Path, list[Any]] = {}
    try:
        with open_regular(answers) as file:
            for line in file:
                _check_line(line, questions, known)
    except FileNotFoundError:
        return


def _check_line(line: bytes, questions: DataSet[Any], known: dict[Path, list[Any]]) -> None:
    try:
        value = json.loads(line)
        number, states = value["line"], value[SEEN]
        paths = _paths(questions.sample(number - 1))
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, Skipped):
        return
    for path, state in zip(paths, states, strict=False):
        if known.get(path) == state:
            continue
        if _changed(path, state):
            raise DocumentError(
                f"the picture {path} was replaced since question {value.get('id')} was answered",
                fix="give another file for the answers, or restore the picture",
            )
        known[path] = state


def _changed(path: Path, state: list[Any]) -> bool:
    """True if a file is not what it was; one that is missing counts as unchanged, since its answer
    stays what it was."""
    try:
        size, time, checksum = state
        found = os.stat(path)
        if found.st_size != size:
            return True
        return found.st_mtime_ns != time and _checksum(path) != checksum
    except (OSError, ValueError, TypeError):
        return False


def _state(path: Path, checksum: str) -> list[Any]:
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, checksum]


def _checksum(path: Path) -> str:
    return sha256_of(path)[:_DIGITS]


def _paths(sample: Sample) -> list[Path]:
    """Files of the pictures that the model is given."""
    found = [_path(part.picture) for part in sample.pictures if not part.learn]
    return [path for path in found if path is not None]


def _path(picture: Picture) -> Path | None:
    match picture:
        case FilePicture() | Clip() | LabelMap():
            return picture.path
        case Frame(strip):
            return _path(strip)
    return None
