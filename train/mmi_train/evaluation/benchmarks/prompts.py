"""Questions of benchmarks as documents for the runtime, and how their answers are generated.

Lengths are those of the published evaluation (its collators' defaults), which searches with 5 and 3
beams; answers here are greedy. Pictures are drawn with the guidance of the paper, one candidate
each.
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

# Benchmarks whose answer is the picture that follows.
_DRAWN = ("coco-t2i", "ln-coco", "vist")

# Sets that have several samples of one id.
_NUMBERED = ("ln-coco",)


def is_drawn(benchmark: Benchmark) -> bool:
    """True if the answer is a picture."""
    return benchmark.name in _DRAWN


def is_numbered(benchmark: Benchmark) -> bool:
    """True if ids of answers are numbers of samples."""
    return benchmark.name in _NUMBERED


def generation_of(benchmark: Benchmark) -> GenerationOptions:
    """Options of a benchmark's answers. Raises `ConfigError` for one that a bundle cannot give."""
    if is_drawn(benchmark):
        return _PICTURE
    if benchmark.kind != "text":
        needs = "scores of options" if benchmark.kind == "ranks" else "maps of labels"
        raise ConfigError(
            f"a bundle cannot answer {benchmark.name}, which takes {needs}",
            fix="score answers of your own with --predictions FILE",
        )
    return _GENERATION.get(benchmark.name, _ANSWER)


def id_of(sample: Sample, index: int, benchmark: Benchmark) -> str | int:
    """Id of an answer: the set's own, or the sample's number from 0 where these repeat."""
    return index if is_numbered(benchmark) else sample.id


def document_of(sample: Sample, side: int, draws: bool) -> Document:
    """The prompt of a sample, its pictures decoded and resized to [side, side, 3], and a place to
    draw if `draws`. Raises `Skipped` for a picture that is missing or broken."""
    parts: list[Part] = []
    for part in sample.prompt:
        if isinstance(part, TextPart):
            parts.append(Text(part.text))
        else:
            parts.append(Image(resize(picture_of(part), side, part.fit)))
    if draws:
        parts.append(Draw())
    return Document(tuple(parts))
