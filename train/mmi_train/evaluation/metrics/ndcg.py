"""NDCG of ranked answer options, the metric of Visual Dialog's dense annotations.

Source: Das et al., "Visual Dialog" (2017), and the evaluation of its challenge: only as many ranks
count as there are relevant options.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ranks_of(scores: Sequence[float]) -> list[int]:
    """Rank of each option, 1 for the greatest score; of equal scores the first option leads."""
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(1, len(order) + 1)
    return [int(rank) for rank in ranks]


def ndcg(ranks: Sequence[int], relevance: Sequence[float]) -> float | None:
    """NDCG of one question, 0 to 1; None if no option is relevant.

    ranks: of each option, from 1. relevance: of each option, the share of people who chose it.
    """
    relevant = np.asarray(relevance, np.float64)
    counted = int(np.count_nonzero(relevant))
    if not counted:
        return None
    discounts = 1 / np.log2(np.arange(counted) + 2)
    ranked = relevant[np.argsort(np.asarray(ranks), kind="stable")[:counted]]
    best = np.sort(relevant)[::-1][:counted]
    return float((ranked * discounts).sum() / (best * discounts).sum())
