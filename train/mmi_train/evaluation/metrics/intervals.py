"""Measures over questions, their bootstrap intervals, and the paired comparison of two of them.

A measure is a function of sums over questions: a mean, a corpus BLEU, a mean IoU. The bootstrap
draws as many questions as there are, with replacement, and takes the measure of their sums
(Efron, 1979); two measures of the same questions are drawn together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

# Drawn sets of questions, the confidence of an interval, and the seed: a score is reproducible.
DRAWS, CONFIDENCE, SEED = 1000, 0.95, 0

# Drawn sets that are held at once.
_BLOCK = 50

Verdict = Literal["higher", "lower", "not told apart"]


@dataclass(frozen=True)
class Measure:
    """terms: float64 [questions, terms], which are summed. value: sums [..., terms] -> [...]."""

    name: str
    terms: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]

    def total(self) -> float:
        """The measure over all questions."""
        return float(self.value(self.terms.sum(0)))


def mean_of(name: str, values: Sequence[float | None], scale: float = 100.0) -> Measure:
    """Mean of a value per question, in percent; questions without a value (None) are left out."""
    counted = np.array([0.0 if value is None else 1.0 for value in values])
    numbers = np.array([value or 0.0 for value in values], np.float64)
    return Measure(name, np.stack([scale * numbers, counted], axis=1), _mean)


def _mean(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


@dataclass(frozen=True)
class Difference:
    """Difference of two measures of the same questions, and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """Direction of the difference, if the interval lies on one side of zero."""
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "not told apart"


def interval(measure: Measure) -> tuple[float, float]:
    """95 % interval of a measure: percentiles over drawn sets of questions."""
    return _bounds(_drawn(measure.terms, measure.value))


def difference(measure: Measure, base: Measure) -> Difference:
    """`measure` minus `base`, whose terms belong to the same questions in the same order."""
    own = measure.terms.shape[1]

    def between(sums: np.ndarray) -> np.ndarray:
        return np.asarray(measure.value(sums[..., :own]) - base.value(sums[..., own:]))

    terms = np.concatenate([measure.terms, base.terms], axis=1)
    return Difference(measure.total() - base.total(), *_bounds(_drawn(terms, between)))


def _bounds(values: np.ndarray) -> tuple[float, float]:
    if np.isnan(values).all():  # no drawn set has a value
        return math.nan, math.nan
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _drawn(terms: np.ndarray, value: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The measure of `DRAWS` drawn sets of questions, float64 [DRAWS]."""
    # Equal questions are drawn together: 200 000 answers have a dozen different accuracies.
    rows, counts = np.unique(terms, axis=0, return_counts=True)
    total, rng = int(counts.sum()), np.random.default_rng(SEED)
    values = []
    for start in range(0, DRAWS, _BLOCK):
        block = min(_BLOCK, DRAWS - start)
        times = rng.multinomial(total, counts / total, size=block)  # [draws, rows]
        values.append(value(times @ rows))
    return np.concatenate(values)
