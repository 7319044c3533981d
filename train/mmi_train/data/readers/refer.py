"""RefCOCO, RefCOCO+ and RefCOCOg: a sentence about a region, answered by its box.

Read from the converted lines of the published code, or from the official pickle with
`instances.json`. The picture is squashed to the encoder's square, as in the published code.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mmi_deploy.documents.images import Rgb
from mmi_train.data.document import TextPart
from mmi_train.data.readers.data_set import DataSet
from mmi_train.data.readers.folder import by_id, json_lines, listed, read_json
from mmi_train.data.readers.pictures import Picture
from mmi_train.data.readers.questions import MALFORMED
from mmi_train.data.readers.restricted_pickle import read_pickle
from mmi_train.data.readers.sample import Box, PicturePart, Sample, Skipped, joined

SCALE = 999

_BOXLESS = "box is not within the picture"


@dataclass(frozen=True)
class Region:
    """One record: a sentence about a box of a picture of `width` x `height` pixels."""

    id: int | str
    image: str
    sentence: str
    box: Box
    width: int
    height: int


class Refer(DataSet[Region]):
    """Sentences about regions. `short`: the set's name in the files' names; `by`: who split it."""

    default_prompt = "rec"
    short: ClassVar[str]
    by: ClassVar[Sequence[str]]

    def _lines(self, split: str) -> tuple[str, ...]:
        coded = self.short.replace("+", "%2B")
        return tuple(dict.fromkeys(f"{name}_{split}.jsonl" for name in (self.short, coded)))

    def _pickles(self) -> tuple[str, ...]:
        return tuple(place + f"refs({by}).p" for place in ("", f"{self.short}/") for by in self.by)

    def has(self, split: str) -> bool:
        return self.folder.find(*self._lines(split), *self._pickles()) is not None

    def read(self) -> Iterator[Region | Skipped]:
        lines = self.folder.find(*self._lines(self.split))
        if lines is not None:
            for number, entry in enumerate(json_lines(self.kept(lines))):
                yield _region_of_line(entry, number)
            return
        pickle = self.folder.find(*self._pickles())
        if pickle is None:
            raise self.folder.lacks(*self._lines(self.split), *self._pickles())
        refs = listed(pickle, read_pickle(self.kept(pickle)))
        path = self.kept(self.folder.file("instances.json", f"{self.short}/instances.json"))
        value = read_json(path)
        boxes = by_id(listed(path, value, "annotations"))
        images = by_id(listed(path, value, "images"))
        for ref in refs:
            if isinstance(ref, dict) and ref.get("split") == self.split:
                yield from _regions_of_ref(ref, boxes, images)

    def sample_of(self, record: Region, draw: random.Random) -> Sample:
        name = record.image
        year = re.search(r"COCO_((?:train|val)2014)_", name)
        folders = ["", "images/", *((f"{year[1]}/", f"images/{year[1]}/") if year else ())]
        picture: Picture = self.folder.picture(*(folder + name for folder in folders))
        box, sentence = record.box, record.sentence
        if self.settings.mirror and self.split == "train" and draw.random() < 0.5:
            box, sentence = mirrored_box(box, record.width), swapped(sentence)
            picture = Mirrored(picture)
        answer = box_text(box, record.width, record.height)
        parts = self.prompt.parts(
            PicturePart(picture, box=box, fit="squash"), {"sentence": sentence}
        )
        ending = "</box>" if self.prompt.text.endswith("<box>") else ""
        parts.append(TextPart(self.prompt.before_answer + answer + ending, True))
        about = {"bbox": list(box), "width": record.width, "height": record.height}
        return Sample(record.id, joined(parts), (answer,), about)


class RefCoco(Refer):
    splits = ("train", "val", "testA", "testB")
    short, by = "refcoco", ("unc", "google")


class RefCocoPlus(Refer):
    splits = ("train", "val", "testA", "testB")
    short, by = "refcoco+", ("unc",)


class RefCocoG(Refer):
    splits = ("train", "val", "test")
    short, by = "refcocog", ("umd", "google")


def box_text(box: Box, width: int, height: int, *, digits: int = 3) -> str:
    """A box in pixels as the model writes it: thousandths, cut off, in `digits` digits."""
    x1, y1, x2, y2 = (str(value).zfill(digits) for value in thousandths(box, width, height))
    return f"({x1},{y1})({x2},{y2})"


def thousandths(box: Box, width: int, height: int) -> list[int]:
    """A box in 0...999 of the picture's sides, cut off to whole numbers."""
    sides = (width, height, width, height)
    return [int(value / side * SCALE) for value, side in zip(box, sides, strict=True)]


_SIDES_SWAPPED = {"left": "right", "right": "left"}
_SIDE = re.compile(r"\b(left|right)\b", re.IGNORECASE)
_SIDE_INSIDE = re.compile(r"left|right")


def swapped(sentence: str, *, published_inside_words: bool = False) -> str:
    """The sentence for the mirrored picture: left and right exchanged. `published_inside_words`:
    also inside words, as the published code does (`bright` becomes `bleft`)."""
    if published_inside_words:
        return _SIDE_INSIDE.sub(lambda side: _SIDES_SWAPPED[side[0]], sentence)

    def other(side: re.Match[str]) -> str:
        word = _SIDES_SWAPPED[side[0].lower()]
        if side[0].isupper():
            return word.upper()
        return word.capitalize() if side[0][0].isupper() else word

    return _SIDE.sub(other, sentence)


def mirrored_box(box: Box, width: int) -> Box:
    """The box in the mirrored picture."""
    x1, y1, x2, y2 = box
    return width - x2, y1, width - x1, y2


@dataclass(frozen=True)
class Mirrored:
    """A picture mirrored left to right."""

    picture: Picture

    @property
    def name(self) -> str:
        return self.picture.name

    def exists(self) -> bool:
        return self.picture.exists()

    def load(self) -> Rgb:
        return np.ascontiguousarray(self.picture.load()[:, ::-1])


def _region_of_line(entry: Any, number: int) -> Region | Skipped:
    match entry:
        case {
            "image": str(image),
            "sent": str(sentence),
            "bbox": [x1, y1, x2, y2],
            "width": int(width),
            "height": int(height),
        } if all(isinstance(side, int | float) for side in (x1, y1, x2, y2)):
            return _checked(Region(number, image, sentence, (x1, y1, x2, y2), width, height))
    return Skipped(MALFORMED)


def _regions_of_ref(
    ref: Mapping[str, Any], boxes: Mapping[Any, Any], images: Mapping[Any, Any]
) -> Iterator[Region | Skipped]:
    """Regions of an entry of refs.p, one for each of its sentences."""
    match _of(boxes, ref.get("ann_id")), _of(images, ref.get("image_id")):
        case (
            {"bbox": [x, y, w, h]},
            {"file_name": str(name), "width": int(width), "height": int(height)},
        ) if all(isinstance(side, int | float) for side in (x, y, w, h)):
            pass
        case _:
            yield Skipped("region is not in instances.json")
            return
    sentences = ref.get("sentences")
    for one in sentences if isinstance(sentences, list) else [None]:
        match one:
            case {"sent": str(sentence), "sent_id": int(key)}:
                box = (x, y, x + w, y + h)
                yield _checked(Region(key, name, sentence, box, width, height))
            case _:
                yield Skipped(MALFORMED)


def _of(entries: Mapping[Any, Any], key: Any) -> Any:
    return entries.get(key) if isinstance(key, int | str) else None


def _checked(region: Region) -> Region | Skipped:
    x1, y1, x2, y2 = region.box
    sides = region.width, region.height
    if min(sides) < 1 or not (0 <= x1 <= x2 <= sides[0] + 1 and 0 <= y1 <= y2 <= sides[1] + 1):
        return Skipped(_BOXLESS)
    return region
