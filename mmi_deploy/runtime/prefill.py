"""Inputs of a prefill: several tokens of one document through the LLM.

Letters: t tokens, m image slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmi_deploy.runtime.buffers import Array


def prefill_inputs(
    ids: Sequence[int],
    first: int,
    visual_index: NDArray[np.int64],
    slot: NDArray[np.int32],
    position: NDArray[np.int32],
) -> dict[str, Array]:
    """Inputs of `llm` besides its buffers, for the tokens `ids` from place `first` of the document
    on, with the logits after the last one.

    visual_index [1, t]: row of the visual tokens, -1 for text. slot [1, m], position [1, t, m]: the
    images that the tokens see.
    """
    count = len(ids)
    return {
        "token_ids": np.array([ids], np.int64),
        "visual_index": visual_index,
        "position": np.arange(first, first + count, dtype=np.int64)[None],
        "write_index": np.array([first], np.int64),
        "start": np.zeros(1, np.int64),
        "logit_index": np.array([[count - 1]], np.int64),
        "image_slot": slot,
        "image_position": position,
    }
