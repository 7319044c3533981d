"""Captions to draw from: MS-COCO and LN-COCO, 30 000 each, as FID is measured on."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

from mmi_train.data.document import TextPart
from mmi_train.data.readers.captions import Captioned, official_captions
from mmi_train.data.readers.data_set import DataSet
from mmi_train.data.readers.folder import json_lines
from mmi_train.data.readers.questions import MALFORMED
from mmi_train.data.readers.sample import PicturePart, Sample, Skipped, joined

MOST = 30_000


class CaptionsToDraw(DataSet[Captioned]):
    """Captions with the picture that each belongs to, which is learned to be drawn."""

    splits = ("val",)
    default_prompt = "draw"
    lower: ClassVar[bool] = False

    def sample_of(self, record: Captioned, draw: random.Random) -> Sample:
        picture = PicturePart(self.folder.picture(*record.pictures), True)
        caption = record.captions[0]
        text = TextPart(caption.lower() if self.lower else caption, False)
        return Sample(record.id, joined([text, picture]), record.captions)


class CocoToDraw(CaptionsToDraw):
    """MS-COCO: the first caption of each of the first 30 000 pictures of val2014, in lower case as
    in the published code."""

    lower = True

    def has(self, split: str) -> bool:
        return self.folder.find("captions_val2014.json") is not None

    def read(self) -> Iterator[Captioned | Skipped]:
        known: set[int | str] = set()
        for one in self.every():
            if isinstance(one, Skipped):
                yield one
            elif one.id not in known and len(known) < MOST:
                known.add(one.id)
                yield one

    def every(self) -> Iterator[Captioned | Skipped]:
        """All captions of all pictures."""
        return official_captions(self.kept(self.folder.file("captions_val2014.json")))


class LocalizedNarratives(CaptionsToDraw):
    """LN-COCO: all narratives; with `Settings.total` further ones of pictures with few."""

    _NAMES = ("coco_val_captions.jsonl", "coco_val_localized_narratives.jsonl")

    def has(self, split: str) -> bool:
        return self.folder.find(*self._NAMES) is not None

    def read(self) -> Iterator[Captioned | Skipped]:
        found = []
        for entry in json_lines(self.kept(self.folder.file(*self._NAMES))):
            match entry:
                case {"image_id": (str() | int()) as key, "caption": str(caption)} if str(
                    key
                ).isdecimal():
                    name = f"{int(key):012d}.jpg"
                    places = (f"val2017/{name}", f"images/val2017/{name}", f"images/{name}", name)
                    found.append(Captioned(int(key), places, (caption,), {}))
                case _:
                    yield Skipped(MALFORMED)
        yield from found[: self.settings.total]
        yield from oversampled(found, self.settings.total or 0, random.Random(self.settings.seed))


def oversampled(found: list[Captioned], most: int, draw: random.Random) -> list[Captioned]:
    """Captions to draw again, with a probability of 1 / the number of a picture's captions, until
    there are `most` in all."""
    if not found or len(found) >= most:
        return []
    count = Counter(one.id for one in found)
    return draw.choices(found, [1 / count[one.id] for one in found], k=most - len(found))
