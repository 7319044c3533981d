"""Decode step: one token through the LLM on buffers that are bound once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mmi_deploy.runtime.buffers import HOST, Array, Buffer
from mmi_deploy.runtime.engine import Engine

# Inputs of `llm` that change from token to token or from turn to turn, written on the host.
_WRITTEN = (
    "token_ids",
    "visual_index",
    "position",
    "write_index",
    "start",
    "logit_index",
    "image_slot",
    "image_position",
)


class DecodeStep:
    """Runs of `llm` for rows of one token each, which look at `m` image slots.

    Letters: b batch, m image slots.
    """

    def __init__(
        self,
        llm: Engine,
        b: int,
        m: int,
        fixed: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
    ) -> None:
        """fixed: the other inputs. Raises `EngineError` for buffers that do not fit the graph."""
        written = {}
        for name in _WRITTEN:
            tensor = llm.graph[name]
            written[name] = HOST.allocate(tensor.resolve(b=b, t=1, w=1, m=m), tensor.dtype)
        arrays: dict[str, Array] = {name: buffer.read() for name, buffer in written.items()}
        arrays["visual_index"][...] = -1  # text
        self._m = m
        self._token, self._position = arrays["token_ids"][:, 0], arrays["position"][:, 0]
        self._write_index = arrays["write_index"]
        self._slot, self._image_position = arrays["image_slot"], arrays["image_position"][:, 0]
        self._plan = llm.bind({**fixed, **written}, outputs)

    def set(
        self,
        row: int,
        token: int,
        place: int,
        slot: NDArray[np.int32],
        position: NDArray[np.int32],
    ) -> None:
        """Let `row` decode `token` at `place` of its document, which sees the images in `slot` [m]
        at the relative positions `position` [m]. With fewer than `m`, the rest is hidden."""
        self._token[row] = token
        self._position[row] = place
        self._write_index[row] = place
        count = len(slot)
        self._slot[row, :count] = slot
        self._image_position[row, :count] = position
        if count < self._m:
            self._slot[row, count:] = slot[0]
            self._image_position[row, count:] = 0

    def run(self) -> None:
        """Decode a token of every row."""
        self._plan.run()
