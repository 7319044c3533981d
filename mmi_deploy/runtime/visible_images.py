"""Visible images: rows of the value pools and relative positions that a document's tokens see.

Letters: t tokens, m image slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mmi_deploy.runtime.caches import padded_count
from mmi_deploy.spec.config import TokenConfig
from mmi_deploy.spec.token_layout import image_positions, picture_positions

Slots = NDArray[np.int32]
Positions = NDArray[np.int32]


class VisibleImages:
    """Images that the tokens of one document see, as it grows.

    Relative positions depend only on where documents and images begin, so of the tokens so far only
    `<s>` and begin-of-image tokens are kept: the result equals that over all tokens.
    """

    def __init__(self, tokens: TokenConfig, seen: int, most: int) -> None:
        """seen: images that a token may see. most: images of a document."""
        self._tokens, self._seen, self._most = tokens, seen, most
        self._markers: list[int] = []
        # Slots and positions of the last token, which later text inherits; None after `<s>` or a
        # begin-of-image token, which change them.
        self._last: tuple[Slots, Positions] | None = None

    def of_tokens(self, ids: Sequence[int], row: Callable[[int], int]) -> tuple[Slots, Positions]:
        """Rows of the value pool [1, m] and relative positions [1, t, m] for the next tokens `ids`.

        row: row of the pool of image number i of the document.
        """
        tokens = self._tokens
        if self._last is not None and tokens.bos not in ids and tokens.boi not in ids:
            slot, position = self._last
            return slot, position.repeat(len(ids), axis=1)
        columns = np.array([[*self._markers, *ids]])
        begun = int((columns == tokens.boi).sum())
        position = image_positions(columns, tokens, begun, self._seen)[:, len(self._markers) :]
        images = np.flatnonzero(position.any(axis=(0, 1)))
        slots = np.array([row(int(image)) for image in images], np.int32)
        return pad_images(slots, position[:, :, images], self._most)

    def add(self, ids: Sequence[int], slot: Slots, position: Positions) -> None:
        """Count `ids` among the tokens so far; slot, position: their result of `of_tokens`."""
        markers = (self._tokens.bos, self._tokens.boi)
        self._markers += [token for token in ids if token in markers]
        self._last = None if ids[-1] in markers else (slot, position[:, -1:])

    def restart(self, ids: Sequence[int]) -> None:
        """Make `ids` the tokens so far."""
        self._markers = [token for token in ids if token in (self._tokens.bos, self._tokens.boi)]
        self._last = None

    def of_picture(self, index: int, seen: int) -> tuple[list[int], Positions]:
        """Images that picture number `index`, which the last token begins, may see, oldest first,
        and their relative positions [1, m]. seen: images that the U-Net may see."""
        row = np.array([self._markers])
        position = picture_positions(row, self._tokens, index + 1, seen)[:, -1]
        images = np.flatnonzero(position[0])
        return images.tolist(), position[:, images]


def pad_images(slot: Slots, position: Positions, most: int) -> tuple[Slots, Positions]:
    """Pad slots [m] and positions [1, ..., m] with hidden images (position 0), so that few values
    of m occur. Returns slots [1, m].

    A hidden image is the document's own first one: values that are not finite, times a weight of
    zero, are not zero, and must not come from another document.
    """
    missing = padded_count(len(slot), most) - len(slot)
    before = [(0, 0)] * (position.ndim - 1)
    own = int(slot[0]) if len(slot) else 0
    padded = np.pad(slot, (0, missing), constant_values=own)
    return padded[None], np.pad(position, [*before, (0, missing)])
