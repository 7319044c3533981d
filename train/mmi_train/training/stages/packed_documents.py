"""Packed documents stage: the paper's pre-training on a mixture of data sets.

Each micro-batch takes one source, drawn by its weight, and packs documents of that source into rows
of the whole context length, as the published run does (Sec. 4.1, and `pack`). Every text and every
picture is learned; a row is causal from its first token to its last, and MMFS and the image decoder
stop at `<s>`.

The published run packs one stream a process, which would depend on the number of processes. Here
the turn of a source decides where its micro-batch begins in the order of documents: one stride
after the turn before, the mean number of documents of a micro-batch. Rows of a micro-batch continue
each other; a document that the last row cuts is not continued.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice

import numpy as np

from mmi_deploy.errors import DocumentError
from mmi_train.data.batches import packed_batch
from mmi_train.data.mixture import MixedDocuments, RowShape, mixture_of
from mmi_train.data.packing import PackedRow, pack
from mmi_train.data.readers.sample import Skipped
from mmi_train.data.rows import TokenDocument, continued, tokens_of
from mmi_train.training.stages.documents import DocumentBatch, DocumentsStage

# Micro-batches of a source that are packed to find its stride.
_MEASURED = 4

# Documents in a row that may give none, and that may give no row.
_SPARE, _MOST_READ = 200, 10_000


@dataclass
class PackedDocumentsStage(DocumentsStage):
    """Micro-batches of packed rows of a mixture, `RowShape` of each source; `documents` is not
    used."""

    @property
    def mixture(self) -> MixedDocuments:
        return mixture_of(self.file)

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Documents between two turns of each source, found by packing its first micro-batches."""
        found = []
        for number, source in enumerate(self.mixture.sources):
            reader = _Reader(self, number, 0)
            for _ in islice(self._packed(reader, source.shape), _MEASURED * source.shape.rows):
                pass
            found.append(max(round(reader.read / _MEASURED), 1))
        return tuple(found)

    def describe(self) -> dict[str, object]:
        return {**super().describe(), "strides": self.strides}

    def packed_document(self, index: int, epoch: int = 0) -> TokenDocument:
        """Document `index` as tokens, of any length and all learned; raises `DocumentError`."""
        config = self.model.config
        return tokens_of(
            self.file.parts(index, epoch),
            continued(self.tokenizer),
            config.tokens,
            config.visual_tokens,
            read_all=True,
        )

    def rows(self, source: int, turn: int) -> tuple[list[PackedRow[np.ndarray]], _Reader]:
        """Rows of a source at its turn, and the reader of their documents."""
        shape = self.mixture.sources[source].shape
        reader = _Reader(self, source, turn * self.strides[source])
        return list(islice(self._packed(reader, shape), shape.rows)), reader

    def _packed(self, reader: _Reader, shape: RowShape) -> Iterator[PackedRow[np.ndarray]]:
        config = self.model.config
        return pack(
            ((document.token_ids.tolist(), document.images) for document in reader),
            config.tokens,
            length=config.llama.context,
            visual_tokens=config.visual_tokens,
            truncation=shape.truncation,
            max_images=shape.images,
        )

    def batch(self, index: int, rng: np.random.Generator) -> DocumentBatch:
        source, turn = self._order.turns[index]
        rows, reader = self.rows(source, turn)
        shape = self.mixture.sources[source].shape
        made = packed_batch(rows, self.model.config, only_after_image=shape.only_after_image)
        return DocumentBatch(made, tuple(reader.broken))

    def place(self, source: int, position: int) -> tuple[int, int]:
        """Number and epoch of the document at a position of a source's order."""
        return self._order.of_source(source, position)


class _Reader:
    """Documents of a source as tokens, from a position of its order on, without end. `read`:
    positions that were read. `broken`: documents that cannot be read, and the reasons."""

    def __init__(self, stage: PackedDocumentsStage, source: int, start: int) -> None:
        self._stage, self._source, self._start = stage, source, start
        self.read = 0
        self.broken: list[tuple[int, str]] = []

    def __iter__(self) -> Iterator[TokenDocument]:
        failed = 0
        for position in count(self._start):
            number, epoch = self._stage.place(self._source, position)
            self.read += 1
            try:
                document = self._stage.packed_document(number, epoch)
            except DocumentError as error:
                failed += 1
                if not (isinstance(error, Skipped) and error.by_rule):
                    self.broken.append((number, str(error)))
                if failed == _SPARE:
                    name = self._stage.file.name(number)
                    raise DocumentError(
                        f"{_SPARE} documents in a row cannot be used, the last of them {name}: "
                        f"{error}"
                    ) from None
                continue
            failed = 0
            if self.read > _MOST_READ:
                raise DocumentError(
                    f"{_MOST_READ} documents of {self._stage.file.name(number)} and those before "
                    "give no row with a picture"
                )
            yield document
