"""Questions of benchmarks as documents for the runtime, and how their answers are generated.

Lengths are those of the published evaluation (its collators' defaults), which searches with 5 and 3
beams; answers here are greedy. Pictures are drawn with the guidance of the paper.
"""

from __future__ import annotations

from collections.abc import Mapping

from mmi_deploy.documents.document import Document, Draw, Image, Part, Text
from mmi_deploy.documents.images import resize
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.options import GenerationOptions
from mmi_train.data.document import TextPart
from mmi_train.data.readers.data_set import picture_of
from mmi_train.data.readers.sample import Sample
from mmi_train.evaluation.benchmarks.table import Benchmark


def _greedy(max_tokens: int, min_tokens: int = 0, repetition: float = 1.0) -> GenerationOptions:
    return GenerationOptions(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        max_images=0,
        temperature=0.0,
        repetition_penalty=repetition,
    )


_CAPTION = _greedy(20, 8)
_ANSWER = _greedy(10)
# Numbers of four corners, and lines of a document.
_LONG_ANSWER = _greedy(32)

# By benchmark; the others have answers of `_ANSWER`.
_GENERATION: Mapping[str, GenerationOptions] = {
    "coco-caption": _CAPTION,
    "flickr30k": _CAPTION,
    "nocaps": _CAPTION,
    "image2paragraph": _greedy(90, 90, 1.2),
    "refcoco": _LONG_ANSWER,
    "refcoco+": _LONG_ANSWER,
    "refcocog": _LONG_ANSWER,
    "docvqa": _LONG_ANSWER,
    "infovqa": _LONG_ANSWER,
    "stvqa": _LONG_ANSWER,
}


_PICTURE = GenerationOptions(max_tokens=0, max_images=0, guidance=3.5)

# Benchmarks of a caption each, of which several pictures may be drawn to choose from.
CAPTIONED = ("coco-t2i", "ln-coco")


def is_drawn(benchmark: Benchmark) -> bool:
    """True if answers are drawn pictures."""
    return benchmark.kind == "image"


def generation_of(benchmark: Benchmark) -> GenerationOptions:
    """Options of a benchmark's answers. Raises `ConfigError` for one that a bundle cannot give."""
    if is_drawn(benchmark):
        return _PICTURE
    if benchmark.kind != "text":
        raise ConfigError(
            f"a bundle cannot answer {benchmark.name}, which takes scores of options",
            fix="score answers of your own with --predictions FILE",
        )
    return _GENERATION.get(benchmark.name, _ANSWER)


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
