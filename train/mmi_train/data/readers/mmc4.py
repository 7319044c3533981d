"""MMC4: web documents with pictures, as the paper filters and orders them.

Pictures less alike to their sentence than 0.24 and those that cannot be read are left out, at most
six are kept, each stands before or after its sentence by chance. A document without pictures is
left out, one with a single picture every other time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmi_deploy.documents.images import Rgb
from mmi_deploy.errors import DocumentError
from mmi_train.data.document import TextPart
from mmi_train.data.readers.data_set import DataSet
from mmi_train.data.readers.folder import line_value
from mmi_train.data.readers.pictures import Picture
from mmi_train.data.readers.sample import PicturePart, Sample, SamplePart, Skipped, joined
from mmi_train.data.readers.shards import LineShards

LEAST_ALIKE = 0.24
MOST_PICTURES = 6

_SHARDS = (
    "docs_shard_*.jsonl.zip",
    "docs_shard_*.jsonl",
    "docs_no_face_shard_*.jsonl.zip",
    "docs_no_face_shard_*.jsonl",
)


@dataclass(frozen=True)
class LoadedPicture:
    """A picture that is decoded already."""

    name: str
    rgb: Rgb

    def exists(self) -> bool:
        return True

    def load(self) -> Rgb:
        return self.rgb


class Mmc4(DataSet[int]):
    """MMC4, its fewer-faces and core subsets too: shards of documents and a folder of pictures."""

    default_prompt = "draw"

    def has(self, split: str) -> bool:
        return self.folder.find(*_SHARDS) is not None

    def read(self) -> Iterator[int | Skipped]:
        places = [self.folder.path / place for place in self.folder.places]
        paths = sorted({path for name in _SHARDS for place in places for path in place.glob(name)})
        if not paths:
            raise self.folder.lacks(*_SHARDS)
        self._shards = LineShards(paths)
        self.files += self._shards.paths
        for reason in self._shards.damaged.values():
            yield Skipped("shard is damaged", reason)
        yield from range(len(self._shards))

    def sample_of(self, record: int, draw: random.Random) -> Sample:
        match line_value(self._shards[record]):
            case {"text_list": list(sentences), "image_info": list(images)} as entry if all(
                isinstance(text, str) for text in sentences
            ):
                pass
            case _:
                raise Skipped("document is malformed")
        if rows := entry.get("similarity_matrix"):  # the published code goes by its rows
            images = images[: len(rows)]
        parts = arranged(sentences, images, self._loaded, draw)
        return Sample(str(entry.get("url", record)), parts)

    def _loaded(self, name: str) -> Picture | None:
        try:
            picture = self.folder.picture(f"images/{name}", name)
            return LoadedPicture(picture.name, picture.load())
        except DocumentError:
            return None


def alike(images: Sequence[Any], sentences: int, least: float) -> list[tuple[int, str]]:
    """Sentence and name of each picture that is alike enough to a sentence that exists."""
    found = []
    for image in images:
        match image:
            case {
                "image_name": str(name),
                "matched_text_index": int(at),
                "matched_sim": (int() | float()) as alike,
            } if alike >= least and 0 <= at < sentences:
                found.append((at, name))
    return found


def arranged(
    sentences: Sequence[str],
    images: Sequence[Any],
    loaded: Callable[[str], Picture | None],
    draw: random.Random,
    *,
    least: float = LEAST_ALIKE,
    most: int = MOST_PICTURES,
    picture_first: float = 0.5,
    single: float = 0.5,
) -> tuple[SamplePart, ...]:
    """Parts of a document. `loaded`: a picture by its name, None if it cannot be read.
    `picture_first`: probability of a picture to stand before its sentence. `single`: probability of
    a document with one picture to be kept. Raises `Skipped`."""
    candidates = alike(images, len(sentences), least)
    draw.shuffle(candidates)
    chosen: list[tuple[int, Picture]] = []
    for at, name in candidates:
        if len(chosen) < most and (picture := loaded(name)) is not None:
            chosen.append((at, picture))
    if not chosen:
        raise Skipped("document has no picture", by_rule=True)
    if len(chosen) == 1 and draw.random() >= single:
        raise Skipped("document with one picture, dropped by chance", by_rule=True)
    chosen.sort(key=lambda pair: pair[0])
    before: dict[int, list[Picture]] = {}
    after: dict[int, list[Picture]] = {}
    for at, picture in chosen:
        (before if draw.random() < picture_first else after).setdefault(at, []).append(picture)
    return first_given(joined(interleaved(sentences, before, after)))


def interleaved(
    sentences: Sequence[str],
    before: Mapping[int, Sequence[Picture]],
    after: Mapping[int, Sequence[Picture]],
) -> list[SamplePart]:
    """Sentences joined by spaces, pictures before and after those of their numbers, all learned."""
    parts: list[SamplePart] = []
    for number, sentence in enumerate(sentences):
        parts += [PicturePart(picture, True) for picture in before.get(number, ())]
        parts.append(TextPart(sentence, True))
        parts += [PicturePart(picture, True) for picture in after.get(number, ())]
        parts.append(TextPart(" ", True))
    return parts


def first_given(parts: tuple[SamplePart, ...]) -> tuple[SamplePart, ...]:
    """The parts, a picture that begins them not learned: nothing is there to draw it from."""
    if parts and isinstance(parts[0], PicturePart):
        return PicturePart(parts[0].picture), *parts[1:]
    return parts
