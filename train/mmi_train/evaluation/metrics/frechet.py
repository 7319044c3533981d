"""Fréchet distance between two sets of features, the distance of FID.

Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (2017).
"""

from __future__ import annotations

import numpy as np


class Gaussian:
    """Mean and covariance of features [pictures, channels] that are added batch by batch."""

    def __init__(self, channels: int) -> None:
        self._count = 0
        # Sums of differences from the first feature: sums of large numbers lose digits.
        self._origin: np.ndarray | None = None
        self._sum = np.zeros(channels)
        self._products = np.zeros((channels, channels))

    def add(self, features: np.ndarray) -> None:
        """Add features [pictures, channels]."""
        values = features.astype(np.float64)
        if not len(values):
            return
        if self._origin is None:
            self._origin = values[0].copy()
        values = values - self._origin
        self._count += len(values)
        self._sum += values.sum(0)
        self._products += values.T @ values

    @property
    def mean(self) -> np.ndarray:
        """float64 [channels]. Raises `ValueError` without a feature."""
        if self._origin is None:
            raise ValueError("the mean of no features")
        return np.asarray(self._origin + self._sum / self._count)

    @property
    def covariance(self) -> np.ndarray:
        """float64 [channels, channels], unbiased. Raises `ValueError` of fewer than two."""
        if self._count < 2:
            raise ValueError("the covariance of fewer than two features")
        centre = self._sum / self._count
        return (self._products - self._count * np.outer(centre, centre)) / (self._count - 1)


def frechet_distance(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray
) -> float:
    """|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½) of two Gaussians.

    The trace of the root is that of (R C2 R)^½ with R = C1^½, which is symmetric: no complex
    numbers, and none of the noise that singular covariances give otherwise.
    """
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    common = np.sqrt(np.linalg.eigvalsh(root @ other_covariance @ root).clip(0)).sum()
    apart = mean - other_mean
    return float(apart @ apart + np.trace(covariance) + np.trace(other_covariance) - 2 * common)
