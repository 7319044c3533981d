"""Rows of a session's KV cache: the document in the first one, and texts that continue it."""

from __future__ import annotations

from collections.abc import Sequence

from mmi_deploy.runtime.beam_search import place_beams
from mmi_deploy.runtime.buffers import Buffer, Memory
from mmi_deploy.runtime.caches import KvCache
from mmi_deploy.runtime.work import DOCUMENT


class CacheRows:
    """Rows of one document. Texts are written behind its tokens, in its own row too: these tokens
    are overwritten by the next that are appended."""

    def __init__(self, cache: KvCache, memory: Memory, count: int) -> None:
        self._cache, self._memory = cache, memory
        self.count = count
        self._beams: list[int] = [0]  # row of each beam of the present search
        self._depths: list[int] = [0]  # tokens of each beam

    def first(self, b: int) -> dict[str, Buffer]:
        """The first `b` rows, by the names of the graph's inputs."""
        return {name: rows.rows(0, b) for name, rows in self._cache.buffers.items()}

    def end_search(self) -> None:
        """Leave the document alone in its row."""
        self._beams, self._depths = [0], [0]

    def grow(self, parents: Sequence[int]) -> list[tuple[int, int]]:
        """Row of each new beam, which has the text of its parent among the beams before, and the
        number of tokens of that text."""
        depths = [0 if parent == DOCUMENT else self._depths[parent] for parent in parents]
        self._beams, copies = place_beams(parents, self._beams, self.count)
        for source, target in copies:
            self._copy(source, target)
        self._depths = [depth + 1 for depth in depths]
        return list(zip(self._beams, depths, strict=True))

    def _copy(self, source: int, target: int) -> None:
        for rows in self._cache.buffers.values():
            self._memory.copy(rows.rows(source, source + 1), rows.rows(target, target + 1))
