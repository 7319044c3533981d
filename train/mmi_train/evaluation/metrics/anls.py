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
    """Levenshtein distance of two texts.

    A column of the table of distances is two whole numbers, whose bit i says that row i + 1 is one
    more, or one less, than row i (Myers 1999, in the form of Hyyrö 2003): texts of 30 000 letters
    take a second.
    """
    if not a or not b:
        return len(a) + len(b)
    rows, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    places: dict[str, int] = {}  # rows of each letter
    for row, letter in enumerate(a):
        places[letter] = places.get(letter, 0) | 1 << row
    more, less, distance = rows, 0, len(a)
    for letter in b:
        equal = places.get(letter, 0)
        diagonal = (((equal & more) + more) ^ more) | equal | less  # rows that cost nothing here
        right_more, right_less = less | ~(diagonal | more), more & diagonal
        distance += bool(right_more & last) - bool(right_less & last)
        right_more, right_less = right_more << 1 | 1, right_less << 1
        more = (right_less | ~(diagonal | right_more)) & rows
        less = right_more & diagonal & rows
    return distance
