"""VQA's pair of files, questions and annotations: VQAv2, OKVQA, and TextVQA's converted pair.

Questions that have annotations come in the order of these, as in the published code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from mmi_train.data.readers.folder import entries
from mmi_train.data.readers.questions import (
    DUPLICATE,
    MALFORMED,
    UNANSWERED,
    Question,
    Questions,
    QuestionSet,
    answers_in,
)
from mmi_train.data.readers.sample import Skipped


class QuestionPairs(QuestionSet):
    """Questions and annotations in two files, whose names hold `{split}`. `years`: the folder of
    pictures of each split, such as val2014."""

    asked: ClassVar[str]
    annotated: ClassVar[str]
    names: ClassVar[Mapping[str, str]]  # split -> its name in those of the files
    years: ClassVar[Mapping[str, str]] = {}

    def path(self, split: str) -> Path | None:
        return self.folder.find(self.asked.format(split=self.names[split]))

    def questions(self) -> Questions:
        name = self.names[self.split]
        asked: dict[Any, dict[str, Any]] = {}
        path = self.kept(self.folder.file(self.asked.format(split=name)))
        for entry in entries(path, "questions"):
            match entry:
                case {"question_id": int() | str(), "question": str(), "image_id": int() | str()}:
                    if entry["question_id"] in asked:
                        yield Skipped(DUPLICATE, str(entry["question_id"]))
                    else:
                        asked[entry["question_id"]] = entry
                case _:
                    yield Skipped(MALFORMED)
        if self.split.startswith("test"):
            for entry in asked.values():
                yield self._question(entry, {})
            return
        path = self.kept(self.folder.file(self.annotated.format(split=name)))
        for entry in entries(path, "annotations"):
            match entry:
                case {"question_id": (int() | str()) as key} if key in asked:
                    yield self._question(asked.pop(key), entry)
                case {"question_id": int() | str()}:
                    yield Skipped("annotation without a question")
                case _:
                    yield Skipped(MALFORMED)
        for _ in asked:
            yield Skipped(UNANSWERED)

    def _question(self, asked: Mapping[str, Any], annotation: Mapping[str, Any]) -> Question:
        answers = answers_in(annotation.get("answers"))
        chosen = annotation.get("multiple_choice_answer")
        learned = chosen if isinstance(chosen, str) else answers[0] if answers else None
        about = {
            key: annotation[key] for key in ("question_type", "answer_type") if key in annotation
        }
        about["image_id"] = asked["image_id"]
        return Question(
            asked["question_id"], self._pictures(asked), asked["question"], answers, learned, about
        )

    def _pictures(self, asked: Mapping[str, Any]) -> tuple[str, ...]:
        named = asked.get("image")
        if isinstance(named, str):
            return self.places(named)
        year, number = self.years.get(self.split), asked["image_id"]
        if year is None or not isinstance(number, int):
            return self.places(f"{number}.jpg")
        name = f"COCO_{year}_{number:012d}.jpg"
        return (f"{year}/{name}", f"images/{year}/{name}", *self.places(name))


class VqaV2(QuestionPairs):
    """VQA 2.0 on COCO pictures; the answers of test-dev and test are not published."""

    splits = ("train", "val", "test-dev", "test")
    asked = "v2_OpenEnded_mscoco_{split}_questions.json"
    annotated = "v2_mscoco_{split}_annotations.json"
    names = {"train": "train2014", "val": "val2014", "test-dev": "test-dev2015", "test": "test2015"}
    years = {"train": "train2014", "val": "val2014", "test-dev": "test2015", "test": "test2015"}


class OkVqa(QuestionPairs):
    """OK-VQA on COCO pictures, with `raw_answer` beside each of the ten answers."""

    splits = ("train", "val")
    asked = "OpenEnded_mscoco_{split}_questions.json"
    annotated = "mscoco_{split}_annotations.json"
    names = {"train": "train2014", "val": "val2014"}
    years = names


class TextVqa(QuestionPairs):
    """TextVQA: the pair of files of the published code, or the official file with all."""

    splits = ("train", "val", "test")
    asked = "textvqa_{split}_questions.json"
    annotated = "textvqa_{split}_annotations.json"
    names = {"train": "train", "val": "val", "test": "test"}
    images = ("train_images", "test_images", "images", "")

    def _official(self, split: str) -> Path | None:
        return self.folder.find(f"TextVQA_0.5.1_{split}.json")

    def path(self, split: str) -> Path | None:
        return super().path(split) or self._official(split)

    def questions(self) -> Questions:
        path = self._official(self.split)
        if super().path(self.split) is not None or path is None:
            yield from super().questions()
            return
        for entry in entries(self.kept(path), "data"):
            match entry:
                case {"image_id": str(image), "question": str(asked), "question_id": int(key)}:
                    answers = answers_in(entry.get("answers"))
                    learned = answers[0] if answers else None
                    places = self.places(f"{image}.jpg")
                    yield Question(key, places, asked, answers, learned, {"image_id": image})
                case _:
                    yield Skipped(MALFORMED)
