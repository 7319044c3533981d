"""ADE20K: a picture drawn from its map of labels and its caption.

The maps' colours are made from their labels, by the published code's closed formula.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmi_train.data.document import TextPart
from mmi_train.data.readers.data_set import DataSet
from mmi_train.data.readers.folder import MISSING, entries
from mmi_train.data.readers.pictures import LabelMap, Picture
from mmi_train.data.readers.questions import MALFORMED
from mmi_train.data.readers.refer import Mirrored, swapped
from mmi_train.data.readers.sample import PicturePart, Sample, SamplePart, Skipped, joined

# Labels of the benchmark; 0 is unlabelled.
LABELS = 150

# Levels of a colour channel, and the distance of two of them.
LEVELS = 6
STEP = 256 // LEVELS


def label_colours() -> NDArray[np.uint8]:
    """Colour of each label, uint8 [151, 3]: label 0, unlabelled, is black; the others count down
    from white in six levels a channel, the blue one fastest."""
    number = np.arange(LABELS)
    digits = np.stack([number // LEVELS**2, number % LEVELS**2 // LEVELS, number % LEVELS], 1)
    return np.concatenate([np.zeros((1, 3)), 255 - STEP * digits]).astype(np.uint8)


@dataclass(frozen=True)
class Scene:
    """One record: the id of a picture, such as ADE_val_00000001, and its caption, if it has one."""

    id: str
    caption: str


class Ade20k(DataSet[Scene]):
    """ADEChallengeData2016. `{split}.json` holds captions, which are not published: without it
    pictures are drawn from their maps alone."""

    splits = ("training", "validation")
    default_prompt = "draw"

    def _folders(self, split: str) -> list[str]:
        """The folders of maps and pictures that are there, such as annotations/training."""
        kinds = ("annotations", "annotations_with_color", "images")
        found = (self.folder.folder(f"{kind}/{split}") for kind in kinds)
        return [folder for folder in found if folder is not None]

    def has(self, split: str) -> bool:
        return bool(self._folders(split))

    def read(self) -> Iterator[Scene | Skipped]:
        folders = self._folders(self.split)  # also tells where pictures are looked for
        captions = self.folder.find(f"{self.split}.json")
        if captions is not None:
            for entry in entries(self.kept(captions)):
                match entry:
                    case {"image_id": str(key), "caption": str(caption)}:
                        yield Scene(key, caption)
                    case _:
                        yield Skipped(MALFORMED)
            return
        if not folders:
            raise self.folder.lacks(f"annotations/{self.split}/")
        places = (self.folder.path / folder for folder in folders)
        names = {
            path.stem
            for place in places
            for path in place.iterdir()
            if path.suffix in (".png", ".jpg")
        }
        yield from (Scene(name, "") for name in sorted(names))

    def sample_of(self, record: Scene, draw: random.Random) -> Sample:
        labels = self.folder.picture(f"annotations/{self.split}/{record.id}.png")
        coloured = self.folder.picture(f"annotations_with_color/{self.split}/{record.id}.png")
        if labels.exists():
            plan = PicturePart(LabelMap(labels.path, labels.name, label_colours()))
        elif coloured.exists():
            plan = PicturePart(coloured)
        else:
            raise Skipped(MISSING, labels.name)
        photo: Picture = self.folder.picture(f"images/{self.split}/{record.id}.jpg")
        caption = record.caption
        if self.settings.mirror and self.split == "training" and draw.random() < 0.5:
            plan, photo = PicturePart(Mirrored(plan.picture)), Mirrored(photo)
            caption = swapped(caption)
        parts: list[SamplePart] = [plan]
        if caption:
            parts.append(TextPart(caption + ".", self.split == "training"))
        parts.append(PicturePart(photo, True))
        return Sample(record.id, joined(parts))
