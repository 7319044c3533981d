"""Captions: COCO (Karpathy's and the official files), Flickr30k, NoCaps, Image2Paragraph, TextCaps.

In the training split every caption is a sample; in the others every picture is one, with all its
captions as answers.
"""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from mmi_train.data.document import TextPart
from mmi_train.data.readers.data_set import DataSet
from mmi_train.data.readers.folder import by_id, entries, listed, read_json, texts
from mmi_train.data.readers.sample import PicturePart, Sample, Skipped, joined

_MALFORMED = "entry is malformed"
_NO_CAPTION = "caption is empty"

# Of COCO's pictures, and how names of its files tell their part.
YEARS = 2014, 2017
_PART = re.compile(r"(train|val|test)(2014|2017)")


@dataclass(frozen=True)
class Captioned:
    """One record: the picture's id and the paths at which it may lie, and its captions."""

    id: int | str
    pictures: tuple[str, ...]
    captions: tuple[str, ...]
    about: Mapping[str, Any]


class Captions(DataSet[Captioned]):
    """Captioned pictures, whose entries a subclass reads."""

    default_prompt = "caption"
    training_prompt = "caption-sft"
    lower: ClassVar[bool] = True  # the published readers learn captions in lower case

    @abstractmethod
    def captioned(self) -> Iterator[Captioned | Skipped]:
        """Captioned pictures of the split in the order of its files."""

    def read(self) -> Iterator[Captioned | Skipped]:
        if self.split == "train":
            yield from self.captioned()
            return
        together: dict[int | str, Captioned] = {}
        for one in self.captioned():
            if isinstance(one, Skipped):
                yield one
            elif one.id in together:
                first = together[one.id]
                captions = first.captions + one.captions
                together[one.id] = Captioned(one.id, first.pictures, captions, first.about)
            else:
                together[one.id] = one
        yield from together.values()

    def sample_of(self, record: Captioned, draw: random.Random) -> Sample:
        picture = PicturePart(self.folder.picture(*record.pictures))
        parts = self.prompt.parts(picture, {})
        if record.captions:
            caption = draw.choice(record.captions).strip()
            caption = caption.lower() if self.lower else caption
            parts.append(TextPart(self.prompt.before_answer + caption, True))
        return Sample(record.id, joined(parts), record.captions, record.about)


def _karpathy_id(image: str) -> int | str:
    """Picture id: the digits at the end of the file's name, as the published scoring reads it."""
    found = re.search(r"\d+$", PurePosixPath(image).stem)
    return int(found[0]) if found else image


class CocoCaptions(Captions):
    """COCO captions: Karpathy's splits, or the official files of 2014 or 2017."""

    splits = ("train", "test", "val")

    def _names(self, split: str) -> list[str]:
        karpathy = f"coco_karpathy_{split}"
        official = [] if split == "test" else [f"captions_{split}{year}.json" for year in YEARS]
        return [f"{karpathy}.json", f"{karpathy}_gt.json", *official]

    def has(self, split: str) -> bool:
        return self.folder.find(*self._names(split)) is not None

    def captioned(self) -> Iterator[Captioned | Skipped]:
        names = self._names(self.split)
        path = self.kept(self.folder.file(*names))
        if path.name != names[0]:
            yield from official_captions(path, default="val2014")
            return
        for entry in entries(path):
            match entry:
                case {"image": str(image), "caption": str(one)}:
                    captions = [one]
                case {"image": str(image), "caption": list(captions)} if all(
                    isinstance(one, str) for one in captions
                ):
                    pass
                case _:
                    yield Skipped(_MALFORMED)
                    continue
            found = tuple(caption for caption in texts(captions) if caption.strip())
            if not found:
                yield Skipped(_NO_CAPTION)
                continue
            places = (image, f"images/{image}", f"coco/{image}")
            about = {key: entry[key] for key in ("image", "image_id") if key in entry}
            yield Captioned(_karpathy_id(image), places, found, about)


def official_captions(path: Path, default: str = "") -> Iterator[Captioned | Skipped]:
    """Captions of an official COCO file, `captions_val2014.json` or of its form, one a record.

    `default`: part and year of pictures without a name, if the file's name does not tell them.
    """
    value = read_json(path)
    files = by_id(value.get("images")) if isinstance(value, dict) else {}
    year = _PART.search(path.name) or _PART.search(default)
    for entry in listed(path, value, "annotations"):
        match entry:
            case {"image_id": (int() | str()) as number, "caption": str(caption)}:
                pass
            case _:
                yield Skipped(_MALFORMED)
                continue
        if not caption.strip():
            yield Skipped(_NO_CAPTION)
            continue
        image = files.get(number, {})
        about: dict[str, Any] = {k: image[k] for k in ("domain", "coco_url") if k in image}
        named = image.get("file_name") or entry.get("url")
        places = _places(named if isinstance(named, str) else None, number, year)
        yield Captioned(number, places, (caption,), about)


def _places(named: str | None, number: int | str, year: re.Match[str] | None) -> tuple[str, ...]:
    """Paths at which the picture of a COCO-like file may lie."""
    if named is None:
        named = f"{number}.jpg"
        if year is not None and isinstance(number, int):
            part, when = year.groups()
            prefix = f"COCO_{part}{when}_" if when == "2014" else ""
            named = f"{prefix}{number:012d}.jpg"
    folders = ["images/", ""]
    if year is not None:
        folders = [f"{year[0]}/", f"images/{year[0]}/", *folders]
    return tuple(folder + named for folder in folders)


class CaptionTable(Captions):
    """Captions in a file of COCO's form. `names`: what the file of each split may be called;
    `images`: the folders in which its pictures may lie."""

    names: ClassVar[Mapping[str, Sequence[str]]] = {}
    images: ClassVar[Sequence[str]] = ("images",)

    def has(self, split: str) -> bool:
        return self.folder.find(*self.names[split]) is not None

    def captioned(self) -> Iterator[Captioned | Skipped]:
        path = self.kept(self.folder.file(*self.names[self.split]))
        for one in self.every(path):
            if isinstance(one, Captioned):
                name = one.pictures[-1]
                places = (*(f"{place}/{name}" for place in self.images), *one.pictures)
                one = Captioned(one.id, places, one.captions, one.about)
            yield one

    def every(self, path: Path) -> Iterator[Captioned | Skipped]:
        """Captions of the file, their pictures at their usual places."""
        return official_captions(path)


class Flickr30k(CaptionTable):
    """Flickr30k, Karpathy's test split of 1000 pictures."""

    splits = ("test",)
    names = {"test": ("test1k.token.coco_format", "flickr30k_test_karpathy.json")}
    images = ("flickr30k-images", "images")


class NoCaps(CaptionTable):
    """NoCaps: ten captions a picture in the validation split; those of the test split are not
    published."""

    splits = ("val", "test")
    names = {"val": ("nocaps_val_4500_captions.json",), "test": ("nocaps_test_image_info.json",)}
    images = ("images", "validation", "val", "test")

    def every(self, path: Path) -> Iterator[Captioned | Skipped]:
        if self.split != "test":
            yield from super().every(path)
            return
        for entry in entries(path, "images"):
            match entry:
                case {"id": (int() | str()) as number, "file_name": str(name)}:
                    about = {"domain": entry["domain"]} if "domain" in entry else {}
                    yield Captioned(number, (f"images/{name}", name), (), about)
                case _:
                    yield Skipped(_MALFORMED)


class Image2Paragraph(Captions):
    """Stanford's paragraphs of Visual Genome pictures."""

    splits = ("train", "test", "val")
    default_prompt = "paragraph"
    training_prompt = "paragraph-sft"
    lower = False

    def has(self, split: str) -> bool:
        return self.folder.find(f"{split}_split.json") is not None

    def captioned(self) -> Iterator[Captioned | Skipped]:
        ids = set(map(str, entries(self.kept(self.folder.file(f"{self.split}_split.json")))))
        path = self.kept(self.folder.file("paragraphs_coco.json", "paragraphs_v1.json"))
        value = read_json(path)
        for entry in listed(path, value, None if isinstance(value, list) else "annotations"):
            match entry:
                case {"image_id": (int() | str()) as number, "url": str(url)}:
                    text = entry.get("caption", entry.get("paragraph"))
                case _:
                    yield Skipped(_MALFORMED)
                    continue
            if str(number) not in ids:
                continue
            if not isinstance(text, str) or not text.strip():
                yield Skipped(_NO_CAPTION)
                continue
            place = "/".join(url.split("/")[-2:])  # VG_100K_2/2405722.jpg
            yield Captioned(number, (f"images/{place}", place), (text,), {})


class TextCaps(Captions):
    """TextCaps: captions of pictures with text."""

    splits = ("train", "val")

    def has(self, split: str) -> bool:
        return self.folder.find(f"TextCaps_0.1_{split}.json") is not None

    def captioned(self) -> Iterator[Captioned | Skipped]:
        path = self.kept(self.folder.file(f"TextCaps_0.1_{self.split}.json"))
        for entry in entries(path, "data"):
            match entry:
                case {"image_id": str(number), "caption_str": str(caption)} if caption.strip():
                    place = f"{number}.jpg"
                    pictures = (f"train_images/{place}", f"images/{place}", place)
                    yield Captioned(number, pictures, (caption,), {})
                case {"image_id": str(), "caption_str": str()}:
                    yield Skipped(_NO_CAPTION)
                case _:
                    yield Skipped(_MALFORMED)
