"""What a document keeps between runs: keys and values of its tokens, MMFS values of its images."""

from __future__ import annotations

from collections.abc import Iterable

from mmi_deploy.graphs import Graph, Tensor
from mmi_deploy.runtime.buffers import Buffer, Memory


class KvCache:
    """The LLM's keys and values, one row of `context` slots, written in place by the graph."""

    def __init__(self, llm: Graph, memory: Memory, batch: int = 1) -> None:
        names = set(llm.in_place.values())
        self.buffers: dict[str, Buffer] = {
            tensor.name: memory.allocate(tensor.resolve(b=batch), tensor.dtype)
            for tensor in llm.inputs
            if tensor.name in names
        }


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
    def run(self) -> int:
        """How many rows from that of the next image on lie side by side."""
        return self.rows - self.slot(self.images)

    def add(self, count: int) -> dict[str, Buffer]:
        """Where to write the values of the next `count` images, at most `run`: so many rows of each
        tensor."""
        row = self.slot(self.images)
        self.images += count
        return {name: buffer.rows(row, row + count) for name, buffer in self._buffers.items()}

    def slot(self, image: int) -> int:
        """The row of image number `image` of the document."""
        return image % self.rows

    def buffers(self) -> dict[str, Buffer]:
        """The rows in use, one at least: graphs want a pool even where nothing is visible."""
        used = max(1, min(self.images, self.rows))
        return {name: buffer.rows(0, used) for name, buffer in self._buffers.items()}
