"""Data sets: samples by their numbers, in the order of the files, each the same whenever read.

What is drawn at random (a caption of several, a picture before or after its text) depends on the
seed, the epoch and the sample's number alone, so that a run resumes exactly by its sample number.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from mmi_deploy.documents.images import Rgb, resize
from mmi_deploy.errors import DocumentError
from mmi_train.data.document import ImagePart, Part, TextPart
from mmi_train.data.readers.folder import BROKEN, MISSING, Folder
from mmi_train.data.readers.sample import PicturePart, Sample, Skipped
from mmi_train.data.readers.templates import Prompt, prompt_called

RecordT = TypeVar("RecordT")

# Errors of values that no published file holds: infinite or endless numbers, lists as keys.
_ODD = (TypeError, ValueError, OverflowError, KeyError, IndexError, AttributeError)


@dataclass(frozen=True)
class Settings:
    """Choices that the reader of every set takes. `split`: of the published ones, None for the
    first that is there. `prompt`: a name of `templates.PROMPTS`, None for the set's own.
    `published`: names of the published code's faults to reproduce, as `published_history`.
    `mirror`: mirror half of the pictures of regions and of ADE20K in training, with their boxes,
    maps and sentences.
    `total`: samples of a set that is drawn from again until there are so many (LN-COCO)."""

    split: str | None = None
    prompt: str | None = None
    seed: int = 0
    published: frozenset[str] = frozenset()
    mirror: bool = False
    total: int | None = None


class DataSet(ABC, Generic[RecordT]):
    """A split of a data set.

    `skipped`: records that the set's rules left out when it was opened, by reason; `examples`: the
    first of each. `splits`: what it is published in, the first that is there the default.
    `default_prompt`: a name of `templates.PROMPTS`; `training_prompt`: that of the training split,
    if it is another.
    """

    splits: Sequence[str] = ("train",)
    default_prompt = "vqa"
    training_prompt = ""

    def __init__(self, folder: Folder, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.files: list[Path] = []  # that decide the samples, for the fingerprint
        self.split = self._chosen()
        own = self.training_prompt if self.split == "train" else ""
        self.prompt: Prompt = prompt_called(settings.prompt or own or self.default_prompt)
        self._records: list[RecordT] = []
        try:
            for place, record in enumerate(self.read()):
                if isinstance(record, Skipped):
                    self.skipped[record.reason] += 1
                    example = record.detail or f"record {place} of {self._current()}"
                    self.examples.setdefault(record.reason, example)
                else:
                    self._records.append(record)
        except _ODD as error:
            raise DocumentError(
                f"{self._current()} is not what the data set publishes: {error}",
                fix="it may be damaged, or of another version of the set: see docs/data.md",
            ) from None

    def _chosen(self) -> str:
        if self.settings.split is not None:
            if self.settings.split not in self.splits:
                raise DocumentError(
                    f"the data set {self.folder.name} has no split {self.settings.split}",
                    expected="one of " + ", ".join(self.splits),
                )
            return self.settings.split
        return next((split for split in self.splits if self.has(split)), self.splits[0])

    @abstractmethod
    def has(self, split: str) -> bool:
        """Return true if the files of a split are there."""

    @abstractmethod
    def read(self) -> Iterator[RecordT | Skipped]:
        """Records of the split in the order of its files, and those that are left out."""

    @abstractmethod
    def sample_of(self, record: RecordT, draw: random.Random) -> Sample:
        """The sample of a record, its pictures not decoded; raises `Skipped`."""

    def __len__(self) -> int:
        return len(self._records)

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """Sample `index`, with the draws of `epoch`; raises `Skipped`."""
        key = f"{self.settings.seed} {epoch} {index} {self.folder.name}"
        try:
            return self.sample_of(self.record(index), random.Random(key))
        except Skipped:
            raise
        except (DocumentError, OSError) as error:  # a shard that changed since it was opened
            raise Skipped("shard is damaged", str(error)) from None
        except _ODD as error:
            raise Skipped("entry is malformed", f"sample {index}: {error}") from None

    def record(self, index: int) -> RecordT:
        return self._records[index]

    def samples(self) -> Iterator[Sample]:
        """All samples that no rule leaves out, in order, their pictures not decoded."""
        for index in range(len(self)):
            try:
                yield self.sample(index)
            except Skipped:
                continue

    def fingerprint(self) -> str:
        """Checksum of the split: its annotation files, and what decides how they are read."""
        hashed = hashlib.sha256(f"{self.folder.name} {self.split} {self.settings}".encode())
        for path in self.files:
            with path.open("rb") as file:
                hashed.update(hashlib.file_digest(file, "sha256").digest())
        return hashed.hexdigest()

    def _current(self) -> Path:
        """The file that is being read."""
        return self.files[-1] if self.files else self.folder.path

    def kept(self, path: Path) -> Path:
        """Note a file that decides the samples."""
        self.files.append(path)
        return path


def picture_of(part: PicturePart) -> Rgb:
    """Decode a picture of a sample; raises `Skipped` with `MISSING` or `BROKEN`."""
    if not part.picture.exists():
        raise Skipped(MISSING, part.picture.name)
    try:
        return part.picture.load()
    except Skipped:
        raise
    except DocumentError as error:
        raise Skipped(BROKEN, str(error)) from None


def document_of(sample: Sample) -> tuple[Part, ...]:
    """Training document of a sample, its pictures decoded; raises `Skipped`."""
    return tuple(
        part if isinstance(part, TextPart) else ImagePart(_fitted(part), part.learn)
        for part in sample.parts
    )


def _fitted(part: PicturePart) -> Rgb:
    """The picture as training takes it: one to squash becomes a square, which no later crop
    cuts."""
    rgb = picture_of(part)
    return resize(rgb, max(rgb.shape[:2]), "squash") if part.fit == "squash" else rgb
