"""What a document keeps between runs: keys and values of its tokens, their hidden states, MMFS
values of its images, and the place where its pictures are drawn."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mmi_deploy.runtime.buffers import Array, Buffer, Memory
from mmi_deploy.spec.graphs import DEEP, IMAGE_SLOT_PADDING, Graph, Tensor

_STATE = {"latents": "next_latents", "history": "next_history"}
"""What a step of denoising reads, and where it writes the same for the next step."""


class KvCache:
    """The LLM's keys and values, one row of `context` slots, written in place by the graph."""

    def __init__(self, llm: Graph, memory: Memory, batch: int = 1) -> None:
        names = set(llm.in_place.values())
        self.buffers: dict[str, Buffer] = {
            tensor.name: memory.allocate(tensor.resolve(b=batch), tensor.dtype)
            for tensor in llm.inputs
            if tensor.name in names
        }


class HiddenStates:
    """The LLM's last hidden state of every token, the newest first: so the context of a picture,
    which is read backwards, is a slice."""

    def __init__(self, llm: Graph, memory: Memory, tokens: int) -> None:
        hidden = llm["hidden"]
        self._rows = memory.allocate(hidden.resolve(b=1, t=tokens)[1:], hidden.dtype)  # [tokens, c]
        self._memory = memory
        self._tokens = tokens

    def write(self, first: int, hidden: Buffer) -> None:
        """The states [t, c] of the tokens from number `first` on."""
        last = self._tokens - first
        self._memory.copy(hidden, self._rows.rows(last - hidden.shape[0], last), backwards=True)

    def newest_first(self, first: int, last: int) -> Buffer:
        """Those of the tokens `first` to `last` (exclusive), the last one first: [last - first, c].
        Valid while the document lives."""
        return self._rows.rows(self._tokens - last, self._tokens - first)


class ValuePool:
    """MMFS values of the images of a document, one row per image, written where they are read.

    A ring: with more images than rows the oldest makes room. Rows are encoded once and shared by
    every layer, token, step and guidance branch that looks at the image.
    """

    def __init__(self, tensors: Iterable[Tensor], memory: Memory, rows: int) -> None:
        self.rows = rows
        self.images = 0
        self._buffers = {
            tensor.name: memory.allocate(tensor.resolve(n=rows), tensor.dtype) for tensor in tensors
        }

    @property
    def contiguous(self) -> int:
        """How many rows from that of the next image on lie side by side."""
        return self.rows - self.slot(self.images)

    def reserve(self, count: int) -> dict[str, Buffer]:
        """Where to write the values of the next `count` images, at most `run`: so many rows of each
        tensor."""
        row = self.slot(self.images)
        self.images += count
        return {name: buffer.rows(row, row + count) for name, buffer in self._buffers.items()}

    def slot(self, image: int) -> int:
        """The row of image number `image` of the document."""
        return image % self.rows

    def buffers(self) -> dict[str, Buffer]:
        """The rows in use, one at least: graphs want a pool even where nothing is visible. Some
        more, all zeros, where that leaves fewer different numbers of rows."""
        used = padded_count(self.images, self.rows)
        return {name: buffer.rows(0, used) for name, buffer in self._buffers.items()}


def padded_count(images: int, most: int) -> int:
    """`images`, at most `most`, rounded up to one of few numbers."""
    return next((size for size in IMAGE_SLOT_PADDING if images <= size < most), most)


class DrawingBuffers:
    """What `denoise_step` reads and writes, at addresses that stay from step to step and from
    picture to picture."""

    def __init__(self, denoise_step: Graph, image_condition: Graph, memory: Memory) -> None:
        def place(tensor: Tensor) -> Buffer:
            return memory.allocate(tensor.resolve(b=1), tensor.dtype)

        self.state = {name: place(denoise_step[name]) for name in _STATE}
        self.next_state = {name: place(denoise_step[name]) for name in _STATE.values()}
        self.zero_noise = place(denoise_step["noise"])  # no noise
        self.deep = place(denoise_step[DEEP])
        self.condition = {tensor.name: place(tensor) for tensor in image_condition.outputs}

    def begin(self, latents: Array) -> None:
        """Start a picture from `latents` with an empty history."""
        history = self.state["history"]
        self.state["latents"].write(latents)
        history.write(np.zeros(history.shape, history.dtype))

    def swap(self) -> None:
        """The state after a step is the one that the next step starts from."""
        before = self.state
        self.state = {old: self.next_state[new] for old, new in _STATE.items()}
        self.next_state = {new: before[old] for old, new in _STATE.items()}
