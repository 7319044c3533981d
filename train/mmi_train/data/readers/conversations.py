"""Conversations as LLaVA writes them: LLaVA-Mix-665K and LLaVAR.

Every question with its answer is a sample with the picture of the conversation, as in the
published code; conversations without a picture are left out, as there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mmi_train.data.readers.folder import entries, json_lines
from mmi_train.data.readers.questions import MALFORMED, Question, Questions, QuestionSet
from mmi_train.data.readers.sample import Skipped

_PLACE = "<image>"
_ASKS, _ANSWERS = {"human", "user"}, {"gpt", "assistant"}

# Largest number of a COCO picture of 2017: LLaVAR gives its own pictures larger ones.
_LAST_OF_COCO = 581_929


class Conversations(QuestionSet):
    """Conversations of a .json list, or of a .jsonl file."""

    names: tuple[str, ...]
    default_prompt = "vqa-appendix"
    unique = False  # the rounds of a conversation have its id

    def path(self, split: str) -> Path | None:
        return self.folder.find(*self.names)

    def questions(self) -> Questions:
        path = self.kept(self.folder.file(*self.names))
        found = json_lines(path) if path.suffix == ".jsonl" else entries(path)
        for number, entry in enumerate(found):
            yield from self.rounds(entry, number)

    def rounds(self, entry: Any, number: int) -> Questions:
        """Questions of one conversation."""
        match entry:
            case {"image": str(image), "conversations": list(turns)}:
                pass
            case {"conversations": list()} if not entry.get("image"):
                yield Skipped("conversation without a picture")
                return
            case _:
                yield Skipped(MALFORMED)
                return
        pairs = list(_pairs(turns))
        if not pairs or None in pairs:
            yield Skipped(MALFORMED)
            return
        key = entry.get("id", number)
        for pair in pairs:
            assert pair is not None
            asked, answer = pair
            yield Question(
                key if isinstance(key, int | str) else number,
                self.places(image),
                asked.replace(_PLACE, "").strip(),
                (answer,),
                answer,
            )


def _pairs(turns: list[Any]) -> Iterator[tuple[str, str] | None]:
    """Questions with their answers; None for turns that are none."""
    for index in range(0, len(turns), 2):
        match turns[index : index + 2]:
            case [
                {"from": str(asks), "value": str(asked)},
                {"from": str(answers), "value": str(answer)},
            ] if asks in _ASKS and answers in _ANSWERS:
                yield asked, answer
            case _:
                yield None


class Llava665k(Conversations):
    """LLaVA-Mix-665K: pictures of COCO, GQA, OCR-VQA, TextVQA and Visual Genome by folders."""

    names = ("llava_v1_5_mix665k.json", "llava_v1_5_mix665k.jsonl")
    images = ("", "images")

    def places(self, name: str) -> tuple[str, ...]:
        found = super().places(name)
        if name.startswith("ocr_vqa/"):  # listed as .jpg, downloaded with other extensions too
            stem = str(PurePosixPath(name).with_suffix(""))
            found += tuple(stem + ending for ending in (".png", ".gif"))
        return found


class Llavar(Conversations):
    """LLaVAR: of its file, which holds LLaVA-150K too, what is not in that."""

    names = ("llava_instruct_150k_llavar_16k.json", "llava_instruct_150k_llavar_20k.json")
    images = ("coco/train2017", "images", "")

    def questions(self) -> Questions:
        others = self.folder.find("llava_instruct_150k.json")
        self._known = (
            {str(entry.get("image")) for entry in entries(others) if isinstance(entry, dict)}
            if others is not None
            else None
        )
        yield from super().questions()

    def rounds(self, entry: Any, number: int) -> Questions:
        if isinstance(entry, dict) and isinstance(entry.get("image"), str):
            if self._is_llava(entry["image"]):
                yield Skipped("conversation is of LLaVA-150K")
                return
        yield from super().rounds(entry, number)

    def _is_llava(self, image: str) -> bool:
        if self._known is not None:
            return image in self._known
        digits = re.fullmatch(r"(?:COCO_train2014_)?0*(\d{1,12})\.jpg", PurePosixPath(image).name)
        return digits is not None and int(digits[1]) <= _LAST_OF_COCO
