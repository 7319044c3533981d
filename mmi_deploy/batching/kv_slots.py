"""Slots of the KV cache: one row of context per running document, kept afterwards as a prefix.

Letters: b batch, t tokens, c channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mmi_deploy.batching.image_rows import Key
from mmi_deploy.runtime.buffers import Buffer
from mmi_deploy.runtime.caches import HiddenStates, KvCache
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.config import TokenConfig

# Tokens from which on a common prefix is worth its bookkeeping.
LEAST_PREFIX = 16

# Share of idle rows in a run up to which documents stay where they are.
MOST_IDLE = 0.25


@dataclass(eq=False)
class Slot:
    """One row of the KV cache and of the hidden states, and the tokens in it.

    index: row, which changes when rows are exchanged. running: a document holds the slot.
    token_ids: the tokens in the cache, in order. images: keys of the pictures that they show.
    salt: tenant whose tokens they are. exact: leading tokens that were computed in runs of two
    tokens or more. used: number of the last use.
    """

    index: int
    running: bool = False
    salt: str = ""
    token_ids: list[int] = field(default_factory=list)
    images: list[Key] = field(default_factory=list)
    exact: int = 0
    used: int = 0

    def add(self, ids: Sequence[int], images: Sequence[Key]) -> None:
        """Count the tokens `ids` that a run has added. images: keys of all pictures so far."""
        first = len(self.token_ids)
        self.token_ids += ids
        self.images = list(images)
        if len(ids) > 1 and self.exact == first:
            self.exact += len(ids)

    def truncate(self, count: int, boi: int) -> None:
        """Keep the first `count` tokens. boi: begin-of-image token."""
        del self.token_ids[count:]
        # A begin-of-image token at the end shows nothing of its picture yet.
        del self.images[self.token_ids[:-1].count(boi) :]
        self.exact = min(self.exact, count)


def common_prefix(
    ids: Sequence[int],
    images: Sequence[Key],
    other_ids: Sequence[int],
    other_images: Sequence[Key],
    boi: int,
) -> int:
    """Number of leading tokens that are equal, pictures included: image tokens are equal if the
    keys of their pictures are."""
    most = min(len(ids), len(other_ids))
    unlike = np.flatnonzero(np.array(ids[:most]) != np.array(other_ids[:most]))
    count = int(unlike[0]) if len(unlike) else most
    begun = [place for place in range(count) if ids[place] == boi]
    for place, key, other in zip(begun, images, other_images, strict=False):
        if key != other:
            return place + 1
    known = min(len(images), len(other_images))
    return begun[known] + 1 if known < len(begun) else count


class KvSlots:
    """All slots, allocated once.

    Attention gives a masked key the weight zero, but zero times NaN is NaN: the slot of a document
    that failed is filled with zeros before another one uses it.
    """

    def __init__(self, runtime: Runtime, slots: int, exact: bool) -> None:
        """exact: find only prefixes whose cache equals, to the bit, that of a run over the whole
        document. A run of one token rounds attention differently from longer runs on the CPU."""
        llm, memory = runtime.graphs["llm"], runtime.memory
        self.slots = [Slot(index) for index in range(slots)]
        self.context = runtime.limits.context
        self.exact = exact
        self._tokens: TokenConfig = runtime.config.tokens
        self._memory = memory
        self._cache = KvCache(llm, memory, slots)
        self._hidden = HiddenStates(llm, memory, slots * self.context)
        self._scratch: dict[str, Buffer] = {}
        self._zeros: dict[str, Buffer] = {}
        self._uses = 0
        self.copies = 0  # rows that were copied or exchanged

    def cache(self, first: int, last: int) -> dict[str, Buffer]:
        """Rows `first` to `last` (exclusive) of the KV cache."""
        return {name: rows.rows(first, last) for name, rows in self._cache.buffers.items()}

    def write_hidden(self, slot: Slot, place: int, hidden: Buffer) -> None:
        """Write the hidden states [t, c] of the tokens from `place` on."""
        self._hidden.write(slot.index * self.context + place, hidden)

    def write_each_hidden(self, slots: Sequence[Slot], hidden: Buffer, rows: Sequence[int]) -> None:
        """Write rows of `hidden` [b, c] as the states of the next token of each slot."""
        places = [slot.index * self.context + len(slot.token_ids) for slot in slots]
        self._hidden.write_each(places, hidden, rows)

    def hidden(self, slot: Slot, first: int, last: int) -> Buffer:
        """View of the hidden states of tokens `first` to `last` (exclusive), [t, c]."""
        start = slot.index * self.context
        return self._hidden.tokens(start + first, start + last)

    def take(self, salt: str, ids: Sequence[int], images: Sequence[Key]) -> Slot | None:
        """Hold a slot for a document that begins with `ids`, with the longest prefix of it that a
        free slot has; None if all slots are running."""
        free = [slot for slot in self.slots if not slot.running]
        if not free:
            return None
        source, count = self._longest(free, salt, ids, images)
        oldest = min(free, key=lambda slot: (bool(slot.token_ids), slot.used, slot.index))
        if source is None:
            slot, count = oldest, 0
        elif source is oldest or len(source.token_ids) <= count + 1:
            slot = source  # nothing of another document is lost that would be kept otherwise
        else:
            slot = oldest
            self.copy(source, slot, count)
        slot.truncate(count, self._tokens.boi)
        slot.running, slot.salt = True, salt
        self._touch(slot)
        return slot

    def extend(self, slot: Slot, salt: str, ids: Sequence[int], images: Sequence[Key]) -> int:
        """Copy a longer prefix of `ids` from any other slot, running ones too. Returns the number
        of leading tokens in the slot."""
        others = [other for other in self.slots if other is not slot]
        source, count = self._longest(others, salt, ids, images)
        if source is not None and count >= len(slot.token_ids) + LEAST_PREFIX:
            self._touch(source)
            self.copy(source, slot, count)
        return len(slot.token_ids)

    def release(self, slot: Slot, failed: bool = False) -> None:
        """Let go of a slot; its tokens stay until it is needed, unless its document failed."""
        slot.running = False
        # An idle row of a run writes behind the tokens of its slot, so one place stays free.
        slot.truncate(0 if failed else self.context - 1, self._tokens.boi)
        self._touch(slot)
        if failed:
            self._fill_with_zeros(slot)

    def copy(self, source: Slot, slot: Slot, count: int) -> None:
        """Copy the first `count` tokens of `source` to `slot`."""
        pairs = zip(self._rows(source.index), self._rows(slot.index), strict=True)
        for (_, rows), (_, target) in pairs:
            self._memory.copy(rows, target)
        self.copies += 1
        slot.token_ids, slot.images = source.token_ids[:], source.images[:]
        slot.exact = source.exact
        slot.truncate(count, self._tokens.boi)

    def window(self, wanted: Sequence[Slot], most: int) -> tuple[int, int]:
        """Contiguous rows [first, last), at most `most`, that hold the slots `wanted`, for one run.
        Slots are exchanged if too many rows would be idle."""
        first = min(slot.index for slot in wanted)
        last = max(slot.index for slot in wanted) + 1
        span, count = last - first, len(wanted)
        if span <= most and span - count <= MOST_IDLE * span:
            return first, last
        rows = sorted(slot.index for slot in wanted)
        # The window with the most of them inside needs the fewest exchanges.
        first = max(
            range(len(self.slots) - count + 1),
            key=lambda start: sum(start <= row < start + count for row in rows),
        )
        inside = {slot.index for slot in wanted}
        holes = [row for row in range(first, first + count) if row not in inside]
        outside = [slot for slot in wanted if not first <= slot.index < first + count]
        for slot, hole in zip(outside, holes, strict=True):
            self._exchange(slot, self.slots[hole])
        return first, first + count

    def _longest(
        self, among: Sequence[Slot], salt: str, ids: Sequence[int], images: Sequence[Key]
    ) -> tuple[Slot | None, int]:
        """Slot with the longest usable prefix of `ids`, and its length; None if none is long
        enough."""
        # The last token always runs, as its logits are not kept; the last two where runs of one
        # token are not exact.
        most = len(ids) - (2 if self.exact else 1)
        best, longest = None, LEAST_PREFIX - 1
        for slot in among:
            if slot.salt != salt or len(slot.token_ids) <= longest:
                continue
            usable = min(most, slot.exact) if self.exact else most
            found = common_prefix(ids, images, slot.token_ids, slot.images, self._tokens.boi)
            if min(found, usable) > longest:
                best, longest = slot, min(found, usable)
        return best, longest if best else 0

    def _touch(self, slot: Slot) -> None:
        self._uses += 1
        slot.used = self._uses

    def _fill_with_zeros(self, slot: Slot) -> None:
        for name, row in self._rows(slot.index):
            if name not in self._zeros:
                self._zeros[name] = self._memory.allocate(row.shape, row.dtype)
            self._memory.copy(self._zeros[name], row)

    def _rows(self, index: int) -> list[tuple[str, Buffer]]:
        """All that belongs to one slot: its rows of the cache, and its hidden states."""
        start = index * self.context
        return [
            *((name, rows.rows(index, index + 1)) for name, rows in self._cache.buffers.items()),
            ("hidden", self._hidden.tokens(start, start + self.context)),
        ]

    def _exchange(self, slot: Slot, other: Slot) -> None:
        """Exchange the rows of two slots."""
        for (name, rows), (_, target) in zip(
            self._rows(slot.index), self._rows(other.index), strict=True
        ):
            if name not in self._scratch:
                self._scratch[name] = self._memory.allocate(rows.shape, rows.dtype)
            self._memory.copy(target, self._scratch[name])
            self._memory.copy(rows, target)
            self._memory.copy(self._scratch[name], rows)
        self.copies += 1
        slot.index, other.index = other.index, slot.index
        self.slots[slot.index], self.slots[other.index] = slot, other
