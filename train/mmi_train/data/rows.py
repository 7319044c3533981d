"""From task documents to token rows: what is read, what is learned, and what is drawn.

Letters: b rows, t tokens, m images of a row, n encoded images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mmi_deploy.spec.config import TokenConfig
from mmi_train.data.synthetic.tasks import ImagePart, TaskDocument, TextPart


@dataclass(frozen=True)
class TokenDocument:
    """One document as tokens. `weight[i]` is the loss weight of token i as a target.

    `images[k]` belongs to the k-th begin-of-image token; `encoded[k]`: its visual tokens follow, so
    that it can be looked at; `drawn[k]`: it is a picture to learn to draw.
    """

    token_ids: NDArray[np.int64]
    weight: NDArray[np.float32]
    images: tuple[np.ndarray, ...]
    encoded: tuple[bool, ...]
    drawn: tuple[bool, ...]

    @property
    def size(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Rows:
    """Documents side by side in rows, padded to the longest.

    `image_slot[b, m]`: which of `images` the m-th image of row b is, -1 for one that is only drawn
    (or for none). `pictures`: (row, m) of every picture to draw, `targets` what it shows.
    """

    token_ids: NDArray[np.int64]  # [b, t]
    weight: NDArray[np.float32]  # [b, t]
    images: tuple[np.ndarray, ...]  # n pictures, uint8 [h, w, 3]
    image_slot: NDArray[np.int32]  # [b, m]
    pictures: NDArray[np.int64]  # [p, 2]
    targets: tuple[np.ndarray, ...]  # p pictures


def tokens_of(
    document: TaskDocument,
    tokenizer: Tokenizer,
    tokens: TokenConfig,
    visual_tokens: int,
    *,
    read_all: bool = False,
) -> TokenDocument:
    """`<s>`, the parts, `</s>`. A begin-of-image token after text is a target, as are texts that
    are to be learned and the end of a document that was learned. A picture at the very end is drawn
    only: nothing would look at its tokens, so the document ends with its begin-of-image token,
    unless `read_all`."""
    ids, weight = [tokens.bos], [0.0]
    images: list[np.ndarray] = []
    encoded: list[bool] = []
    drawn: list[bool] = []
    last = len(document.parts) - 1
    for index, part in enumerate(document.parts):
        if isinstance(part, ImagePart):
            seen = read_all or index < last or not part.draw
            span = visual_tokens if seen else 0
            ids += [tokens.boi] + [tokens.image] * span
            weight += [float(index > 0)] + [0.0] * span
            images.append(part.image)
            encoded.append(seen)
            drawn.append(part.draw)
        else:
            text = tokenizer.encode(part.text).ids
            ids += text
            weight += [float(part.learn)] * len(text)
    ending = document.parts[-1]
    if read_all or isinstance(ending, TextPart):
        ids.append(tokens.eos)
        weight.append(float(isinstance(ending, ImagePart) or ending.learn))
    return TokenDocument(
        np.array(ids), np.array(weight, np.float32), tuple(images), tuple(encoded), tuple(drawn)
    )


def _assign(documents: Sequence[TokenDocument], length: int) -> list[list[TokenDocument]]:
    """First fit, longest first: rows of at most `length` tokens (a longer document has its own)."""
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
    """Pack whole documents into rows of about `length` tokens; None: a row each, in their order."""
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
