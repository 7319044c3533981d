"""Token rows of training documents: token ids, loss weights, images to encode and to draw.

Letters: b batch, t tokens, m image slots, n encoded images, j pictures to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import tokenizers
from numpy.typing import NDArray

from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.spec.config import TokenConfig
from mmi_train.data.document import ImagePart, Part, TextPart


@dataclass(frozen=True)
class TokenDocument:
    """One document as tokens. `weight[i]` is the loss weight of token i as a target.

    `images[i]` belongs to the i-th begin-of-image token. `encoded[i]`: its visual tokens follow, so
    that the model sees it. `drawn[i]`: the model learns to draw it.
    """

    token_ids: NDArray[np.int64]
    weight: NDArray[np.float32]
    images: tuple[np.ndarray, ...]
    encoded: tuple[bool, ...]
    drawn: tuple[bool, ...]

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.token_ids)


@dataclass(frozen=True)
class Rows:
    """Documents packed into rows, padded to the longest row.

    `image_slot[b, m]`: index into `images` of the m-th image of row b, -1 if it is only drawn or
    does not exist. `pictures`: (row, image of the row) of every picture to draw; `targets`: these
    pictures.
    """

    token_ids: NDArray[np.int64]  # [b, t]
    weight: NDArray[np.float32]  # [b, t]
    images: tuple[np.ndarray, ...]  # n, uint8 [height, width, 3]
    image_slot: NDArray[np.int32]  # [b, m]
    pictures: NDArray[np.int64]  # [j, 2]
    targets: tuple[np.ndarray, ...]  # j, uint8 [height, width, 3]


# Token ids of each text of a run of texts without a picture between them.
EncodeRun = Callable[[Sequence[str]], Iterable[Sequence[int]]]


def each_alone(tokenizer: tokenizers.Tokenizer) -> EncodeRun:
    """Encoding of every text without regard to those before it."""
    return lambda texts: [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def continued(tokenizer: Tokenizer) -> EncodeRun:
    """Encoding of every text as the continuation of those before it, which are encoded as the model
    is given them: as a whole, without a look at what follows."""

    def encode(texts: Sequence[str]) -> Iterator[list[int]]:
        before: list[int] = []
        for last in range(1, len(texts) + 1):
            whole = tokenizer.encode("".join(texts[:last]))
            if whole[: len(before)] != before:  # the texts share a token: it belongs to the first
                whole = before + tokenizer.encode(texts[last - 1])
            yield whole[len(before) :]
            before = whole

    return encode


def tokens_of(
    parts: Sequence[Part],
    encode: EncodeRun,
    tokens: TokenConfig,
    visual_tokens: int,
    *,
    read_all: bool = False,
    given_learn: bool = True,
) -> TokenDocument:
    """Tokenize a document: `<s>`, the parts, `</s>`.

    Targets are begin-of-image tokens after the first part, texts with `learn`, and `</s>` after an
    image or such a text. A drawn picture at the end is not encoded, because only `</s>` would see
    it: the document then ends with its begin-of-image token, unless `read_all`, which encodes all
    images. `given_learn`: whether tokens that announce or follow a picture which is not drawn are
    targets too. Raises what `encode` raises.
    """
    ids, weight = [tokens.bos], [0.0]
    images: list[np.ndarray] = []
    encoded: list[bool] = []
    drawn: list[bool] = []
    last, index = len(parts) - 1, 0
    for is_text, run in groupby(parts, lambda part: isinstance(part, TextPart)):
        group = list(run)
        if is_text:
            texts = [part for part in group if isinstance(part, TextPart)]
            for part, text in zip(texts, encode([part.text for part in texts]), strict=True):
                ids += text
                weight += [float(part.learn)] * len(text)
            index += len(group)
            continue
        for image in group:
            assert isinstance(image, ImagePart)
            seen = read_all or index < last or not image.draw
            span = visual_tokens if seen else 0
            ids += [tokens.boi] + [tokens.image] * span
            weight += [float(index > 0 and (given_learn or image.draw))] + [0.0] * span
            images.append(image.image)
            encoded.append(seen)
            drawn.append(image.draw)
            index += 1
    ending = parts[-1]
    if isinstance(ending, TextPart):
        ids.append(tokens.eos)
        weight.append(float(ending.learn))
    elif read_all:
        ids.append(tokens.eos)
        weight.append(float(given_learn or ending.draw))
    return TokenDocument(
        np.array(ids), np.array(weight, np.float32), tuple(images), tuple(encoded), tuple(drawn)
    )


def _assign(documents: Sequence[TokenDocument], length: int) -> list[list[TokenDocument]]:
    """First-fit decreasing: rows of at most `length` tokens; a longer document gets its own row."""
    rows: list[list[TokenDocument]] = []
    room: list[int] = []
    for document in sorted(documents, key=lambda item: -item.size):
        row = next((i for i, left in enumerate(room) if left >= document.size), None)
        if row is None:
            rows.append([])
            room.append(length)
            row = len(rows) - 1
        rows[row].append(document)
        room[row] -= document.size
    return rows


def make_rows(
    documents: Sequence[TokenDocument], tokens: TokenConfig, length: int | None = None
) -> Rows:
    """Pack whole documents into rows of at most `length` tokens, longer documents into rows of
    their own; `length` None: one row a document, in the given order."""
    assigned = (
        [[document] for document in documents] if length is None else _assign(documents, length)
    )
    width = max(sum(document.size for document in row) for row in assigned)
    most = max(sum(len(document.images) for document in row) for row in assigned)
    token_ids = np.full((len(assigned), width), tokens.pad, np.int64)
    weight = np.zeros((len(assigned), width), np.float32)
    image_slot = np.full((len(assigned), max(most, 1)), -1, np.int32)
    images: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    pictures: list[tuple[int, int]] = []
    for b, row in enumerate(assigned):
        at, m = 0, 0
        for document in row:
            token_ids[b, at : at + document.size] = document.token_ids
            weight[b, at : at + document.size] = document.weight
            at += document.size
            for image, encoded, drawn in zip(
                document.images, document.encoded, document.drawn, strict=True
            ):
                if encoded:
                    image_slot[b, m] = len(images)
                    images.append(image)
                if drawn:
                    pictures.append((b, m))
                    targets.append(image)
                m += 1
    return Rows(
        token_ids,
        weight,
        tuple(images),
        image_slot,
        np.array(pictures, np.int64).reshape(-1, 2),
        tuple(targets),
    )
