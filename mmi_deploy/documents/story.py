"""A document while it is generated: what was given, what the model added, and both in a folder."""

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
    """One part of the finished document, and whether the model made it."""

    part: Text | Image
    generated: bool


class Story:
    """Collects texts and pictures as they come; `entries` is the document so far, in order.

    The k-th drawn picture takes the k-th place that the document left open, later ones follow the
    document's end.
    """

    def __init__(self, document: Document) -> None:
        self._given = document.parts
        self._open = sum(isinstance(part, Draw) for part in document.parts)
        self._drawn: list[Image] = []
        self._added: list[Text | Image] = []

    def add_text(self, text: str) -> None:
        """Text that the model wrote."""
        if self._added and isinstance(self._added[-1], Text):
            self._added[-1] = Text(self._added[-1].text + text)
        else:
            self._added.append(Text(text))

    def add_picture(self, rgb: Rgb) -> None:
        """A picture that the model drew, uint8 [h, w, 3]."""
        if len(self._drawn) < self._open:
            self._drawn.append(Image(rgb))
        else:
            self._added.append(Image(rgb))

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every part that there is; places that nothing was drawn for are left out."""
        drawn = iter(self._drawn)
        found: list[Entry] = []
        for part in self._given:
            if not isinstance(part, Draw):
                found.append(Entry(part, generated=False))
            elif (picture := next(drawn, None)) is not None:
                found.append(Entry(picture, generated=True))
        return (*found, *(Entry(part, generated=True) for part in self._added))


def picture_names(entries: Sequence[Entry]) -> dict[int, str]:
    """File name of the picture at each index of `entries` that is one: `picture-01.png`, ..."""
    names: dict[int, str] = {}
    for index, entry in enumerate(entries):
        if isinstance(entry.part, Image):
            source, suffix = entry.part.source, ".png"
            if isinstance(source, Path) and source.suffix.lower() in _SHOWN_BY_BROWSERS:
                suffix = source.suffix.lower()
            names[index] = f"picture-{len(names) + 1:02d}{suffix}"
    return names


def write_story(folder: Path, entries: Sequence[Entry]) -> None:
    """Write the pictures and story.md, which can be read as a document again, into `folder`."""
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
    encoding = "utf-8-sig" if text.startswith("\ufeff") else "utf-8"  # readers leave out the first
    (folder / MARKDOWN_NAME).write_text(text, encoding=encoding, newline="\n")
