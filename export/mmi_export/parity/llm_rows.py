"""Random rows of interleaved documents as inputs of the `llm` graph.

Letters: b batch, t tokens, n encoded images, m image slots, s feature cells, c channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmi_deploy.spec import token_layout
from mmi_deploy.spec.config import ModelConfig


@dataclass(frozen=True)
class LlmRows:
    """Rows of different lengths, left-padded to one length."""

    token_ids: NDArray[np.int64]  # [b, t]
    start: NDArray[np.int64]  # [b]: columns of padding before each row
    position: NDArray[np.int64]  # [b, t]
    visual_index: NDArray[np.int64]  # [b, t]
    image_position: NDArray[np.int32]  # [b, t, m]
    own_images: NDArray[np.int64]  # [b, m]: index of the encoded image; -1: no image
    visual_tokens: NDArray[np.float32]  # [n, visual tokens, c]
    features: NDArray[np.float32]  # [n, s, c]

    @property
    def image_slot(self) -> NDArray[np.int32]:
        """Pool slots [b, m] of the graph's input; slots without an image have position 0."""
        return self.own_images.clip(min=0).astype(np.int32)

    def inputs(self, first: int, stop: int, draw: np.random.Generator) -> dict[str, NDArray]:
        """Inputs of the graph for columns `first` to `stop`, with random wanted positions."""
        part = slice(first, stop)
        rows, columns = len(self.token_ids), stop - first
        wanted = draw.integers(0, columns, (rows, min(3, columns)))
        wanted[:, -1] = columns - 1
        return {
            "token_ids": self.token_ids[:, part],
            "visual_index": self.visual_index[:, part],
            "position": self.position[:, part],
            "write_index": np.full(rows, first),
            "start": self.start,
            "logit_index": wanted,
            "image_position": self.image_position[:, part],
        }

    def in_slots(self, rows: Sequence[int], first: Sequence[int], count: int) -> dict[str, NDArray]:
        """Inputs for `count` tokens of some rows, from place `first[b]` of each document on, if a
        document begins in the first place of its slot of the cache. The last token's logits are
        wanted."""
        of = np.array(rows)
        place = np.array(first)[:, None] + np.arange(count)  # [b, t]
        column = self.start[of][:, None] + place
        return {
            "token_ids": self.token_ids[of[:, None], column],
            "visual_index": self.visual_index[of[:, None], column],
            "position": place,
            "write_index": np.array(first),
            "start": np.zeros(len(of), np.int64),
            "logit_index": np.full((len(of), 1), count - 1),
            "image_position": self.image_position[of[:, None], column],
            "image_slot": self.image_slot[of],
        }


def random_rows(
    config: ModelConfig, draw: np.random.Generator, rows: int, tokens: int, images: int
) -> LlmRows:
    """Draw `rows` rows of at most `tokens` tokens with up to `images` images each (as many as fit)
    from a shared pool. The first row is the longest."""
    ids = config.tokens
    block = 1 + config.visual_tokens
    images = min(images, (tokens - 2) // (block + 1))
    pool = max(images, 1)
    own = np.full((rows, pool), -1)
    own[:, :images] = [draw.permutation(pool)[:images] for _ in range(rows)]
    special = {ids.bos, *ids.ends, ids.pad, ids.boi, ids.image}
    words = np.array([word for word in range(config.llama.vocab) if word not in special])
    shape = (rows, tokens)
    start = np.array([draw.integers(0, 4) if row else 0 for row in range(rows)])
    start = np.minimum(start, tokens - 1 - images * (block + 1))
    token_ids = np.full(shape, ids.pad)
    visual_index = np.full(shape, -1)
    image_position = np.zeros((*shape, pool), np.int32)
    seen = config.llm_mmfs.images_seen
    for row, begin in enumerate(start):
        length = tokens - begin
        spare = length - 1 - images * block
        cuts = np.sort(draw.integers(0, spare + 1, images))
        parts = np.split(draw.choice(words, spare), cuts)
        picture = np.array([ids.boi] + [ids.image] * config.visual_tokens)
        line = [np.array([ids.bos]), parts[0]]
        for part in parts[1:]:
            line += [picture, part]
        own_ids = np.concatenate(line)[None]
        token_ids[row, begin:] = own_ids[0]
        visual_index[row, begin:] = token_layout.visual_index(
            own_ids, ids, own[row][None], config.visual_tokens
        )[0]
        image_position[row, begin:] = token_layout.image_positions(own_ids, ids, pool, seen)[0]
    sides = config.vision.level_sides
    return LlmRows(
        token_ids=token_ids,
        start=start,
        position=(np.arange(tokens) - start[:, None]).clip(min=0),
        visual_index=visual_index,
        image_position=image_position,
        own_images=own,
        visual_tokens=draw.standard_normal(
            (pool, config.visual_tokens, config.llama.width), np.float32
        ),
        features=draw.standard_normal(
            (pool, sum(side**2 for side in sides), config.vision.width), np.float32
        ),
    )
