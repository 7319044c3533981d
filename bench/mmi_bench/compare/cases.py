"""Benchmark cases: documents of exact lengths, and the tokens and pictures to generate."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mmi_deploy.documents.document import Document, Image, Part, Text, document_of
from mmi_deploy.documents.images import Rgb
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import ConfigError, DocumentError
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.spec.config import ModelConfig

# Images in the context of the whole document.
IMAGES = 4

# Filler words; the first one that is a single token is used. The tokenizer of a placeholder model
# has numbered words.
_WORDS = ("a", "the", "red", "one", "w5")


@dataclass(frozen=True)
class Case:
    """One document and the amount of text and pictures to generate after it.

    The context has `images` images and `text_tokens` tokens of text, then either `turns` turns of
    `tokens` tokens and a picture each, or `tokens` tokens and no picture.
    """

    name: str
    images: int
    text_tokens: int
    tokens: int
    turns: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def context_tokens(self, config: ModelConfig) -> int:
        """Number of tokens before the first generated one."""
        return 1 + self.images * (1 + config.visual_tokens) + self.text_tokens

    def length(self, config: ModelConfig) -> int:
        """Number of tokens at the end of the case."""
        turn = self.tokens + 1 + config.visual_tokens
        return self.context_tokens(config) + (self.turns * turn or self.tokens)

    def document(self, tokenizer: Tokenizer, config: ModelConfig) -> Document:
        """Build the document, text and images in turn, with exactly the tokens of the case."""
        word = one_token_word(tokenizer)
        pieces = np.array_split(np.arange(self.text_tokens), self.images + 1)
        parts: list[Part] = []
        for index, piece in enumerate(pieces):
            if len(piece):
                parts.append(Text(" ".join([word] * len(piece))))
            if index < self.images:
                parts.append(Image(picture(index, config.vision.image_size)))
        return document_of(*parts)

    def options(self, schedule: str) -> GenerationOptions:
        """Options: greedy, with forced counts, so that both backends do the same work."""
        total = self.tokens * max(self.turns, 1)
        return GenerationOptions(
            max_tokens=total,
            min_tokens=total if not self.turns else 0,
            turn_tokens=self.tokens if self.turns else None,
            max_images=self.turns,
            temperature=0.0,
            schedule=schedule,
            guidance=None,
        )


@dataclass(frozen=True)
class Plan:
    """All cases of a comparison, and the repeats of each after one warm-up run."""

    cases: tuple[Case, ...]
    repeats: int

    @property
    def drawing(self) -> Case:
        """The case that draws."""
        return next(case for case in self.cases if case.turns)


DOCUMENT, TEXT = "document", "text"


def text_after(images: int) -> str:
    """Name of the case whose context holds `images` images."""
    return f"text after {images} images"


def plan(
    config: ModelConfig, context: int, repeats: int, quick: bool, one_turn: bool = False
) -> Plan:
    """Plan the cases for a bundle of `context` tokens.

    `quick`: small cases for a smoke test. `one_turn`: one picture instead of three, and fewer
    numbers of images, where PyTorch takes minutes for a picture. Raises `ConfigError` if the cases
    do not fit.
    """
    turns, tokens = (1, 4) if quick else (1 if one_turn else 3, 16)
    counts = (0, 8) if quick else (0, IMAGES, 8) if one_turn else (0, 1, 2, 4, 8)
    several = 8 * IMAGES
    cases = [
        Case(DOCUMENT, IMAGES, several, tokens, turns),
        Case(TEXT, IMAGES, several, tokens * turns),
    ]
    taken = 1 + config.visual_tokens
    for count in counts:
        filler = several + (max(counts) - count) * taken
        cases.append(Case(text_after(count), count, filler, 2 * tokens))
    longest = max(case.length(config) for case in cases)
    if longest > context:
        raise ConfigError(
            "the bundle is too small for the benchmark's documents",
            expected=f"a context of {longest} tokens",
            got=context,
            fix=f"export it with --context {longest} or more",
        )
    return Plan(tuple(cases), repeats)


def one_token_word(tokenizer: Tokenizer) -> str:
    """Find a filler word that is one token even if repeated; raises `ConfigError` if none is."""
    for word in _WORDS:
        try:
            if len(tokenizer.encode(" ".join([word] * 5))) == 5:
                return word
        except DocumentError:  # not in its vocabulary
            continue
    raise ConfigError("the tokenizer has no word that is one token", expected=" or ".join(_WORDS))


def picture(seed: int, side: int) -> Rgb:
    """Draw coloured squares, uint8 [height, width, 3] with `side` for both."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return np.kron(cells, np.ones((-(-side // 8),) * 2 + (1,), np.uint8))[:side, :side]
