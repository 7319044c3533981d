"""Order of a training file: a permutation of its documents in every epoch, computed by position.

A Feistel network of keyed hashes permutes the numbers below the next power of 4; a result that is
no document is permuted again (cycle walking, Black and Rogaway, CT-RSA 2002). Any position of the
endless order costs the same and needs no memory, so that ranks, workers and resumed runs find
their documents without going through those before.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

_ROUNDS = 6


@dataclass(frozen=True)
class ShuffledOrder:
    """Endless order of `count` documents: each once in every epoch, by a permutation of its own.
    `seed`: a number or a text, of which the permutations are keyed."""

    count: int
    seed: int | str

    def __getitem__(self, position: int) -> int:
        """Document at `position`, which counts through all epochs."""
        epoch, place = divmod(position, self.count)
        while (place := self._permuted(place, epoch)) >= self.count:
            pass
        return place

    def _permuted(self, number: int, epoch: int) -> int:
        """Permutation of all numbers of 2 * `bits` bits."""
        bits = max(((self.count - 1).bit_length() + 1) // 2, 1)
        mask = (1 << bits) - 1
        left, right = number >> bits, number & mask
        for turn in range(_ROUNDS):
            key = f"{self.seed} {epoch} {turn} {right}".encode()
            mixed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
            left, right = right, left ^ (mixed & mask)
        return left << bits | right
