"""Questions of benchmarks as documents for the runtime, and how their answers are generated.

Lengths, beams and penalties are those of the published evaluation: its collators' defaults, and for
boxes the defaults of its `generate_texts`. Its least lengths count the `<s>` in front, ours do not.
Pictures are drawn with the guidance of the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmi_deploy.documents.document import Document, Draw, Image, Part, Text
from mmi_deploy.documents.images import resize
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.options import GenerationOptions
from mmi_train.data.document import TextPart
from mmi_train.data.readers.data_set import picture_of
from mmi_train.data.readers.sample import Sample
from mmi_train.evaluation.benchmarks.table import Benchmark


def _text(
    beams: int,
    max_tokens: int,
    min_tokens: int = 0,
    *,
    length_penalty: float = 1.0,
    repetition: float = 1.0,
) -> GenerationOptions:
    return GenerationOptions(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        max_images=0,
        temperature=0.0,
        repetition_penalty=repetition,
        beams=beams,
        length_penalty=length_penalty,
    )


_CAPTION = _text(5, 20, 7)
_ANSWER = _text(3, 10, length_penalty=0.0)
_BOX = _text(5, 30, 7)
# Lines of a document, which the published evaluation does not ask for.
_LONG_ANSWER = _text(3, 32, length_penalty=0.0)

# By benchmark; the others have answers of `_ANSWER`.
_GENERATION: Mapping[str, GenerationOptions] = {
    "coco-caption": _CAPTION,
    "flickr30k": _CAPTION,
    "nocaps": _CAPTION,
    "image2paragraph": _text(5, 90, 89, repetition=1.2),
    "refcoco": _BOX,
    "refcoco+": _BOX,
    "refcocog": _BOX,
    "docvqa": _LONG_ANSWER,
    "infovqa": _LONG_ANSWER,
    "stvqa": _LONG_ANSWER,
}

# Options given are ranked by their log probabilities: nothing is generated.
_RANKS = GenerationOptions(max_tokens=0, max_images=0)

_PICTURE = GenerationOptions(max_tokens=0, max_images=0, guidance=3.5)

# Benchmarks of a caption each, of which several pictures may be drawn to choose from.
CAPTIONED = ("coco-t2i", "ln-coco")


def is_drawn(benchmark: Benchmark) -> bool:
    """True if answers are drawn pictures."""
    return benchmark.kind == "image"


def generation_of(benchmark: Benchmark, beams: int | None = None) -> GenerationOptions:
    """Options of a benchmark's answers. beams: in place of the published ones, 1 for greedy.

    Raises `ConfigError` for beams of an answer that is no text.
    """
    if benchmark.kind != "text" and beams is not None:
        raise ConfigError("--beams is of texts", got=f"{benchmark.name}, whose answers are none")
    if is_drawn(benchmark):
        return _PICTURE
    if benchmark.kind == "ranks":
        return _RANKS
    published = _GENERATION.get(benchmark.name, _ANSWER)
    if beams is None:
        return published
    penalty = published.length_penalty if beams > 1 else 1.0
    return replace(published, beams=beams, length_penalty=penalty)


def described(options: GenerationOptions) -> dict[str, Any]:
    """Options that a text was generated with, for reports."""
    names = ["beams", "length_penalty"] if options.beams > 1 else ["beams"]
    names += ["min_tokens", "max_tokens", "repetition_penalty"]
    return {name: getattr(options, name) for name in names}


def id_of(sample: Sample, index: int, benchmark: Benchmark) -> str | int:
    """Id of an answer: the set's own, or the sample's number from 0 where it has none that is
    unique."""
    return index if benchmark.form.numbered else sample.id


def caption_of(sample: Sample) -> str:
    """The texts of a sample."""
    return " ".join(part.text for part in sample.parts if isinstance(part, TextPart))


def document_of(sample: Sample, side: int, draws: bool) -> Document:
    """A sample as a document for the model, its pictures decoded and resized to [side, side, 3].

    The parts before the answer; if it `draws`, all parts, with a place to draw for each picture
    that is learned, so that a story's later pictures follow from those drawn before. Raises
    `Skipped` for a picture that is missing or broken.
    """
    parts: list[Part] = []
    for part in sample.parts if draws else sample.prompt:
        if isinstance(part, TextPart):
            parts.append(Text(part.text))
        elif part.learn:
            parts.append(Draw())
        else:
            parts.append(Image(resize(picture_of(part), side, part.fit)))
    return Document(tuple(parts))
