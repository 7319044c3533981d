"""Row of one document in the service: its slot, its images in the pool, what its tokens see.

Letters: t tokens, v visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np
from numpy.typing import NDArray

from mmi_deploy.batching.image_rows import HeldRows, ImageRows, Key, image_key
from mmi_deploy.batching.kv_slots import Slot
from mmi_deploy.runtime.sequence import TokenSequence
from mmi_deploy.runtime.visible_images import VisibleImages


class DocumentRow:
    """One running document. The tokens in its slot are processed, the rest are pending."""

    def __init__(
        self, sequence: TokenSequence, salt: str, images: ImageRows, unet_images: ImageRows
    ) -> None:
        """images, unet_images: pools of the images that the LLM and the U-Net see."""
        self.sequence, self.salt = sequence, salt
        self.visible = _visible(sequence)
        self.slot: Slot | None = None
        self.images, self.unet_images = HeldRows(images), HeldRows(unet_images)
        self._keys: list[Key] = []  # of all pictures of the sequence

    @property
    def processed(self) -> int:
        """Number of tokens in the slot."""
        return len(self.slot.token_ids) if self.slot else 0

    @property
    def pending(self) -> list[int]:
        """Ids of the tokens that the LLM has not processed."""
        return self.sequence.token_ids[self.processed :]

    @property
    def keys(self) -> list[Key]:
        """Keys of all pictures of the document so far."""
        for rgb in self.sequence.pictures[len(self._keys) :]:
            self._keys.append(image_key(rgb, self.salt))
        return self._keys

    def image_row(self, image: int) -> int:
        """Row of the pool of image number `image`, for the LLM."""
        return self.images.row(self.keys[image])

    def seen_by_picture(self, index: int) -> list[Key]:
        """Keys of the images that the U-Net may see for picture number `index`, which the last
        token begins."""
        seen = self.sequence.config.image_decoder.mmfs.images_seen
        images, _ = self.visible.of_picture(index, seen)
        return [self.keys[image] for image in images]

    def release(self) -> None:
        """Let go of all images."""
        self.images.release()
        self.unet_images.release()

    def begin(self, slot: Slot) -> None:
        """Take `slot`, whose tokens are a prefix of the document."""
        self.slot = slot
        self.visible.restart(slot.token_ids)

    def fork(self, slot: Slot) -> DocumentRow:
        """Row for a text that continues the document in `slot` and looks at its images."""
        row = copy(self)  # images stay held by the document
        row.sequence = TokenSequence(self.sequence.config, self.sequence.limits)
        row.sequence.token_ids = self.sequence.token_ids[:]
        row.sequence.pictures = self.sequence.pictures[:]
        row.visible = _visible(row.sequence)
        row.visible.restart(row.sequence.token_ids)
        row.slot = slot
        return row

    def add(self, ids: Sequence[int]) -> None:
        """Count the tokens `ids` as processed."""
        assert self.slot is not None, "only a document with a slot runs"
        boi, all_ids = self.sequence.config.tokens.boi, self.sequence.token_ids
        shown = self.slot.images
        if len(ids) > 1:  # a single token shows no new picture
            # A begin-of-image token that comes last shows nothing of its picture yet.
            end = self.processed + len(ids)
            shown = self.keys[: all_ids[: end - 1].count(boi)]
        self.slot.add(ids, shown)

    def visual_rows(self, count: int) -> tuple[NDArray[np.int64], list[tuple[int, int, int]]]:
        """Visual tokens of the next `count` tokens: index [1, t] into them, -1 for text, and their
        places, (row of the pool, first, last) of each image."""
        config = self.sequence.config
        tokens, size = config.tokens, config.visual_tokens
        first, ids = self.processed, self.sequence.token_ids
        is_image = np.array([ids[first : first + count]]) == tokens.image
        index = np.where(is_image, is_image.cumsum() - 1, -1)
        image = ids[:first].count(tokens.boi)
        pieces = []
        if ids[first] == tokens.image:  # the run begins within an image
            begun = first - max(place for place in range(first) if ids[place] == tokens.boi) - 1
            pieces.append((self.image_row(image - 1), begun, min(size, begun + count)))
        for place in range(first, first + count - 1):
            if ids[place] == tokens.boi:
                left = first + count - place - 1
                pieces.append((self.image_row(image), 0, min(size, left)))
                image += 1
        return index, pieces


def _visible(sequence: TokenSequence) -> VisibleImages:
    config = sequence.config
    return VisibleImages(config.tokens, config.llm_mmfs.images_seen, sequence.limits.images)
