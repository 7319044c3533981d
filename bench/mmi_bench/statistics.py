"""Statistics of repeated measurements: median, quartiles, extremes, percentiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil, log

import numpy as np

# Confidence with which a percentile lies below the largest sample, or it is not given.
CONFIDENCE = 0.99


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


def least_samples(percent: float) -> int:
    """Samples that carry a percentile: the largest of them lies beyond it with `CONFIDENCE` (order
    statistics). 44 for p90, 90 for p95, 459 for p99."""
    return ceil(log(1 - CONFIDENCE) / log(percent / 100))


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Percentile of `values`; None of fewer than `least_samples`."""
    return float(np.percentile(values, percent)) if len(values) >= least_samples(percent) else None


@dataclass(frozen=True)
class Latencies:
    """Summary of latencies in the words of TensorRT's trtexec, in the unit of the samples. A
    percentile that the samples do not carry is None."""

    min: float
    max: float
    mean: float
    median: float
    p90: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Latencies:
        tails = (percentile(values, percent) for percent in (90, 95, 99))
        return cls(
            min(values), max(values), float(np.mean(values)), float(np.median(values)), *tails
        )

    def to_json(self) -> dict[str, float | None]:
        return asdict(self)
