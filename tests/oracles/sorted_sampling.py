"""Text sampling by sorting the whole vocabulary: the definition that faster code has to equal.

Letters: u vocabulary.
"""

from __future__ import annotations

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return powers / powers.sum()


def keep_top_k(logits: np.ndarray, count: int) -> np.ndarray:
    """Drop what is below the `count`-th largest logit."""
    return np.where(logits < np.sort(logits)[-count], np.float32(-np.inf), logits)


def keep_top_p(logits: np.ndarray, mass: float) -> np.ndarray:
    """Drop the least probable tokens whose probabilities sum up to at most 1 - `mass`."""
    if mass >= 1:
        return logits
    order = np.argsort(logits, kind="stable")
    tail = np.cumsum(softmax(logits[order]))
    scores = logits.copy()
    scores[order[:-1][tail[:-1] <= 1 - mass]] = -np.inf
    return scores


def draw(logits: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Ids of softmax(`logits` [u]) at each of the uniform numbers."""
    probabilities = softmax(logits)
    cumulative = np.cumsum(probabilities)
    chosen = np.searchsorted(cumulative, uniforms * cumulative[-1], side="right")
    return np.minimum(chosen, np.flatnonzero(probabilities)[-1])
