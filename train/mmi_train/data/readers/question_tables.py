"""Questions in one file of a format of their own: ChartQA, DocVQA, InfoVQA, ST-VQA, EST-VQA,
OCR-VQA, DVQA, GQA, VizWiz."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mmi_deploy.errors import DocumentError
from mmi_train.data.readers.folder import entries, read_json
from mmi_train.data.readers.questions import (
    MALFORMED,
    UNANSWERED,
    Question,
    Questions,
    QuestionSet,
    answers_in,
)
from mmi_train.data.readers.sample import Skipped


class QuestionTable(QuestionSet):
    """Questions in one file. `names`: what that of each split may be called."""

    names: ClassVar[Mapping[str, Sequence[str]]]

    def path(self, split: str) -> Path | None:
        return self.folder.find(*self.names[split])

    def answered(
        self,
        key: int | str,
        image: str,
        asked: str,
        answers: tuple[str, ...],
        about: Mapping[str, Any] | None = None,
    ) -> Question | Skipped:
        """A question whose first answer is learned; outside of test splits it must have one."""
        if not answers and not self.split.startswith("test"):
            return Skipped(UNANSWERED)
        learned = answers[0] if answers else None
        return Question(key, self.places(image), asked, answers, learned, about or {})


class QuestionList(QuestionTable):
    """Questions in a list, one an entry. `key`: the name of the list in the file, None if the file
    is the list."""

    key: ClassVar[str | None] = None

    def questions(self) -> Questions:
        path = self.kept(self.folder.file(*self.names[self.split]))
        for number, entry in enumerate(entries(path, self.key)):
            found = self.question(entry, number) if isinstance(entry, dict) else None
            yield Skipped(MALFORMED) if found is None else found

    @abstractmethod
    def question(self, entry: dict[str, Any], number: int) -> Question | Skipped | None:
        """The question of an entry, its number in the file; None if it is malformed."""


class ChartQa(QuestionTable):
    """ChartQA: human and augmented questions of a split, one after the other."""

    splits = ("train", "val", "test")
    images = ("{split}/png", "ChartQA Dataset/{split}/png")

    def path(self, split: str) -> Path | None:
        return self._part(split, "human") or self._part(split, "augmented")

    def _part(self, split: str, kind: str) -> Path | None:
        name = f"{split}/{split}_{kind}.json"
        return self.folder.find(name, f"ChartQA Dataset/{name}")

    def questions(self) -> Questions:
        for kind in ("human", "augmented"):
            path = self._part(self.split, kind)
            if path is None:
                raise self.folder.lacks(f"{self.split}/{self.split}_{kind}.json")
            for number, entry in enumerate(entries(self.kept(path))):
                match entry:
                    case {"imgname": str(image), "query": str(asked)}:
                        answers = answers_in(entry.get("label"))
                        key = f"{kind}-{number}"
                        yield self.answered(key, image, asked, answers, {"kind": kind})
                    case _:
                        yield Skipped(MALFORMED)


class DocVqa(QuestionList):
    """DocVQA, task 1."""

    splits = ("train", "val", "test")
    key = "data"
    names = {split: (f"{split}_v1.0_withQT.json", f"{split}_v1.0.json") for split in splits}
    images = ("{split}", "", "images")

    def question(self, entry: dict[str, Any], number: int) -> Question | Skipped | None:
        match entry:
            case {"questionId": int(key), "question": str(asked), "image": str(image)}:
                answers = answers_in(entry.get("answers"))
                return self.answered(key, image, asked, answers)
        return None

    def places(self, name: str) -> tuple[str, ...]:
        other = name.replace("documents/", "images/", 1)  # some releases name the folder so
        return tuple(dict.fromkeys((*super().places(name), *super().places(other))))


class InfoVqa(QuestionList):
    """InfographicVQA."""

    splits = ("train", "val", "test")
    key = "data"
    names = {
        split: tuple(
            f"{stem}_{split}_v1.0{ending}.json"
            for stem in ("infographicsVQA", "infographicVQA")
            for ending in ("_withQT", "")
        )
        for split in splits
    }
    images = ("infographicsvqa_images", "images", "")

    def question(self, entry: dict[str, Any], number: int) -> Question | Skipped | None:
        match entry:
            case {"questionId": int(key), "question": str(asked), "image_local_name": str(image)}:
                return self.answered(key, image, asked, answers_in(entry.get("answers")))
        return None


class StVqa(QuestionList):
    """ST-VQA, the open task 3; it has no official validation split."""

    splits = ("train", "test")
    key = "data"
    names = {split: (f"{split}_task_3.json",) for split in splits}
    images = ("{split}_images", "train_images", "images", "")

    def question(self, entry: dict[str, Any], number: int) -> Question | Skipped | None:
        match entry:
            case {"question": str(asked), "file_path": str(image)}:
                pass
            case {"question": str(asked), "dataset": str(part), "file_name": str(name)}:
                image = f"{part}/{name}"
            case _:
                return None
        key = entry.get("question_id", number)
        if not isinstance(key, int | str):
            return None
        return self.answered(key, image, asked, answers_in(entry.get("answers")))


_CHINESE = re.compile(r"[㐀-鿿]")


class EstVqa(QuestionTable):
    """EST-VQA; half of its questions are Chinese, which the language model does not know: left
    out, as the paper's vocabulary demands."""

    names = {"train": ("train.json",)}
    images = ("images/train", "images", "train", "")
    unique = False  # ids count within a picture

    def questions(self) -> Questions:
        path = self.kept(self.folder.file(*self.names["train"]))
        for entry in entries(path):
            match entry:
                case {"image": str(image), "annotation": (dict() | list()) as asked}:
                    for one in asked if isinstance(asked, list) else [asked]:
                        yield self._one(image, one)
                case _:
                    yield Skipped(MALFORMED)

    def _one(self, image: str, entry: Any) -> Question | Skipped:
        match entry:
            case {"question": str(asked), "answer": (str() | int() | float()) as answer}:
                if _CHINESE.search(asked) or _CHINESE.search(str(answer)):
                    return Skipped("question is Chinese")
                key = f"{image}-{entry.get('question_id', 0)}"
                return self.answered(key, image, asked, answers_in(answer))
        return Skipped(MALFORMED)


class OcrVqa(QuestionTable):
    """OCR-VQA: questions about covers of books, all splits in one file."""

    splits = ("train", "val", "test")
    _NUMBERS: ClassVar[Mapping[str, int]] = {"train": 1, "val": 2, "test": 3}

    def path(self, split: str) -> Path | None:
        return self.folder.find("dataset.json")

    def places(self, name: str) -> tuple[str, ...]:
        return tuple(f"images/{name}{ending}" for ending in (".jpg", ".png", ".gif", ".jpeg"))

    def questions(self) -> Questions:
        path = self.kept(self.folder.file("dataset.json"))
        for book, entry in _items(path):
            match entry:
                case {"questions": list(asked), "answers": list(answers), "split": int(number)}:
                    if number != self._NUMBERS[self.split]:
                        continue
                    if len(asked) != len(answers):
                        yield Skipped("questions and answers differ in number")
                        continue
                    for index, (question, answer) in enumerate(zip(asked, answers, strict=True)):
                        key = f"{book}-{index}"
                        if not isinstance(question, str):
                            yield Skipped(MALFORMED)
                            continue
                        yield self.answered(key, book, question, answers_in(answer))
                case _:
                    yield Skipped(MALFORMED)


def _items(path: Path) -> Iterator[tuple[str, Any]]:
    """Entries of a file that is one object, by their keys."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise DocumentError(
            f"{path} is not what the data set publishes",
            expected="an object by ids",
            got=type(found).__name__,
        )
    yield from found.items()


class Dvqa(QuestionTable):
    """DVQA: 2.3 million questions about drawn bar charts in training, of which an even share of
    `most` is taken."""

    splits = ("train", "val_easy", "val_hard")
    names = {split: (f"{split}_qa.json",) for split in splits}
    most: ClassVar[int] = 200_000

    def questions(self) -> Questions:
        path = self.kept(self.folder.file(*self.names[self.split]))
        found = entries(path)
        share = max(len(found) / self.most, 1.0) if self.split == "train" else 1.0
        taken = {int(index * share) for index in range(int(len(found) / share))}
        for number, entry in enumerate(found):
            if number not in taken:
                yield Skipped(f"beyond {self.most} questions")
                continue
            match entry:
                case {"image": str(image), "question": str(asked), "question_id": int(key)}:
                    answers = answers_in(entry.get("answer"))
                    yield self.answered(key, image, asked, answers)
                case _:
                    yield Skipped(MALFORMED)


class Gqa(QuestionTable):
    """GQA, its balanced splits, `test` without answers; the published code has no reader of it."""

    splits = ("testdev", "train", "val", "test")
    names = {split: (f"{split}_balanced_questions.json",) for split in splits}

    def questions(self) -> Questions:
        path = self.kept(self.folder.file(*self.names[self.split]))
        for key, entry in _items(path):
            match entry:
                case {"isBalanced": False}:
                    yield Skipped("question is not balanced")
                case {"imageId": str(image), "question": str(asked)}:
                    answers = answers_in(entry.get("answer"))
                    yield self.answered(key, f"{image}.jpg", asked, answers)
                case _:
                    yield Skipped(MALFORMED)


class VizWiz(QuestionList):
    """VizWiz: questions of blind people; its id is the number in the picture's name."""

    splits = ("val", "train", "test")
    names = {split: (f"{split}.json",) for split in splits}
    images = ("{split}", "images/{split}", "images", "")
    default_prompt = "vizwiz"

    def question(self, entry: dict[str, Any], number: int) -> Question | Skipped | None:
        match entry:
            case {"image": str(image), "question": str(asked)}:
                digits = re.search(r"(\d+)\.\w+$", image)
                key = int(digits[1]) if digits else image
                about: dict[str, Any] = {"image": image}
                about |= {k: entry[k] for k in ("answer_type", "answerable") if k in entry}
                answers = answers_in(entry.get("answers"))
                return self.answered(key, image, asked, answers, about)
        return None
