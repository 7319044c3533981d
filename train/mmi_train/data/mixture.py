"""Mixtures of documents: several sources, of which each place of an endless order takes one.

The source of a place is drawn by the sources' weights, keyed by the seed and the place alone, and
the number of earlier places that took the same source is that source's cursor. Ranks, workers and
resumed runs find their documents by their places, and every source goes through its documents by
a permutation of its own in each epoch (`ShuffledOrder`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmi_train.data.document import Part
from mmi_train.data.documents import Documents
from mmi_train.data.order import ShuffledOrder
from mmi_train.data.packing import Truncation

# Places whose sources are drawn together.
_BLOCK = 4096


@dataclass(frozen=True)
class RowShape:
    """Packed rows of one micro-batch of a source: their number, the most images of each, and what
    is cut (`Truncation`). `only_after_image`: text before a document's first image is not
    learned."""

    rows: int = 1
    images: int | None = None
    truncation: Truncation = "image"
    only_after_image: bool = False


@dataclass(frozen=True)
class Source:
    """Documents in a mixture under a name, drawn with a relative weight."""

    name: str
    documents: Documents
    weight: float = 1.0
    shape: RowShape = RowShape()


class MixedDocuments:
    """Documents of several sources, numbered through one source after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self._starts = np.cumsum([0, *(len(source.documents) for source in sources)]).tolist()
        told = [
            f"{source.name} {source.documents.sha256} {source.weight} {source.shape}"
            for source in sources
        ]
        self.sha256 = hashlib.sha256("\n".join(told).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, index: int) -> str:
        """Place of a document, for messages."""
        source, own = self.place(index)
        return self.sources[source].documents.name(own)

    def parts(self, index: int, epoch: int = 0) -> tuple[Part, ...]:
        """Parts of a document, as its source gives them."""
        source, own = self.place(index)
        return self.sources[source].documents.parts(own, epoch)

    def place(self, index: int) -> tuple[int, int]:
        """Source of a document, and its number there."""
        source = int(np.searchsorted(self._starts, index, side="right")) - 1
        return source, index - self._starts[source]

    def start(self, source: int) -> int:
        """Number of the first document of a source."""
        return int(self._starts[source])


def mixture_of(documents: Documents) -> MixedDocuments:
    """The documents as a mixture: of one source if they are none."""
    if isinstance(documents, MixedDocuments):
        return documents
    return MixedDocuments([Source("", documents)])


class Turns:
    """Source of each place of an endless mixture, drawn by `weights`, and how often that source was
    drawn before: its turn."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self._shares = np.cumsum(np.asarray(weights, np.float64) / np.sum(weights))
        self._seed = seed
        self._before = [np.zeros(len(weights), np.int64)]  # draws of each source, by block
        self._block: tuple[int, NDArray[np.int64]] | None = None

    def __getitem__(self, place: int) -> tuple[int, int]:
        """Source and turn of a place."""
        if len(self._shares) == 1:
            return 0, place
        number, at = divmod(place, _BLOCK)
        while len(self._before) <= number:
            last = self._drawn(len(self._before) - 1)
            counts = np.bincount(last, minlength=len(self._shares))
            self._before.append(self._before[-1] + counts)
        if self._block is None or self._block[0] != number:
            self._block = number, self._drawn(number)
        block = self._block[1]
        source = int(block[at])
        return source, int(self._before[number][source] + (block[:at] == source).sum())

    def _drawn(self, number: int) -> NDArray[np.int64]:
        """Sources of the places of a block."""
        draws = np.random.default_rng([self._seed, number, 2]).random(_BLOCK)
        # Rounding may leave the last share just below 1.
        return np.minimum(np.searchsorted(self._shares, draws, "right"), len(self._shares) - 1)


class MixedOrder:
    """Endless order of the documents of a mixture, or of any others."""

    def __init__(self, documents: Documents, seed: int) -> None:
        self._mixture = mixture_of(documents)
        sources = self._mixture.sources
        self.turns = Turns([source.weight for source in sources], seed)
        self._orders = [
            ShuffledOrder(len(source.documents), f"{seed} {source.name}" if source.name else seed)
            for source in sources
        ]

    def __getitem__(self, place: int) -> tuple[int, int]:
        """Number of the document at a place, and the epoch of its source."""
        return self.of_source(*self.turns[place])

    def of_source(self, source: int, turn: int) -> tuple[int, int]:
        """Number of the document that a source gives at its turn, and its epoch."""
        order = self._orders[source]
        return self._mixture.start(source) + order[turn], turn // order.count

    def another(self, number: int, draw: np.random.Generator) -> int:
        """Another document of the same source, at random."""
        source, _ = self._mixture.place(number)
        return self._mixture.start(source) + int(draw.integers(self._orders[source].count))
