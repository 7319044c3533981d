"""Caches: KV cache, hidden states, MMFS values of a document's images.

Letters: t tokens, n encoded images, c channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mmi_deploy.runtime.buffers import Buffer, Memory
from mmi_deploy.spec.graphs import IMAGE_SLOT_PADDING, Graph, Tensor


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
    """Final hidden state of every token of some documents: a picture's context is a slice of it."""

    def __init__(self, llm: Graph, memory: Memory, tokens: int) -> None:
        hidden = llm["hidden"]
        self._rows = memory.allocate(hidden.resolve(b=1, t=tokens)[1:], hidden.dtype)  # [tokens, c]
        self._memory = memory
        self._array = self._rows.read() if memory.device == "cpu" else None

    def write(self, first: int, hidden: Buffer) -> None:
        """Write `hidden` [t, c], the states of the tokens from index `first` on."""
        self._memory.copy(hidden, self._rows.rows(first, first + hidden.shape[0]))

    def write_each(self, places: Sequence[int], hidden: Buffer, rows: Sequence[int]) -> None:
        """Write rows of `hidden` [b, c], the state of one token each, to `places`."""
        if self._array is not None:  # one copy for all
            self._array[places] = hidden.read()[rows]
            return
        for place, row in zip(places, rows, strict=True):
            self.write(place, hidden.rows(row, row + 1))

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

    @property
    def all_rows(self) -> dict[str, Buffer]:
        """All rows, used or not."""
        return self._buffers

    def buffers(self) -> dict[str, Buffer]:
        """The `used` rows."""
        return {name: buffer.rows(0, self.used) for name, buffer in self._buffers.items()}


def padded_count(images: int, most: int) -> int:
    """Round `images` up to one of `IMAGE_SLOT_PADDING`, or to `most` beyond them."""
    return next((size for size in IMAGE_SLOT_PADDING if images <= size < most), most)
