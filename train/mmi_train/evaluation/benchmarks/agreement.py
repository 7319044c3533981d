"""Agreement of two files of answers: how many texts are other ones, and how far pictures differ.

It is the band within which a server's outputs may differ from their references, if the two files
have the same quality (`mmi bench serve --band FILE`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmi_deploy.documents.images import read_rgb
from mmi_train.evaluation.benchmarks.predictions import Prediction

# Levels of two pictures of different sizes.
_LEVELS = 255

# Probability that a share of other answers is below its bound.
_SURE = 0.95


@dataclass(frozen=True)
class Agreement:
    """answers: given in both files. different: how many of them are another text, ranking or
    picture. levels: largest difference of a picture, in 255; None without pictures."""

    answers: int
    different: int
    levels: int | None

    @property
    def share(self) -> float:
        """Upper bound of the share of different answers, with a confidence of 95 % (Clopper and
        Pearson 1934); 1 without answers."""
        count, different = self.answers, self.different
        if different >= count:
            return 1.0
        low, high = different / count, 1.0
        for _ in range(60):  # bisection: the chance of so few falls with the share
            middle = (low + high) / 2
            if _at_most(different, count, middle) > 1 - _SURE:
                low = middle
            else:
                high = middle
        return high

    def as_json(self) -> dict[str, Any]:
        """Counts, and the band that they allow, for JSON."""
        return {
            "answers": self.answers,
            "different": self.different,
            "band": {
                "levels": self.levels,
                "texts": round(self.share, 6) if self.levels is None else 0.0,
            },
        }


def _at_most(different: int, count: int, share: float) -> float:
    """Chance of at most so many different answers, if each is with the probability `share`."""
    numbers = np.arange(1, different + 1)
    steps = np.log((count - numbers + 1) / numbers)
    ways = np.concatenate([[0.0], np.cumsum(steps)])
    total = np.arange(different + 1)
    logs = ways + total * np.log(share) + (count - total) * np.log1p(-share)
    return float(np.exp(logs).sum())


def agreement_of(
    first: Sequence[Prediction | None], second: Sequence[Prediction | None]
) -> Agreement:
    """Agreement of answers to the same questions, in the same order. Raises `DocumentError` for a
    picture that cannot be read."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    different, levels = 0, []
    for one, other in pairs:
        apart = _levels(one, other)
        levels += apart
        different += (one.text, one.ranks) != (other.text, other.ranks) or any(apart)
    return Agreement(len(pairs), different, max(levels, default=None))


def _levels(one: Prediction, other: Prediction) -> list[int]:
    """Largest difference of each pair of pictures."""
    found = []
    for path, base in zip(one.images, other.images, strict=True):
        rgb, expected = read_rgb(path).astype(np.int16), read_rgb(base)
        same = rgb.shape == expected.shape
        found.append(int(np.abs(rgb - expected).max()) if same else _LEVELS)
    return found
