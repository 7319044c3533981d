"""Files of training documents: JSON, one document a line, or a list of them.

A document is a list of parts in reading order, as `mmi generate` reads it, with what the model
learns of each:

    [{"image": "a.png", "learn": false}, {"text": "a red ring.", "learn": true}]

A text with `learn` is learned as the continuation of what precedes it, a picture with `learn` is
learned to be drawn from it; both are learned unless `learn` is false. An object with the list as
its `parts` is read too, and so are conversations as LLaVA writes them, of which the answers are
learned. Pictures are files below the folder of the file, or below another.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmi_deploy.documents.files import json_value, resolve_link
from mmi_deploy.documents.images import read_rgb
from mmi_deploy.errors import DocumentError
from mmi_deploy.system.files import open_regular
from mmi_train.data.document import ImagePart, Part, TextPart

# Longest line of a file, and largest file that holds one list, in bytes.
MOST_LINE = 2**24
MOST_LIST = 2**32

_SPEAKERS = {
    "human": False,
    "user": False,
    "system": False,
    "gpt": True,
    "assistant": True,
}
_PLACE = "<image>"


@dataclass(frozen=True)
class _Picture:
    """A part that names a picture."""

    target: str
    draw: bool


class DocumentFile:
    """Documents of a .jsonl or .json file by their numbers; a line is parsed when it is asked for.

    `images`: the folder of the pictures, by default that of the file. `sha256`: of the file. Raises
    `DocumentError` for a file that cannot be read or holds no document.
    """

    def __init__(self, path: Path, images: Path | None = None) -> None:
        self.path = path
        self.images = path.parent if images is None else images
        if not self.images.is_dir():
            raise DocumentError(f"there is no folder {self.images} for the pictures")
        self._list: list[Any] | None = None
        try:
            with open_regular(path) as file:
                if path.suffix.lower() == ".json":
                    self.sha256, self._list = self._read_list(file)
                else:
                    self.sha256, self._starts, self._numbers = _index(file)
        except OSError as error:
            raise DocumentError(f"cannot read {path}: {error.strerror}") from None
        if not len(self):
            raise DocumentError(f"{path} holds no document")

    def __len__(self) -> int:
        return len(self._starts) if self._list is None else len(self._list)

    def name(self, index: int) -> str:
        """Place of a document, for messages."""
        if self._list is None:
            return f"line {self._numbers[index]} of {self.path}"
        return f"document {index + 1} of {self.path}"

    def parts(self, index: int, epoch: int = 0) -> tuple[Part, ...]:
        """Parts of a document, its pictures decoded; the same in every `epoch`.

        Whitespace next to pictures and at both ends is left out, as when the model is given a
        document. Raises `DocumentError`.
        """
        found = _stripped(list(_parts_of(self._entry(index))))
        if not found:
            raise DocumentError("the document is empty")
        return tuple(
            ImagePart(read_rgb(resolve_link(part.target, self.images)), part.draw)
            if isinstance(part, _Picture)
            else part
            for part in found
        )

    def _entry(self, index: int) -> Any:
        if self._list is not None:
            return self._list[index]
        with open_regular(self.path) as file:
            file.seek(int(self._starts[index]))
            line = file.readline(MOST_LINE + 1)
        if len(line) > MOST_LINE:
            raise DocumentError("the line is too long", expected=f"at most {MOST_LINE >> 20} MB")
        try:
            return json_value(line.decode("utf-8-sig" if index == 0 else "utf-8").strip())
        except UnicodeDecodeError:
            raise DocumentError("it is not UTF-8 text", fix="save the file as UTF-8") from None

    def _read_list(self, file: BinaryIO) -> tuple[str, list[Any]]:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_LIST:
            raise DocumentError(
                f"{self.path} is too large for one list",
                expected=f"at most {MOST_LIST >> 30} GB",
                fix="write one document a line, as .jsonl",
            )
        content = file.read()
        try:
            found = json.loads(content.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DocumentError(f"{self.path} is not JSON: {error}") from None
        if not isinstance(found, list):
            raise DocumentError(
                f"{self.path} is not a list of documents",
                fix="write one document a line, as .jsonl",
            )
        return hashlib.sha256(content).hexdigest(), found


def _index(file: BinaryIO) -> tuple[str, np.ndarray, np.ndarray]:
    """Hash of the file; byte offset and number of each line that is not blank."""
    hashed = hashlib.sha256()
    starts, numbers, at, number = [], [], 0, 0
    for line in file:
        number += 1
        hashed.update(line)
        if line.strip(b" \t\r\n\xef\xbb\xbf"):
            starts.append(at)
            numbers.append(number)
        at += len(line)
    return hashed.hexdigest(), np.array(starts, np.int64), np.array(numbers, np.int64)


def _parts_of(entry: object) -> Iterator[TextPart | _Picture]:
    if isinstance(entry, dict) and "conversations" in entry:
        yield from _conversation(entry)
        return
    listed = entry.get("parts") if isinstance(entry, dict) else entry
    if not isinstance(listed, list):
        raise DocumentError(
            "it is not a document",
            expected='a list of parts, as [{"image": "a.png"}, {"text": "a red ring."}]',
            got=_shown(entry),
        )
    for number, part in enumerate(listed, 1):
        yield _part(part, number)


def _part(part: object, number: int) -> TextPart | _Picture:
    match part:
        case {"text": str(text), **rest} if rest.keys() <= {"learn"}:
            learn = rest.get("learn", True)
            if isinstance(learn, bool):
                return TextPart(text, learn)
        case {"image": str(target), **rest} if rest.keys() <= {"learn", "alt"}:
            learn = rest.get("learn", True)
            if isinstance(learn, bool):
                return _Picture(target, learn)
        case {"draw": _}:
            raise DocumentError(
                f"part {number} is a place for a picture without the picture",
                fix='name the picture that is to be drawn there: {"image": "a.png", "learn": true}',
            )
    raise DocumentError(
        f"part {number} is not understood",
        expected='{"text": "..."} or {"image": "file.png"}, each with "learn": true or false',
        got=_shown(part),
    )


def _conversation(entry: dict[str, Any]) -> Iterator[TextPart | _Picture]:
    """Turns of a conversation: an answer follows its question after a space, a question the answer
    before it on a new line, unless there is whitespace already."""
    named = entry.get("image", [])
    targets = [named] if isinstance(named, str) else named
    turns = entry["conversations"]
    if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
        raise DocumentError("its image is not a file name or a list of them", got=_shown(named))
    if not isinstance(turns, list) or not turns:
        raise DocumentError("its conversations are not a list of turns", got=_shown(turns))
    texts = []
    for turn in turns:
        match turn:
            case {"from": str(speaker), "value": str(text)} if speaker in _SPEAKERS:
                texts.append((text, _SPEAKERS[speaker]))
            case _:
                raise DocumentError(
                    "a turn is not understood",
                    expected='{"from": "human" or "gpt", "value": "..."}',
                    got=_shown(turn),
                )
    places = sum(text.count(_PLACE) for text, _ in texts)
    if places not in (0, len(targets)) or (places and not targets):
        raise DocumentError(
            "its images do not fit its text",
            expected=f"an image for each {_PLACE}",
            got=f"{len(targets)} images for {places}",
        )
    waiting = iter(targets)
    if not places:  # images of a text that does not place them come first
        yield from (_Picture(target, False) for target in waiting)
    before = ""
    for text, learn in texts:
        if before and not before[-1].isspace() and text and not text[0].isspace():
            text = (" " if learn else "\n") + text
        first, *others = text.split(_PLACE)
        yield TextPart(first, learn)
        for piece in others:
            yield _Picture(next(waiting), False)
            yield TextPart(piece, learn)
        before = text


def _stripped(parts: Sequence[TextPart | _Picture]) -> list[TextPart | _Picture]:
    """Strip every run of texts as `document_of` strips the text that they make together."""
    found: list[TextPart | _Picture] = []
    for is_text, run in groupby(parts, lambda part: isinstance(part, TextPart)):
        if not is_text:
            found += run
            continue
        texts = [part for part in run if isinstance(part, TextPart)]
        while texts and not (first := texts[0].text.lstrip()):
            texts.pop(0)
        while texts and not (last := texts[-1].text.rstrip()):
            texts.pop()
        if texts:
            texts[0] = TextPart(first, texts[0].learn)
            last = texts[-1].text.rstrip()
            texts[-1] = TextPart(last, texts[-1].learn)
        found += [part for part in texts if part.text]
    return found


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:80]
