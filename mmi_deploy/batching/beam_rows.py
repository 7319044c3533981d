"""Beams of one document in the service, or continuations that are scored.

The document holds a slot for each from its begin to its end.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmi_deploy.batching.document_row import DocumentRow
from mmi_deploy.batching.kv_slots import KvSlots, Slot
from mmi_deploy.runtime.beam_search import place_beams
from mmi_deploy.runtime.work import DOCUMENT, BeamStep


class BeamRows:
    """Rows of the beams of a search. The document's own slot is that of a beam, too: the beam's
    tokens stand behind the document and go at the end of the search."""

    def __init__(self, document: DocumentRow, further: Sequence[Slot], kv: KvSlots) -> None:
        """further: slots besides the document's own, which are empty."""
        assert document.slot is not None, "a document with beams has a slot"
        self._document, self._kv = document, kv
        self._boi = document.sequence.config.tokens.boi
        self.slots = [document.slot, *further]
        self._beams = [0]  # of each beam, its place among the slots
        self._rows: list[DocumentRow] = []  # of the slots
        self._step: BeamStep | None = None  # that the slots are ready for
        self._length = 0  # tokens of the document when the search began

    def grow(self, step: BeamStep) -> list[DocumentRow]:
        """Rows of the beams of `step`, each with one token pending. A second call for the same step
        changes nothing."""
        if self._step is None:
            self._length = len(self.slots[0].token_ids)
            self._rows = [self._document.fork(slot) for slot in self.slots]
        if step is not self._step:
            before = [self._rows[place].sequence.token_ids for place in self._beams]
            texts = [
                self._document.sequence.token_ids[: self._length]
                if parent == DOCUMENT
                else before[parent]
                for parent in step.parents
            ]
            self._beams, copies = place_beams(step.parents, self._beams, len(self.slots))
            for source, target in copies:
                slot = self.slots[source]
                self._kv.copy(slot, self.slots[target], len(slot.token_ids))
            for place, parent, text, token in zip(
                self._beams, step.parents, texts, step.tokens, strict=True
            ):
                self._rows[place].sequence.token_ids = [*text, token]
                if parent == DOCUMENT:
                    self.slots[place].truncate(self._length, self._boi)
            self._step = step
        return [self._rows[place] for place in self._beams]

    def end_search(self) -> None:
        """Leave the document alone in its slot."""
        if self._step is not None:
            self.slots[0].truncate(self._length, self._boi)
            self._rows, self._beams, self._step = [], [0], None
