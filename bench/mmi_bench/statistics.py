"""Statistics of repeated measurements: median, quartiles, extremes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Statistics:
    """Summary of measurements. `low` and `high` are the quartiles."""

    median: float
    low: float
    high: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistics:
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        return cls(median, low, high, min(values), max(values))

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def ratios(dividends: Sequence[float], divisors: Sequence[float]) -> Statistics:
    """Statistics of paired ratios. Pairs are measured one after the other, under the same load."""
    return Statistics.of([a / b for a, b in zip(dividends, divisors, strict=True)])
