"""Workloads of the serving benchmark, as data, and those of a JSONL.

A workload has a prompt for every number: the same number and seed give the same prompt, in every
run and on every machine. Texts are in the words of the tiny model, which every other model knows.
Lengths are forced, so that all servers do the same work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmi_deploy.documents.document import Document, Draw, Image, Part, Text, document_of
from mmi_deploy.documents.files import CONTEXT, IMAGES
from mmi_deploy.documents.images import Rgb
from mmi_deploy.documents.json_lines import SUFFIX, DocumentLine, DocumentLines
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.options import GenerationOptions

# Side of given pictures unless it is chosen, in pixels.
SIDE = 256

# Prompts whose contents the hash of a workload covers.
_HASHED = 16

_COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
_SHAPES = ("circle", "square", "triangle", "cross", "ring")
_PLACES = tuple(f"{row} {column}" for row in ("top", "bottom") for column in ("left", "right"))
_GROUNDS = ("white", "black", "gray")
_MOVES = ("moves up", "moves down", "moves left", "moves right", "grows", "shrinks", "vanishes")


@dataclass(frozen=True)
class Prompt:
    """One prompt: a document to continue. more: parts of the following turns of a conversation,
    each sent with all that came before."""

    id: str
    document: Document
    options: GenerationOptions
    more: tuple[tuple[Part, ...], ...] = ()


class Workload(Protocol):
    """Prompts by number; negative numbers are for warm-up."""

    @property
    def name(self) -> str: ...

    @property
    def distinct(self) -> int | None:
        """Number of distinct prompts; None if every number has its own."""

    def prompt(self, number: int) -> Prompt: ...


@dataclass(frozen=True)
class Shape:
    """Amounts of a generated workload.

    images: given. text: template of the text after them. words: random sentences of so many words
    instead. draw: a picture is drawn right after the text. tokens: text tokens to write: in each
    turn, if `pictures` are drawn after as many turns. turns: requests of a conversation.
    """

    about: str
    text: str = ""
    images: int = 0
    words: int = 0
    draw: bool = False
    tokens: int = 0
    pictures: int = 0
    turns: int = 1

    def options(self, seed: int) -> GenerationOptions:
        """Greedy, with forced lengths."""
        by_turns = bool(self.pictures or not self.tokens)
        return GenerationOptions(
            seed=seed,
            max_tokens=max(1, self.tokens * max(1, self.pictures)),
            min_tokens=0 if by_turns else self.tokens,
            turn_tokens=self.tokens if by_turns else None,
            max_images=self.pictures,
            temperature=0.0,
        )


_SCENE = "a {colour} {shape} at {place} and a {other} {shape2} at {place2} on {ground}."

SHAPES: Mapping[str, Shape] = {
    "text": Shape("64 words given, 128 tokens written", words=64, tokens=128),
    "caption": Shape("a picture given, 16 tokens written", "caption:", images=1, tokens=16),
    "question-1": Shape(
        "1 picture and a question, 8 tokens written",
        "what colour is the {shape}?",
        images=1,
        tokens=8,
    ),
    "question-4": Shape(
        "4 pictures and a question, 8 tokens written",
        "what colour is the {shape}?",
        images=4,
        tokens=8,
    ),
    "question-8": Shape(
        "8 pictures and a question, 8 tokens written",
        "what colour is the {shape}?",
        images=8,
        tokens=8,
    ),
    "text-to-image": Shape("a scene described, a picture drawn", f"draw: {_SCENE}", draw=True),
    "segmentation-to-image": Shape(
        "classes as colours given, a picture drawn",
        "paint: a {colour} {shape} and a {other} {shape2} on {ground}.",
        images=1,
        draw=True,
    ),
    "story": Shape(
        "a picture and a sentence given, 3 times 8 tokens and a picture",
        "the {colour} {shape} {move}.",
        images=1,
        tokens=8,
        pictures=3,
    ),
    "conversation": Shape(
        "3 requests, each with all that came before: a sentence given, 8 tokens and a picture",
        "the {colour} {shape} {move}.",
        images=1,
        tokens=8,
        pictures=1,
        turns=3,
    ),
}


@dataclass(frozen=True)
class GeneratedWorkload:
    """Prompts of a `Shape`."""

    name: str
    seed: int = 0
    side: int = SIDE
    distinct: int | None = None

    def prompt(self, number: int) -> Prompt:
        shape = SHAPES[self.name]
        if self.distinct:
            number %= self.distinct
        # Numbers of warm-up are negative, which a seed of numpy cannot be.
        draws = np.random.default_rng([self.seed, abs(number), int(number < 0)])
        images = [Image(_picture(draws, self.side)) for _ in range(shape.images)]
        last = [Draw()] if shape.draw else []
        document = document_of(*images, Text(_text(shape, draws)), *last)
        more = tuple((Text(f" {_text(shape, draws)}"),) for _ in range(shape.turns - 1))
        options = shape.options(int(draws.integers(2**31)))
        return Prompt(f"{self.name}-{number}", document, options, more)


@dataclass(frozen=True)
class MixedWorkload:
    """Several workloads in turn."""

    parts: Sequence[Workload]

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.parts)

    @property
    def distinct(self) -> int | None:
        counts = [part.distinct for part in self.parts]
        return None if None in counts else sum(count for count in counts if count)

    def prompt(self, number: int) -> Prompt:
        which = number % len(self.parts)
        return self.parts[which].prompt((number - which) // len(self.parts))


class LinesWorkload:
    """The documents of a JSONL in the format of `mmi generate`, over and over."""

    def __init__(self, path: Path) -> None:
        """Read all lines. Raises `MmiError`."""
        keys = {field.name for field in fields(GenerationOptions)} - {"logprobs"}
        self._lines = DocumentLines(path, CONTEXT, IMAGES, keys)
        self.name, self.sha256 = path.name, self._lines.sha256
        self._prompts = [self._prompt(line) for line in self._lines]
        self.distinct: int | None = len(self._prompts)

    def prompt(self, number: int) -> Prompt:
        return self._prompts[number % len(self._prompts)]

    def _prompt(self, line: DocumentLine) -> Prompt:
        with self._lines.at(line.number):
            options = replace(GenerationOptions(), **line.options)
            return Prompt(str(line.id), self._lines.document(line), options)


def open_workload(names: Sequence[str], seed: int, side: int, repeat: int | None) -> Workload:
    """The workload of these names of `SHAPES` and JSONL files, in turn. repeat: number of distinct
    prompts of each; None for a new one in each request. Raises `ConfigError`."""
    parts: list[Workload] = []
    for name in names:
        if name.lower().endswith(SUFFIX):
            parts.append(LinesWorkload(Path(name)))
        elif name in SHAPES:
            parts.append(GeneratedWorkload(name, seed, side, repeat))
        else:
            raise ConfigError(
                f"unknown workload {name!r}", expected=f"{', '.join(SHAPES)}, or a file.jsonl"
            )
    return parts[0] if len(parts) == 1 else MixedWorkload(parts)


def describe(workload: Workload) -> dict[str, Any]:
    """Name, number of distinct prompts, and a hash of the first prompts' contents and options."""
    hashed = hashlib.sha256()
    for number in range(min(_HASHED, workload.distinct or _HASHED)):
        prompt = workload.prompt(number)
        parts = [_content(part) for part in prompt.document.parts]
        more = [[_content(part) for part in turn] for turn in prompt.more]
        hashed.update(json.dumps([prompt.id, parts, more, asdict(prompt.options)]).encode())
    return {
        "name": workload.name,
        "distinct_prompts": workload.distinct,
        "prompts": "new in each request" if workload.distinct is None else "repeated",
        "sha256": hashed.hexdigest(),
    }


def _content(part: Part) -> str:
    if isinstance(part, Text):
        return part.text
    if isinstance(part, Draw):
        return ""
    shape = "x".join(map(str, part.rgb.shape))
    return f"{shape}:{hashlib.sha256(part.rgb.tobytes()).hexdigest()}"


def _text(shape: Shape, draws: np.random.Generator) -> str:
    """Text of a prompt, or of a turn: the template filled, or random sentences."""
    if not shape.words:
        return _filled(shape.text, draws)
    words: list[str] = []
    while len(words) < shape.words:
        words += _filled(_SCENE, draws).split()
    return " ".join(words[: shape.words])


def _filled(template: str, draws: np.random.Generator) -> str:
    def one_of(words: Sequence[str]) -> str:
        return words[int(draws.integers(len(words)))]

    return template.format(
        colour=one_of(_COLOURS),
        other=one_of(_COLOURS),
        shape=one_of(_SHAPES),
        shape2=one_of(_SHAPES),
        place=one_of(_PLACES),
        place2=one_of(_PLACES),
        ground=one_of(_GROUNDS),
        move=one_of(_MOVES),
    )


def _picture(draws: np.random.Generator, side: int) -> Rgb:
    """Coloured squares, uint8 [side, side, 3]."""
    cells = draws.integers(0, 256, (8, 8, 3), np.uint8)
    return np.kron(cells, np.ones((-(-side // 8),) * 2 + (1,), np.uint8))[:side, :side]
