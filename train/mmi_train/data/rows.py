"""Token rows of training documents: token ids, loss weights, images to encode and to draw.

Letters: b batch, t tokens, m image slots, n encoded images, j pictures to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

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


def tokens_of(
    parts: Sequence[Part],
    tokenizer: Tokenizer,
    tokens: TokenConfig,
    visual_tokens: int,
    *,
    read_all: bool = False,
) -> TokenDocument:
    """Tokenize a document: `<s>`, the parts, `</s>`.

    Targets are begin-of-image tokens after the first part, texts with `learn`, and `</s>` after an
    image or such a text. A drawn picture at the end is not encoded, because no token would see it:
    the document then ends with its begin-of-image token, unless `read_all`, which encodes all
    images.
    """
    ids, weight = [tokens.bos], [0.0]
    images: list[np.ndarray] = []
    encoded: list[bool] = []
    drawn: list[bool] = []
    last = len(parts) - 1
    for index, part in enumerate(parts):
        if isinstance(part, ImagePart):
            seen = read_all or index < last or not part.draw
            span = visual_tokens if seen else 0
            ids += [tokens.boi] + [tokens.image] * span
            weight += [float(index > 0)] + [0.0] * span
            images.append(part.image)
            encoded.append(seen)
            drawn.append(part.draw)
        else:
            text = tokenizer.encode(part.text, add_special_tokens=False).ids
            ids += text
            weight += [float(part.learn)] * len(text)
    ending = parts[-1]
    if read_all or isinstance(ending, TextPart):
        ids.append(tokens.eos)
        weight.append(float(isinstance(ending, ImagePart) or ending.learn))
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
