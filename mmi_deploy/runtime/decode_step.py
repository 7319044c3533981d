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
    """Runs of `llm` for one document, one token each, that look at `m` image slots.

    Letters: m image slots.
    """

    def __init__(
        self, llm: Engine, m: int, fixed: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> None:
        """fixed: the other inputs. Raises `EngineError` for buffers that do not fit the graph."""
        written = {}
        for name in _WRITTEN:
            tensor = llm.graph[name]
            written[name] = HOST.allocate(tensor.resolve(b=1, t=1, w=1, m=m), tensor.dtype)
        self._arrays: dict[str, Array] = {name: buffer.read() for name, buffer in written.items()}
        self._arrays["visual_index"][...] = -1  # text
        self._plan = llm.bind({**fixed, **written}, outputs)

    def run(
        self, token: int, place: int, slot: NDArray[np.int32], position: NDArray[np.int32]
    ) -> None:
        """Decode `token` at `place` of the document, which sees the images in `slot` [1, m] at the
        relative positions `position` [1, 1, m]."""
        arrays = self._arrays
        arrays["token_ids"][...] = token
        arrays["position"][...] = place
        arrays["write_index"][...] = place
        arrays["image_slot"][...] = slot
        arrays["image_position"][...] = position
        self._plan.run()
