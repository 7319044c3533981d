"""VisDial: the questions of a dialogue whose 100 possible answers are judged densely.

The model is given the picture's caption and the rounds before the question. The published code
leaves the last of these out: `published_history` reproduces that.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmi_train.data.document import TextPart
from mmi_train.data.readers.data_set import DataSet
from mmi_train.data.readers.folder import entries, listed, read_json
from mmi_train.data.readers.questions import MALFORMED
from mmi_train.data.readers.sample import PicturePart, Sample, Skipped, joined

HISTORY = "published_history"


@dataclass(frozen=True)
class Round:
    """One record: a question of a dialogue. `history`: the rounds before it, question and answer.
    `right`: the option that was said, None in the test split. `relevance`: of each option, None
    where they are not judged."""

    image_id: int
    number: int  # from 1
    caption: str
    history: tuple[tuple[str, str], ...]
    question: str
    options: tuple[str, ...]
    right: int | None
    relevance: tuple[float, ...] | None


class VisDial(DataSet[Round]):
    """VisDial 1.0. The validation split holds the judged round of each dialogue, the training split
    every round (judged where its judgements are there), the test split the last one, whose answer
    is not published."""

    splits = ("val", "train", "test")
    default_prompt = "visdial"

    def has(self, split: str) -> bool:
        return self.folder.find(f"visdial_1.0_{split}.json") is not None

    def read(self) -> Iterator[Round | Skipped]:
        path = self.kept(self.folder.file(f"visdial_1.0_{self.split}.json"))
        value = read_json(path)
        data = value.get("data") if isinstance(value, dict) else None
        dialogs = listed(path, data, "dialogs")
        questions, answers = (listed(path, data, key) for key in ("questions", "answers"))
        judged: dict[Any, Mapping[str, Any]] = {}
        name = f"visdial_1.0_{self.split}_dense_annotations.json"
        if self.split == "val" or self.split == "train" and self.folder.find(name) is not None:
            for entry in entries(self.kept(self.folder.file(name))):
                match entry:
                    case {"image_id": int(key), "round_id": int(), "gt_relevance": list(values)}:
                        judged[key] = {**entry, "relevance": values}
                    case {"image_id": int(key), "round_id": int(), "relevance": list()}:
                        judged[key] = entry
                    case _:
                        yield Skipped(MALFORMED)
        for dialog in dialogs:
            try:
                yield from self._rounds(dialog, questions, answers, judged)
            except (KeyError, TypeError, IndexError, ValueError, OverflowError):
                yield Skipped(MALFORMED)

    def _rounds(
        self,
        dialog: Mapping[str, Any],
        questions: Sequence[str],
        answers: Sequence[str],
        judged: Mapping[Any, Mapping[str, Any]],
    ) -> Iterator[Round | Skipped]:
        key, turns = int(dialog["image_id"]), dialog["dialog"]
        entry = judged.get(key)
        if self.split == "val" and entry is None:
            yield Skipped("dialogue is not judged")
            return
        last, own = len(turns), entry["round_id"] if entry is not None else 0
        chosen = {"val": [own], "train": range(1, last + 1), "test": [last]}[self.split]
        for number in chosen:
            if not 1 <= number <= last:
                raise IndexError(number)
            turn = turns[number - 1]
            options = tuple(str(answers[one]) for one in turn["answer_options"])
            right = None if self.split == "test" else int(turn["gt_index"])
            if right is not None and not 0 <= right < len(options):
                raise IndexError(right)
            relevance = None
            if entry is not None and number == own:
                relevance = tuple(map(float, entry["relevance"]))
            if relevance is not None and len(relevance) != len(options):
                yield Skipped("judgements and options differ in number")
                continue
            yield Round(
                key,
                number,
                str(dialog["caption"]),
                tuple(
                    (str(questions[one["question"]]), str(answers[one["answer"]]))
                    for one in turns[: number - 1]
                ),
                str(questions[turn["question"]]),
                options,
                right,
                relevance,
            )

    def sample_of(self, record: Round, draw: random.Random) -> Sample:
        year = "train2014" if self.split == "train" else f"{self.split}2018"
        stem = f"COCO_{year}" if self.split == "train" else f"VisualDialog_{year}"
        name = f"{stem}_{record.image_id:012d}.jpg"
        folders = (f"{stem}/", f"{year}/", "images/", f"images/{year}/", "")
        picture = PicturePart(self.folder.picture(*(folder + name for folder in folders)))
        turns = record.history
        if HISTORY in self.settings.published:
            turns = turns[:-1]
        fields = {
            "caption": record.caption,
            "history": history_text(turns),
            "question": record.question,
        }
        parts = self.prompt.parts(picture, fields)
        about: dict[str, Any] = {"round_id": record.number, "options": list(record.options)}
        answers: tuple[str, ...] = ()
        if record.right is not None:
            answers = (record.options[record.right],)
            parts.append(TextPart(self.prompt.before_answer + answers[0], True))
            about["gt_index"] = record.right
        if record.relevance is not None:
            about["gt_relevance"] = list(record.relevance)
        return Sample(record.image_id, joined(parts), answers, about)


def history_text(turns: Sequence[tuple[str, str]]) -> str:
    """Rounds before a question as the prompt has them."""
    return "".join(f"question: {question}? answer: {answer}. " for question, answer in turns)
