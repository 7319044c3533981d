"""Interleaved documents: parts in reading order, and their conversion to tokens.

Three kinds of part: `Text`, `Image` (a given picture) and `Draw` (the model draws a picture here).
`files.py` reads and writes documents.

Letters: t tokens.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmi_deploy.documents.images import Rgb, as_rgb, read_rgb
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import DocumentError
from mmi_deploy.spec.config import ModelConfig


@dataclass(frozen=True)
class Text:
    """A piece of text. Raises `DocumentError` unless it is a string without lone surrogates."""

    text: str

    def __post_init__(self) -> None:
        _check_string("a text of the document", self.text)


@dataclass(frozen=True)
class Image:
    """A given picture: a file, uint8 [height, width, 3], or an image of Pillow, which is converted.

    Raises `DocumentError` for anything else.
    """

    source: Path | Rgb
    alt: str = ""

    def __post_init__(self) -> None:
        _check_string("the alternative text of a picture", self.alt)
        named = isinstance(self.source, str | os.PathLike)
        source = Path(self.source) if named else as_rgb(self.source)  # type: ignore[arg-type]
        object.__setattr__(self, "source", source)

    @cached_property
    def rgb(self) -> Rgb:
        """The decoded picture, uint8 [height, width, 3].

        Raises `DocumentError` if the file cannot be read.
        """
        return read_rgb(self.source) if isinstance(self.source, Path) else self.source


@dataclass(frozen=True)
class Draw:
    """A place where the model is to draw a picture."""


Part = Text | Image | Draw


def _check_string(what: str, text: object) -> None:
    if not isinstance(text, str):
        raise DocumentError(
            f"{what} has the wrong type", expected="a string", got=type(text).__name__
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DocumentError(
            f"{what} holds half a character, such as \\ud83d alone", fix="write it whole"
        ) from None


@dataclass(frozen=True)
class Document:
    """Parts in reading order. Use `document_of` to build one: it merges texts and drops blanks."""

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        for part in self.parts:
            if not isinstance(part, Text | Image | Draw):
                raise DocumentError(
                    "a part of the document has the wrong type",
                    expected="a Text, an Image or a Draw",
                    got=type(part).__name__,
                )

    @property
    def images(self) -> tuple[Image | Draw, ...]:
        """All pictures, given or to be drawn, in order."""
        return tuple(part for part in self.parts if not isinstance(part, Text))


@dataclass(frozen=True)
class EncodedDocument:
    """Tokens and pictures of a document, the model's input.

    `token_ids` int64 [t]: `<s>`, then texts and pictures; each picture is one begin-of-image token
    and `ModelConfig.visual_tokens` image tokens. `images`: the pictures in the same order; None is
    a picture that the model has to draw before it reads on.
    """

    token_ids: NDArray[np.int64]
    images: tuple[Image | None, ...]


def document_of(*parts: Part) -> Document:
    """Build a document of `parts`.

    Adjacent texts are merged, whitespace next to pictures and at both ends is stripped (as in the
    published code), and texts that are empty afterwards are dropped.
    """
    merged: list[Part] = []
    for part in parts:
        if isinstance(part, Text) and merged and isinstance(merged[-1], Text):
            merged[-1] = Text(merged[-1].text + part.text)
        else:
            merged.append(part)
    Document(parts)
    stripped = (Text(part.text.strip()) if isinstance(part, Text) else part for part in merged)
    return Document(tuple(part for part in stripped if part != Text("")))


def check_pictures(count: int, most: int) -> None:
    """Raise `DocumentError` for more than `most` pictures, given and to be drawn."""
    if count > most:
        raise DocumentError(
            "the document has too many pictures for the model",
            expected=f"at most {most}",
            got=count,
            fix="leave some out",
        )


def encode_document(
    document: Document,
    tokenizer: Tokenizer,
    config: ModelConfig,
    context: int | None = None,
    images: int | None = None,
) -> EncodedDocument:
    """Tokenise `document` for the model `config`.

    `context`, `images`: limits of tokens and pictures (a bundle's may be below the model's). Raises
    `DocumentError` if the document is empty, too long, or has more pictures than the limit or than
    the model has image positions.
    """
    tokens = config.tokens
    picture = [tokens.boi, *[tokens.image] * config.visual_tokens]
    ids = [tokens.bos]
    for part in document.parts:
        ids += tokenizer.encode(part.text) if isinstance(part, Text) else picture
    if len(ids) == 1:
        raise DocumentError("the document is empty", fix="write some text or link a picture")
    limit = min(context or config.llama.context, config.llama.context)
    if len(ids) > limit:
        raise DocumentError(
            "the document is too long for the model",
            expected=f"at most {limit} tokens",
            got=f"{len(ids)} ({len(document.images)} pictures take {len(picture)} each)",
            fix="shorten it",
        )
    most = config.llm_mmfs.images - 1
    check_pictures(len(document.images), most if images is None else min(images, most))
    given = tuple(image if isinstance(image, Image) else None for image in document.images)
    return EncodedDocument(np.asarray(ids, dtype=np.int64), given)
