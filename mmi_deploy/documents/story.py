"""Story: a document during generation, given and generated parts together, written to a folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmi_deploy.documents.document import Document, Draw, Image, Text
from mmi_deploy.documents.files import to_markdown
from mmi_deploy.documents.images import Rgb, to_png

MARKDOWN_NAME = "story.md"
PAGE_NAME = "index.html"
_SHOWN_BY_BROWSERS = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}


@dataclass(frozen=True)
class Entry:
    """One part of the finished document; generated: the model made it."""

    part: Text | Image
    generated: bool


class Story:
    """Collects generated texts and pictures; `entries` is the document so far, in order.

    The i-th drawn picture replaces the i-th `Draw` of the document; further pictures follow the
    document's end.
    """

    def __init__(self, document: Document) -> None:
        self._given = document.parts
        self._open = sum(isinstance(part, Draw) for part in document.parts)
        self._drawn: list[Image] = []
        self._added: list[Text | Image] = []

    def add_text(self, text: str) -> None:
        """Append a generated text."""
        if self._added and isinstance(self._added[-1], Text):
            self._added[-1] = Text(self._added[-1].text + text)
        else:
            self._added.append(Text(text))

    def add_picture(self, rgb: Rgb) -> None:
        """Add a drawn picture, uint8 [height, width, 3]."""
        if len(self._drawn) < self._open:
            self._drawn.append(Image(rgb))
        else:
            self._added.append(Image(rgb))

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All parts so far; a `Draw` without a drawn picture is left out."""
        drawn = iter(self._drawn)
        found: list[Entry] = []
        for part in self._given:
            if not isinstance(part, Draw):
                found.append(Entry(part, generated=False))
            elif (picture := next(drawn, None)) is not None:
                found.append(Entry(picture, generated=True))
        return (*found, *(Entry(part, generated=True) for part in self._added))


def picture_names(entries: Sequence[Entry]) -> dict[int, str]:
    """Index of each picture in `entries` -> its file name: `picture-01.png`, ..."""
    names: dict[int, str] = {}
    for index, entry in enumerate(entries):
        if isinstance(entry.part, Image):
            source, suffix = entry.part.source, ".png"
            if isinstance(source, Path) and source.suffix.lower() in _SHOWN_BY_BROWSERS:
                suffix = source.suffix.lower()
            names[index] = f"picture-{len(names) + 1:02d}{suffix}"
    return names


def write_story(folder: Path, entries: Sequence[Entry]) -> None:
    """Write story.md, which `read_document` reads again, and its pictures into `folder`."""
    names = picture_names(entries)
    for index, name in names.items():
        part = entries[index].part
        assert isinstance(part, Image)
        if isinstance(part.source, Path) and part.source.suffix.lower() == Path(name).suffix:
            shutil.copyfile(part.source, folder / name)
        else:
            (folder / name).write_bytes(to_png(part.rgb))
    merged: list[Text | Image] = []
    for index, entry in enumerate(entries):
        part = entry.part
        if isinstance(part, Image):
            merged.append(Image(Path(names[index]), part.alt))
        elif merged and isinstance(merged[-1], Text):
            merged[-1] = Text(merged[-1].text + part.text)
        else:
            merged.append(part)
    text = to_markdown(merged, lambda image: str(image.source))
    # Readers drop one byte order mark.
    encoding = "utf-8-sig" if text.startswith("\ufeff") else "utf-8"
    (folder / MARKDOWN_NAME).write_text(text, encoding=encoding, newline="\n")
