"""Workloads of the batch benchmark: documents of fixed content, with the work to do after each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mmi_bench.compare.cases import Case, one_token_word, picture
from mmi_deploy.documents.document import Document, Image, Text, document_of
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.spec.config import ModelConfig

TEXT, PICTURES, DOCUMENTS = "text", "pictures", "documents"
WORKLOADS = (TEXT, PICTURES, DOCUMENTS)

# Whole documents: images and tokens of text given, then turns of so many tokens and a picture each.
_SHAPES = (
    (4, 32, 16, 3),
    (1, 16, 24, 2),
    (0, 48, 8, 3),
    (2, 24, 32, 2),
    (3, 40, 12, 4),
    (1, 64, 16, 1),
    (0, 20, 24, 3),
    (2, 36, 20, 2),
)
_GUIDANCE = (3.5, 1.0, 5.0, 2.0)

# Text only: images and tokens of text given, tokens to write.
_TEXT = (1, 32, 128)

# Pictures only: tokens of text given, pictures to draw.
_PICTURES = (8, 1)


@dataclass(frozen=True)
class Item:
    """One document of a workload."""

    document: Document
    options: GenerationOptions


def workload(
    name: str,
    count: int,
    config: ModelConfig,
    context: int,
    tokenizer: Tokenizer,
    schedules: Sequence[str],
    quick: bool = False,
) -> list[Item]:
    """The first `count` documents of a workload. Their lengths are forced and their tokens sampled.

    schedules: samplers, taken in turn. quick: a fraction of the work. Raises `ConfigError` for an
    unknown name, or if a document does not fit `context` tokens.
    """
    if name not in WORKLOADS:
        raise ConfigError(f"unknown workload {name!r}", expected=", ".join(WORKLOADS))
    cases = [_case(name, number, quick) for number in range(count)]
    longest = max((case.length(config) for case in cases), default=0)
    if longest > context:
        raise ConfigError(
            "the bundle is too small for the benchmark's documents",
            expected=f"a context of {longest} tokens",
            got=context,
            fix=f"export it with --context {longest} or more",
        )
    word, side = one_token_word(tokenizer), config.vision.image_size
    distilled = config.image_decoder.distillation is not None
    return [
        Item(
            _document(number, case, word, side),
            replace(
                case.options(schedules[number % len(schedules)]),
                seed=number,
                temperature=1.0,
                draw_first=case.turns > 0 and not case.tokens,
                guidance=None if distilled else _GUIDANCE[number % len(_GUIDANCE)],
            ),
        )
        for number, case in enumerate(cases)
    ]


def _case(name: str, number: int, quick: bool) -> Case:
    if name == TEXT:
        images, text, tokens = _TEXT
        return Case(name, images, text, tokens // 8 if quick else tokens)
    if name == PICTURES:
        text, pictures = _PICTURES
        return Case(name, 0, text, 0, pictures)
    images, text, tokens, turns = _SHAPES[number % len(_SHAPES)]
    return Case(name, images, text, tokens // 4 if quick else tokens, 1 if quick else turns)


def _document(number: int, case: Case, word: str, side: int) -> Document:
    """Images, unlike those of other documents, then text."""
    images = [Image(picture(1000 * number + index, side)) for index in range(case.images)]
    return document_of(*images, Text(" ".join([word] * case.text_tokens)))
