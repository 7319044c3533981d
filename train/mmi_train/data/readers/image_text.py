"""Pictures with a caption each: LAION-COCO, LAION-2B-en, CC-12M, Objects365.

Read as the published code keeps them (lines of JSON), and as img2dataset downloads them (tars, or
folders with a parquet file).
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from mmi_deploy.errors import ConfigError, DocumentError
from mmi_deploy.system.files import open_regular
from mmi_train.data.document import TextPart
from mmi_train.data.readers.data_set import DataSet
from mmi_train.data.readers.folder import line_value
from mmi_train.data.readers.pictures import Picture, TarPicture, tar_members
from mmi_train.data.readers.sample import PicturePart, Sample, SamplePart, Skipped, joined
from mmi_train.data.readers.shards import LineShards

# Shortest caption in characters, as the paper filters.
SHORTEST = 10

_SIDES = (".txt", ".json")
_MOST_SIDE = 2**20
_MALFORMED = "line is malformed"
_FAILED = "download failed"


@dataclass(frozen=True)
class Line:
    """A record of a shard of lines, by its number."""

    number: int


@dataclass(frozen=True)
class Packed:
    """A record of a tar: the picture, and offsets and sizes of the files beside it."""

    picture: TarPicture
    sides: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Row:
    """A record of a parquet file of img2dataset."""

    id: str
    place: str
    caption: str


class ImageText(DataSet[Line | Packed | Row]):
    """Captioned pictures of the web. `text_learns`: whether a caption before its picture is
    learned."""

    default_prompt = "draw"
    text_learns: ClassVar[bool] = True

    def _shards(self, ending: str) -> list[Path]:
        # Folders below may be those of pictures, which img2dataset gives a .txt each.
        places = (self.folder.path, self.folder.path / "annotations")
        return sorted({path for place in places for path in place.glob(f"*{ending}")})

    def has(self, split: str) -> bool:
        return any(self._shards(ending) for ending in (".txt", ".jsonl", ".tar", ".parquet"))

    def read(self) -> Iterator[Line | Packed | Row | Skipped]:
        if lines := self._shards(".txt") or self._shards(".jsonl"):
            self._lines = LineShards(lines)
            self.files += self._lines.paths
            for reason in self._lines.damaged.values():
                yield Skipped("shard is damaged", reason)
            yield from map(Line, range(len(self._lines)))
        elif tars := self._shards(".tar"):
            for path in tars:
                yield from self._packed(path)
        elif tables := self._shards(".parquet"):
            for path in tables:
                yield from self._rows(path)
        else:
            links = self.folder.find("cc12m.tsv")
            if links is not None:
                raise _links(links)
            raise self.folder.lacks("*.txt", "*.tar", "*.parquet")

    def _packed(self, path: Path) -> Iterator[Packed | Skipped]:
        try:
            members = tar_members(path)
        except DocumentError as error:
            yield Skipped("shard is damaged", str(error))
            return
        self.files.append(path)
        keys: dict[str, list[tuple[str, int, int]]] = {}
        for name, offset, size in members:
            keys.setdefault(str(PurePosixPath(name).with_suffix("")), []).append(
                (name, offset, size)
            )
        for found in keys.values():
            sides = tuple(one for one in found if PurePosixPath(one[0]).suffix in _SIDES)
            pictures = [one for one in found if one not in sides]
            if pictures:
                name, offset, size = pictures[0]
                yield Packed(TarPicture(path, f"{path.name}/{name}", offset, size), sides)
            else:
                yield Skipped(_FAILED)

    def _rows(self, path: Path) -> Iterator[Row | Skipped]:
        try:
            from pyarrow import ArrowException, parquet
        except ModuleNotFoundError:
            raise ConfigError(
                f"{path} is a parquet file, for which pyarrow is missing",
                fix="Install it: pip install pyarrow",
            ) from None
        try:
            table = parquet.ParquetFile(path)
            names = set(table.schema_arrow.names)
            if "key" not in names:
                raise _links(path)
            wanted = [name for name in ("key", "caption", "top_caption", "status") if name in names]
            self.files.append(path)
            for batch in table.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    yield _row(row, path.stem)
        except (ArrowException, OSError) as error:
            yield Skipped("shard is damaged", f"{path}: {error}")

    def sample_of(self, record: Line | Packed | Row, draw: random.Random) -> Sample:
        if isinstance(record, Line):
            key, places, caption = self._line(record.number)
            picture: Picture = self.folder.picture(*places)
        elif isinstance(record, Packed):
            key, caption = _beside(record)
            picture = record.picture
        else:
            key, caption = record.id, record.caption
            picture = self.folder.picture(
                *(record.place + end for end in (".jpg", ".png", ".webp"))
            )
        if len(caption.strip()) < SHORTEST:
            raise Skipped(f"caption is shorter than {SHORTEST} characters", by_rule=True)
        return Sample(key, paired(picture, caption, draw.random() < 0.5, self.text_learns))

    def _line(self, number: int) -> tuple[str, tuple[str, ...], str]:
        match line_of(self._lines[number]):
            case {"image": str(image), "caption": (str() | list()) as caption}:
                return image, (image, f"images/{image}"), caption_text(caption)
        raise Skipped(_MALFORMED)


class LaionCaptions(ImageText):
    """LAION's captions: before a picture they are not learned, as in the published code."""

    text_learns = False


def line_of(line: bytes) -> Any:
    """Value of a line: JSON, or a Python literal as in the published example; None if neither."""
    found = line_value(line)
    if found is None and line.lstrip()[:1] == b"{":
        try:
            return ast.literal_eval(line.decode())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
    return found


def caption_text(caption: str | Sequence[Any]) -> str:
    """The caption as it is learned: a list joined, in lower case."""
    texts = (
        [caption] if isinstance(caption, str) else [one for one in caption if isinstance(one, str)]
    )
    return " ".join(texts).lower()


def paired(
    picture: Picture, caption: str, picture_first: bool, text_learns: bool = True
) -> tuple[SamplePart, ...]:
    """A picture before its caption, which is learned, or after it, and drawn from it."""
    if picture_first:
        return joined([PicturePart(picture), TextPart(caption, True)])
    return joined([TextPart(caption, text_learns), PicturePart(picture, True)])


def _beside(record: Packed) -> tuple[str, str]:
    """Key and caption of a picture in a tar; raises `Skipped` for a failed download."""
    about: dict[str, Any] = {}
    caption = ""
    with open_regular(record.picture.tar) as file:
        for name, offset, size in record.sides:
            file.seek(offset)
            content = file.read(min(size, _MOST_SIDE))
            if name.endswith(".txt"):
                caption = content.decode("utf-8", "replace")
            else:
                found = line_value(content)
                about = found if isinstance(found, dict) else {}
    if about.get("status", "success") != "success":
        raise Skipped(_FAILED, by_rule=True)
    told = about.get("top_caption") or caption or about.get("caption")
    key = str(about.get("key") or PurePosixPath(record.picture.name).stem)
    return key, caption_text(told) if isinstance(told, str) else ""


def _row(row: dict[str, Any], folder: str) -> Row | Skipped:
    if row.get("status", "success") != "success":
        return Skipped(_FAILED)
    told = row.get("top_caption") or row.get("caption")
    if not isinstance(row["key"], str) or not isinstance(told, str):
        return Skipped(_MALFORMED)
    return Row(row["key"], f"{folder}/{row['key']}", caption_text(told))


def _links(path: Path) -> DocumentError:
    return DocumentError(
        f"{path} holds links, not pictures",
        fix="download them with img2dataset (github.com/rom1504/img2dataset), and give its folder",
    )
