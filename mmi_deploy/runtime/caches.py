"""Caches of a session: KV cache, hidden states, MMFS values of images, buffers of the sampler.

Letters: t tokens, n encoded images, c channels.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mmi_deploy.runtime.buffers import Array, Buffer, Memory
from mmi_deploy.spec.graphs import DEEP, IMAGE_SLOT_PADDING, Graph, Tensor

# Sampler state: input of a denoising step -> output that is this input of the next step.
_STATE = {"latents": "next_latents", "history": "next_history"}


class KvCache:
    """Keys and values of all LLM layers, `context` slots a row.

    The graph writes new tokens into the slots in place: its output is the same buffer.
    """

    def __init__(self, llm: Graph, memory: Memory, batch: int = 1) -> None:
        names = set(llm.in_place.values())
        self.buffers: dict[str, Buffer] = {
            tensor.name: memory.allocate(tensor.resolve(b=batch), tensor.dtype)
            for tensor in llm.inputs
            if tensor.name in names
        }


class HiddenStates:
    """Final hidden state of every token of a document: a picture's context is a slice of it."""

    def __init__(self, llm: Graph, memory: Memory, tokens: int) -> None:
        hidden = llm["hidden"]
        self._rows = memory.allocate(hidden.resolve(b=1, t=tokens)[1:], hidden.dtype)  # [tokens, c]
        self._memory = memory

    def write(self, first: int, hidden: Buffer) -> None:
        """Write `hidden` [t, c], the states of the tokens from index `first` on."""
        self._memory.copy(hidden, self._rows.rows(first, first + hidden.shape[0]))

    def tokens(self, first: int, last: int) -> Buffer:
        """View of the states of tokens `first` to `last` (exclusive), [last - first, c]. Valid as
        long as this object."""
        return self._rows.rows(first, last)


class ImagePool:
    """Ring buffer of what a document keeps of its images: features or MMFS values, one row each.

    With more images than rows, a new image overwrites the oldest. The encoder writes into the rows
    that the LLM or U-Net reads; every token, step and guidance branch shares them.
    """

    def __init__(self, tensors: Iterable[Tensor], memory: Memory, rows: int) -> None:
        self.rows = rows
        self.images = 0
        self._buffers = {
            tensor.name: memory.allocate(tensor.resolve(n=rows), tensor.dtype) for tensor in tensors
        }

    @property
    def used(self) -> int:
        """Number of rows in use, rounded up with rows of zeros so that few values of n occur; at
        least one, as the graphs require n >= 1."""
        return padded_count(self.images, self.rows)

    @property
    def contiguous(self) -> int:
        """Number of contiguous rows from that of the next image to the end of the ring."""
        return self.rows - self.slot(self.images)

    def next_rows(self, count: int) -> dict[str, Buffer]:
        """Rows of the next `count` images, at most `contiguous`, to write to: tensor name -> buffer
        [count, ...]. Call `add` once they are written."""
        row = self.slot(self.images)
        return {name: buffer.rows(row, row + count) for name, buffer in self._buffers.items()}

    def add(self, count: int) -> None:
        """Count `count` images whose rows were written, or that are skipped."""
        self.images += count

    def slot(self, image: int) -> int:
        """Row of image number `image` of the document."""
        return image % self.rows

    def buffers(self) -> dict[str, Buffer]:
        """The `used` rows."""
        return {name: buffer.rows(0, self.used) for name, buffer in self._buffers.items()}


def padded_count(images: int, most: int) -> int:
    """Round `images` up to one of `IMAGE_SLOT_PADDING`, or to `most` beyond them."""
    return next((size for size in IMAGE_SLOT_PADDING if images <= size < most), most)


class DrawingBuffers:
    """Buffers of `denoise_step`, allocated once per session.

    The sampler state alternates between two fixed addresses, so two recorded CUDA graphs per engine
    serve all steps and pictures of the same shapes.
    """

    def __init__(self, denoise_step: Graph, image_condition: Graph, memory: Memory) -> None:
        def allocate(tensor: Tensor) -> Buffer:
            return memory.allocate(tensor.resolve(b=1), tensor.dtype)

        self.state = {name: allocate(denoise_step[name]) for name in _STATE}
        self.next_state = {name: allocate(denoise_step[name]) for name in _STATE.values()}
        self.zero_noise = allocate(denoise_step["noise"])  # for steps that add no noise
        self.deep = allocate(denoise_step[DEEP])
        self.condition = {tensor.name: allocate(tensor) for tensor in image_condition.outputs}

    def begin(self, latents: Array) -> None:
        """Start a picture from `latents`, with an empty history."""
        history = self.state["history"]
        self.state["latents"].write(latents)
        history.write(np.zeros(history.shape, history.dtype))

    def swap(self) -> None:
        """Exchange input and output state: a step's output is the next step's input."""
        before = self.state
        self.state = {old: self.next_state[new] for old, new in _STATE.items()}
        self.next_state = {new: before[old] for old, new in _STATE.items()}
