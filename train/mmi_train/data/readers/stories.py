"""Stories: pictures with a sentence each, of which later ones are drawn from those before.

VIST, PororoSV and FlintstonesSV. In training every picture is learned; in the other splits those
that the benchmark draws: the last one of VIST, all but the first of the cartoons.
"""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mmi_deploy.errors import DocumentError
from mmi_train.data.document import TextPart
from mmi_train.data.readers.data_set import DataSet
from mmi_train.data.readers.folder import MISSING, listed, read_json
from mmi_train.data.readers.pictures import Clip, Frame, Picture
from mmi_train.data.readers.questions import MALFORMED
from mmi_train.data.readers.restricted_pickle import read_npy, read_pickle
from mmi_train.data.readers.sample import PicturePart, Sample, SamplePart, Skipped, joined

# Pictures of a story of the cartoons.
LENGTH = 5


@dataclass(frozen=True)
class Scenes:
    """One record: the id of a story, the name of each picture, and its sentence."""

    id: str
    pictures: tuple[str, ...]
    sentences: tuple[str, ...]


class Stories(DataSet[Scenes]):
    """Stories of a set. `drawn_from`: index of the first picture that is drawn outside of
    training."""

    splits = ("train", "val", "test")
    default_prompt = "draw"
    drawn_from = 1

    @abstractmethod
    def picture(self, name: str, draw: random.Random) -> Picture:
        """The picture called `name`; of several frames one is drawn."""

    def sample_of(self, record: Scenes, draw: random.Random) -> Sample:
        pictures = [self.picture(name, draw) for name in record.pictures]
        for picture in pictures:
            if not picture.exists():
                raise Skipped(MISSING, picture.name)
        training = self.split == "train"
        first = 0 if training else self.drawn_from % len(pictures)
        learned = [index >= first for index in range(len(pictures))]
        return Sample(record.id, told(record.sentences, pictures, learned, text_learns=training))


def told(
    sentences: Sequence[str],
    pictures: Sequence[Picture],
    learned: Sequence[bool],
    *,
    text_learns: bool,
) -> tuple[SamplePart, ...]:
    """Parts of a story: each sentence before its picture, `learned` if it is drawn."""
    parts: list[SamplePart] = []
    for sentence, picture, draws in zip(sentences, pictures, learned, strict=True):
        parts += [TextPart(sentence, text_learns), PicturePart(picture, draws)]
    return joined(parts)


class Vist(Stories):
    """VIST, as GILL converted it or as it is published: a story lacks no picture ("filtered")."""

    drawn_from = -1

    def _names(self, split: str) -> tuple[str, ...]:
        return (
            f"{split}_formatted_filtered.json",
            f"{split}_formatted.json",
            f"{split}.story-in-sequence.json",
            f"sis/{split}.story-in-sequence.json",
        )

    def has(self, split: str) -> bool:
        return self.folder.find(*self._names(split)) is not None

    def read(self) -> Iterator[Scenes | Skipped]:
        path = self.kept(self.folder.file(*self._names(self.split)))
        value = read_json(path)
        found = value.get("annotations") if isinstance(value, dict) else None
        if isinstance(found, dict):
            for key in sorted(found):
                yield _story(key, found[key], "image_id", "caption", "sequence_index")
            return
        raw: dict[str, list[Any]] = {}
        for entry in listed(path, value, "annotations"):
            match entry:
                case [{"story_id": (str() | int()) as key} as one]:
                    raw.setdefault(str(key), []).append(one)
                case _:
                    yield Skipped(MALFORMED)
        for key, scenes in raw.items():
            yield _story(key, scenes, "photo_flickr_id", "text", "worker_arranged_photo_order")

    def picture(self, name: str, draw: random.Random) -> Picture:
        folder = f"{self.split}_images"
        return self.folder.picture(
            *(
                f"{place}{folder}/{name}.{ending}"
                for place in ("images/", "")
                for ending in ("png", "jpg")
            )
        )


def _story(key: str, scenes: Any, image: str, text: str, order: str) -> Scenes | Skipped:
    found = []
    for scene in scenes if isinstance(scenes, list) else [None]:
        scene = scene if isinstance(scene, dict) else {}
        number, name, sentence = scene.get(order), scene.get(image), scene.get(text)
        if not isinstance(number, int | str) or not str(number).isdecimal():
            return Skipped(MALFORMED)
        if not isinstance(name, str | int) or not isinstance(sentence, str):
            return Skipped(MALFORMED)
        found.append((int(number), str(name), sentence))
    if not found:
        return Skipped("story is empty")
    found.sort(key=lambda scene: scene[0])
    return Scenes(
        key, tuple(name for _, name, _ in found), tuple(sentence for _, _, sentence in found)
    )


_PORORO = "pororo loopy eddy harry poby tongtong crong rody petty".split()
_FLINTSTONES = "fred barney wilma betty pebbles dino slate".split()


def capitalised(sentence: str, names: Sequence[str]) -> str:
    """A sentence in lower case but for the names of the figures, whitespace around it left out."""
    text = " ".join(sentence.lower().split())
    return re.sub(rf"\b({'|'.join(names)})\b", lambda name: name[0].capitalize(), text)


def _chosen(draw: random.Random) -> Callable[[int], int]:
    """Choice of a frame that stays the same however often it is asked for."""
    share = draw.random()
    return partial(_nth, share)


def _nth(share: float, frames: int) -> int:
    return int(share * frames)


class Pororo(Stories):
    """PororoSV: strips of frames, with NumPy files of their sentences and their order."""

    def has(self, split: str) -> bool:
        return self.folder.find("descriptions.npy") is not None

    def read(self) -> Iterator[Scenes | Skipped]:
        names = (
            "descriptions.npy",
            "img_cache4.npy",
            "following_cache4.npy",
            "train_seen_unseen_ids.npy",
        )
        paths = [self.kept(self.folder.file(name)) for name in names]
        descriptions, first, following, ids = (read_npy(path) for path in paths)
        told_of = descriptions.item() if descriptions.ndim == 0 else None
        splits = list(ids.ravel()) if ids.ndim == 1 else list(ids)
        if not isinstance(told_of, dict) or len(splits) != len(self.splits):
            raise DocumentError(
                f"{self.folder.path} is not PororoSV as published",
                expected="descriptions.npy of a dictionary, train_seen_unseen_ids.npy of 3 lists",
            )
        for number in sorted(int(one) for one in splits[self.splits.index(self.split)]):
            if not 0 <= number < min(len(first), len(following)):
                yield Skipped("id is of no frame")
                continue
            frames = [_plain(name) for name in (first[number], *following[number])]
            sentences = [told_of.get(frame.rsplit(".", 1)[0]) for frame in frames]
            texts = [one[0] for one in sentences if one is not None and len(one)]
            if len(frames) != LENGTH or len(texts) != LENGTH:
                yield Skipped("story is not whole")
                continue
            yield Scenes(
                str(number),
                tuple(frames),
                tuple(capitalised(str(text), _PORORO) for text in texts),
            )

    def picture(self, name: str, draw: random.Random) -> Picture:
        strip = self.folder.picture(name, f"images/{name}")
        return Frame(strip, _chosen(draw))


def _plain(name: Any) -> str:
    """Name of a frame, which the published files hold as the text of its bytes: b'Ep_1_0/0.png'."""
    text = name.decode() if isinstance(name, bytes) else str(name)
    found = re.fullmatch(r"b'(.*)'|b\"(.*)\"", text)
    return (found[1] or found[2]) if found else text


_CLIP = re.compile(r"(s_\d+_e_\d+)_shot_(\d+)(?:_(\d+))?")


class Flintstones(Stories):
    """FlintstonesSV: clips of the annotated cartoon, as NumPy files or as strips of frames."""

    def has(self, split: str) -> bool:
        return self.folder.find("train-val-test_split.json") is not None

    def read(self) -> Iterator[Scenes | Skipped]:
        path = self.kept(self.folder.file("flintstones_annotations_v1-0.json"))
        sentences = {
            entry["globalID"]: entry["description"]
            for entry in listed(path, read_json(path))
            if isinstance(entry, dict)
            and isinstance(entry.get("globalID"), str)
            and isinstance(entry.get("description"), str)
        }
        path = self.kept(self.folder.file("train-val-test_split.json"))
        ids = listed(path, read_json(path), self.split)
        cache = self.folder.find("following_cache4.pkl")
        following = _followers(list(sentences)) if cache is None else read_pickle(self.kept(cache))
        for key in ids:
            known = isinstance(following, dict) and isinstance(key, str)
            after = following.get(key) if known else None
            if not isinstance(after, list | tuple) or len(after) < LENGTH - 1:
                yield Skipped("clip has fewer than 4 followers")
                continue
            clips = (str(key), *map(str, after[: LENGTH - 1]))
            texts = [sentences[clip] for clip in clips if clip in sentences]
            if len(texts) != LENGTH:
                yield Skipped("story is not whole")
                continue
            yield Scenes(str(key), clips, tuple(capitalised(text, _FLINTSTONES) for text in texts))

    def picture(self, name: str, draw: random.Random) -> Picture:
        strips, clips = f"video_frames_sampled_png/{name}.png", f"video_frames_sampled/{name}.npy"
        strip: Picture = self.folder.picture(strips)
        if not strip.exists():
            found = self.folder.picture(clips)
            strip = Clip(found.path, clips) if found.exists() else strip
        return Frame(strip, _chosen(draw))


def _followers(ids: Sequence[str]) -> dict[str, list[str]]:
    """The next four clips of each, of the same season and episode, in the order of their shots."""
    episodes: dict[str, list[tuple[int, int, str]]] = {}
    for key in ids:
        if found := _CLIP.fullmatch(key):
            shot = int(found[2]), int(found[3] or 0), key
            episodes.setdefault(found[1], []).append(shot)
    after: dict[str, list[str]] = {}
    for clips in episodes.values():
        names = [key for *_, key in sorted(clips)]
        for index, key in enumerate(names):
            if len(names) - index >= LENGTH:
                after[key] = names[index + 1 : index + LENGTH]
    return after
