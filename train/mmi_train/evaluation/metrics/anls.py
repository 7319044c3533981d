"""ANLS: similarity of an answer to the nearest right one, by edit distance.

Source: Biten et al., "Scene Text Visual Question Answering" (2019); the metric of DocVQA,
InfographicVQA and ST-VQA.
"""

from __future__ import annotations

from collections.abc import Sequence

# Normalised distance from which an answer counts nothing.
THRESHOLD = 0.5


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Best of 1 - distance / longer length over the answers, 0 to 1; 0 from a normalised distance
    of `THRESHOLD` on. Case and repeated blanks do not count."""
    return max((_similarity(_plain(prediction), _plain(answer)) for answer in answers), default=0.0)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(a: str, b: str) -> float:
    longer = max(len(a), len(b))
    if not longer:
        return 1.0
    if (
        abs(len(a) - len(b)) >= THRESHOLD * longer
    ):  # so many edits at least: a page of text is quick
        return 0.0
    distance = edit_distance(a, b) / longer
    return 1 - distance if distance < THRESHOLD else 0.0


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance of two texts."""
    before = list(range(len(b) + 1))
    for row, letter in enumerate(a, 1):
        now = [row]
        for column, other in enumerate(b, 1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (letter != other)))
        before = now
    return before[-1]
