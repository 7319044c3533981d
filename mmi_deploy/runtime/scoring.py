"""Scores of given texts: how probable each of them is after a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmi_deploy.documents.document import Document, encode_document
from mmi_deploy.errors import DocumentError
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.session import Session


@dataclass(frozen=True)
class Score:
    """logprob: natural logarithm of the probability of a text, all its tokens together. tokens:
    their number."""

    logprob: float
    tokens: int


def score(runtime: Runtime, document: Document, continuations: Sequence[str]) -> list[Score]:
    """Score each of `continuations` as the text that follows `document`.

    The document is read once, its images too; the continuations share a decode run, as many at once
    as it has rows. Each is encoded on its own: with LLaMA's tokenizer `yes` is a word of its own.
    Raises `DocumentError` for a document with a place to draw, and for texts that do not fit the
    model or have no token.
    """
    limits, tokens = runtime.limits, runtime.config.tokens
    encoded = encode_document(
        document, runtime.tokenizer, runtime.config, limits.context, limits.images
    )
    texts = [runtime.tokenizer.encode(text) for text in continuations]
    session = Session(runtime, max(min(len(texts), limits.batch), 1))
    images = iter(encoded.images)
    words: list[int] = []
    for token in encoded.token_ids.tolist():
        if token == tokens.boi:
            session.append_text(words)
            words, image = [], next(images)
            if image is None:
                raise DocumentError(
                    "a document with a picture to draw cannot be scored", fix="draw it first"
                )
            session.append_image(image.rgb)
        elif token != tokens.image:
            words.append(token)
    session.append_text(words)
    return [Score(float(logs.sum()), len(logs)) for logs in session.score(texts)]
