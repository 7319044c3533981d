"""Named prompts: the paper's Table 17 and Appendix B, and the published code's.

A prompt has a system, a user and an assistant part, joined by spaces, as in the published
collators; `{image}` is the place of the picture, other names in braces are fields of a sample.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from mmi_deploy.errors import ConfigError
from mmi_train.data.document import TextPart
from mmi_train.data.readers.sample import PicturePart, SamplePart

_FIELD = re.compile(r"\{(\w+)\}")
_VQA = "Based on the image, please answer the question. {image}{question}"
_ONE_WORD = "Please provide an accurate answer within one word."
_UNANSWERABLE = (
    "When the provided information is insufficient, respond with 'Unanswerable'. " + _ONE_WORD
)
_TURN = "question: {question}? answer:"
_REGION = "Provide the bounding box coordinate of the region this sentence describes"


@dataclass(frozen=True)
class Prompt:
    """A prompt in three parts, any of which may be empty. `before_answer`: what stands between it
    and the answer."""

    user: str
    assistant: str = ""
    system: str = ""
    before_answer: str = " "

    @property
    def text(self) -> str:
        return " ".join(part for part in (self.system, self.user, self.assistant) if part)

    def parts(self, picture: PicturePart | None, fields: Mapping[str, str]) -> list[SamplePart]:
        """Parts of a document: the texts, and the picture at its place, first without one. Raises
        `ConfigError` for a field that the set has not."""
        text = self.text
        lacking = {*_FIELD.findall(text)} - {"image", *fields}
        if lacking:
            raise ConfigError(
                f"the prompt `{text}` asks for what the set has not: {', '.join(sorted(lacking))}",
                fix="choose another --prompt",
            )
        if picture is not None and "{image}" not in text:
            text = "{image}" + text
        found: list[SamplePart] = []
        for index, piece in enumerate(text.split("{image}")):
            if index and picture is not None:
                found.append(picture)
            found.append(TextPart(filled(piece, fields), False))
        return found


def filled(text: str, fields: Mapping[str, str]) -> str:
    """The text with every `{name}` replaced once; braces in the values stay."""
    return _FIELD.sub(lambda name: fields.get(name[1], name[0]), text)


PROMPTS: Mapping[str, Prompt] = {
    # Table 17, zero-shot: what the published code evaluates with.
    "caption": Prompt("{image}", "a photo of"),
    "paragraph": Prompt("{image}Please describe the image in detail.", "The image depicts"),
    "vqa": Prompt(f"{_VQA} {_ONE_WORD}", "The answer is:"),
    "vizwiz": Prompt(f"{_VQA} {_UNANSWERABLE}", "The answer is:"),
    "visdial": Prompt("{image} caption: {caption}. {history}" + _TURN),
    "visdial-paper": Prompt("{image} caption: {caption} {history}" + _TURN),
    # Table 17, after supervised fine-tuning.
    "caption-sft": Prompt("{image}Provide a one-sentence caption for the provided image."),
    "paragraph-sft": Prompt("{image}Please describe the image in detail."),
    # Appendix B.2.
    "vqa-appendix": Prompt(_VQA + ".", "The answer is:"),
    "rec-appendix": Prompt(f"{{image}}Question: {_REGION}: {{sentence}}, Answer:"),
    # The published code's grounding prompt; the box token opens the answer.
    "rec": Prompt(f"{{image}}{_REGION}. {{sentence}}<box>", before_answer=""),
    # LLaVA's form: the question alone, its answer on the same line.
    "chat": Prompt("{image}{question}"),
    # Text to picture: the caption alone.
    "draw": Prompt("{caption}"),
}


def prompt_called(name: str) -> Prompt:
    """The prompt of this name; raises `ConfigError` with the nearest."""
    if name not in PROMPTS:
        near = get_close_matches(name, PROMPTS, n=1, cutoff=0.4)
        raise ConfigError(
            f"there is no prompt {name}",
            expected=", ".join(PROMPTS),
            fix=f"The nearest is {near[0]}" if near else "",
        )
    return PROMPTS[name]
