"""JSONL of documents: each line is an object with a document and its options.

    {"id": "a", "parts": [{"text": "a red circle"}, {"draw": true}], "seed": 7}

`parts` is a document as in a JSON file (`files.py`); pictures are files beside the JSONL. `id`, a
string or a whole number, is the line's number unless it is given. All other keys are options. Blank
lines are skipped. Lines are read one at a time: memory does not grow with their number.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmi_deploy.documents.document import Document
from mmi_deploy.documents.files import (
    document_of_json,
    files_in,
    json_value,
    most_bytes,
    with_pictures,
)
from mmi_deploy.errors import DocumentError, MmiError
from mmi_deploy.system.files import open_regular

SUFFIX = ".jsonl"

_ID, _PARTS = "id", "parts"


@dataclass(frozen=True)
class DocumentLine:
    """One line. number: from 1. parts: decoded JSON of the document. options: the other keys."""

    number: int
    id: str | int
    parts: object
    options: dict[str, Any]


class DocumentLines:
    """Reads the lines of a file, which must not change meanwhile.

    context, images: the model's limits of tokens and pictures. options: keys that a line may have
    besides `id` and `parts`. `count`: number of documents; `sha256`: of the file. Raises
    `DocumentError`: a line that is not understood, named by its number, or an id that is there
    twice.
    """

    def __init__(self, path: Path, context: int, images: int, options: Collection[str]) -> None:
        self.path, self._folder = path, path.parent
        self._images, self._options = images, frozenset(options)
        # A line may be as long as a document, and has an id and options.
        self._most = most_bytes(context)
        self.count, self.sha256 = self._check()

    def __iter__(self) -> Iterator[DocumentLine]:
        """Read the lines; raises `DocumentError` at the end if the file has changed."""
        hashed = hashlib.sha256()
        yield from self._read(hashed)
        if hashed.hexdigest() != self.sha256:
            raise DocumentError(
                f"{self.path} was changed while it was read", fix="leave it as it is"
            )

    def document(self, line: DocumentLine) -> Document:
        """Document of a line, its pictures decoded. Raises `DocumentError`."""
        return with_pictures(document_of_json(line.parts, files_in(self._folder)), self._images)

    @contextmanager
    def at(self, number: int) -> Iterator[None]:
        """Add a line's number and the file's name to the `MmiError` of a block."""
        try:
            yield
        except MmiError as error:
            raise DocumentError(f"line {number} of {self.path}: {error}") from None

    def _check(self) -> tuple[int, str]:
        """Read every line once; returns their number and the hash of the file."""
        hashed = hashlib.sha256()
        # 8 bytes per line: the ids themselves may need more memory than there is.
        digests = array("Q", (_digest(line) for line in self._read(hashed)))
        if not digests:
            raise DocumentError(f"{self.path} holds no document")
        values, counts = np.unique(np.frombuffer(digests, np.uint64), return_counts=True)
        suspects = set(values[counts > 1].tolist())
        seen: dict[str, int] = {}
        for line in self._read(hashlib.sha256()) if suspects else ():
            if _digest(line) in suspects:
                first = seen.setdefault(str(line.id), line.number)
                if first != line.number:
                    raise DocumentError(
                        f"lines {first} and {line.number} of {self.path} have the same id",
                        expected="an id of its own for each line",
                        got=line.id,
                    )
        return len(digests), hashed.hexdigest()

    def _read(self, hashed: hashlib._Hash) -> Iterator[DocumentLine]:
        with self._open() as file:
            number = 0
            while text := file.readline(self._most + 1):
                number += 1
                hashed.update(text)
                with self.at(number):
                    if len(text) > self._most:
                        raise DocumentError(
                            "it is too long for the model",
                            expected=f"at most {self._most // 1000} kB",
                        )
                    line = self._parsed(text, number)
                if line is not None:
                    yield line

    def _open(self) -> BinaryIO:
        try:
            return open_regular(self.path)
        except OSError as error:
            raise DocumentError(f"cannot read {self.path}: {error.strerror}") from None

    def _parsed(self, data: bytes, number: int) -> DocumentLine | None:
        try:
            text = data.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise DocumentError("it is not UTF-8 text", fix="save the file as UTF-8") from None
        if not text:
            return None
        return document_line(text, number, self._options)


def document_line(text: str, number: int, options: Collection[str]) -> DocumentLine:
    """Parse a line. number: of the line. options: keys that it may have besides `id` and `parts`.
    Raises `DocumentError`."""
    value = json_value(text, number)
    if not isinstance(value, dict) or _PARTS not in value:
        raise DocumentError(
            "it is not a document",
            expected='an object with "parts", as {"parts": [{"text": "a red circle"}]}',
            got=text[:80],
        )
    name = value.get(_ID, number)
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise DocumentError(
            "its id is of the wrong type", expected="a string or a whole number", got=name
        )
    own = {key: value[key] for key in value if key not in (_ID, _PARTS)}
    for key in own:
        if key not in options:
            near = get_close_matches(key, options, n=1)
            raise DocumentError(
                f"its key {key!r} is unknown",
                fix=f"the nearest one is {near[0]}" if near else "remove it",
            )
    return DocumentLine(number, name, value[_PARTS], own)


def _digest(line: DocumentLine) -> int:
    """64 bits of a hash of the line's id."""
    return int.from_bytes(hashlib.blake2b(str(line.id).encode(), digest_size=8).digest(), "big")
