"""Questions about pictures: every set is a list of questions, read by a function of its own format.

Converted files of Qwen-VL and InternVL, a question a line (`{"image", "question", "question_id",
"answer"}`), are read for every set.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmi_train.data.document import TextPart
from mmi_train.data.readers.data_set import DataSet
from mmi_train.data.readers.folder import json_lines, texts
from mmi_train.data.readers.sample import PicturePart, Sample, Skipped, joined

MALFORMED = "entry is malformed"
DUPLICATE = "question id occurs twice"
UNANSWERED = "no answer"


@dataclass(frozen=True)
class Question:
    """One record. `pictures`: the paths at which the picture may lie. `answers`: all references.
    `learned`: the answer that training learns, None for a question of a test split."""

    id: int | str
    pictures: tuple[str, ...]
    question: str
    answers: tuple[str, ...] = ()
    learned: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


Questions = Iterator[Question | Skipped]


class QuestionSet(DataSet[Question]):
    """A set of questions. `images`: the folders below which its pictures may lie, `{split}` in them
    being the split's name. `unique`: its question ids are."""

    images: tuple[str, ...] = ("images", "")
    unique = True

    @abstractmethod
    def path(self, split: str) -> Path | None:
        """The file of a split's questions, None if it is not there."""

    @abstractmethod
    def questions(self) -> Questions:
        """Questions of the split's published files."""

    def converted(self, split: str) -> Path | None:
        """File of a split in the converted form."""
        name = self.folder.name
        return self.folder.find(f"{name}_{split}.jsonl", f"{split}.jsonl")

    def has(self, split: str) -> bool:
        return self.path(split) is not None or self.converted(split) is not None

    def places(self, name: str) -> tuple[str, ...]:
        """Paths at which the picture called `name` may lie."""
        folders = [folder.format(split=self.split) for folder in self.images]
        return tuple(f"{folder}/{name}" if folder else name for folder in folders)

    def read(self) -> Questions:
        found = self.path(self.split)
        lines = self.converted(self.split) if found is None else None
        questions = self.questions() if lines is None else self._converted(self.kept(lines))
        known: set[int | str] = set()
        for question in questions:
            if isinstance(question, Question) and self.unique:
                if question.id in known:
                    yield Skipped(DUPLICATE, str(question.id))
                    continue
                known.add(question.id)
            yield question

    def _converted(self, path: Path) -> Questions:
        for number, entry in enumerate(json_lines(path)):
            match entry:
                case {"image": str(image), "question": str(asked)}:
                    answers = answers_in(entry.get("answer"))
                    key = entry.get("question_id", number)
                    if isinstance(key, int | str):
                        learned = answers[0] if answers else None
                        yield Question(key, self.places(image), asked, answers, learned)
                        continue
            yield Skipped(MALFORMED)

    def sample_of(self, record: Question, draw: random.Random) -> Sample:
        picture = PicturePart(self.folder.picture(*record.pictures))
        parts = self.prompt.parts(picture, {"question": record.question})
        if record.learned is not None:
            parts.append(TextPart(self.prompt.before_answer + record.learned, True))
        return Sample(record.id, joined(parts), record.answers, record.about)


def answers_in(value: Any) -> tuple[str, ...]:
    """References in a file's field: a text, a number, a list of them, or of objects with one."""
    if isinstance(value, list):
        return texts(one.get("answer") if isinstance(one, dict) else one for one in value)
    return texts([value])
