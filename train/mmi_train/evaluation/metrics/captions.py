"""BLEU, ROUGE-L and CIDEr of captions, over tokens that are joined by blanks.

Sources: Papineni et al., "BLEU" (2002); Lin, "ROUGE" (2004); Vedantam et al., "CIDEr" (2015), in
its form D; each as the evaluation of MS-COCO captions computes it (coco-caption), whose constants
are here. Tokens: `caption_tokens`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from math import exp, log

import numpy as np

from mmi_train.evaluation.metrics.intervals import Measure, mean_of

# Longest n-grams of BLEU and CIDEr.
LONGEST = 4

# Constants that keep BLEU from dividing by zero.
_TINY, _SMALL = 1e-15, 1e-9

# Weight of recall in ROUGE-L.
_BETA = 1.2

# Width of CIDEr's penalty for another length, and its scale.
_SIGMA, _TEN = 6.0, 10.0

Grams = Counter[tuple[str, ...]]


def n_grams(tokens: Sequence[str]) -> Grams:
    """Counts of all n-grams of up to `LONGEST` tokens."""
    counts: Grams = Counter()
    for length in range(1, LONGEST + 1):
        counts.update(tuple(tokens[at : at + length]) for at in range(len(tokens) - length + 1))
    return counts


def bleu_terms(candidate: str, references: Sequence[str]) -> list[float]:
    """Sums that BLEU is a function of: the candidate's length, that of the closest reference, then
    matching and possible n-grams for each n."""
    words = candidate.split()
    lengths = [len(reference.split()) for reference in references]
    closest = min((abs(length - len(words)), length) for length in lengths)[1]
    most: Grams = Counter()
    for reference in references:
        most |= n_grams(reference.split())
    matches = [0] * LONGEST
    for gram, count in n_grams(words).items():
        matches[len(gram) - 1] += min(count, most[gram])
    possible = [max(0, len(words) - length) for length in range(LONGEST)]
    return [len(words), closest, *matches, *possible]


def bleu(sums: np.ndarray, longest: int) -> np.ndarray:
    """BLEU of n-grams up to `longest` from sums of `bleu_terms` [..., terms], 0 to 1."""
    matches = sums[..., 2 : 2 + longest]
    possible = sums[..., 2 + LONGEST : 2 + LONGEST + longest]
    precision = np.prod((matches + _TINY) / (possible + _SMALL), axis=-1) ** (1 / longest)
    ratio = (sums[..., 0] + _TINY) / (sums[..., 1] + _SMALL)
    with np.errstate(over="ignore"):
        penalty = np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)
    return np.asarray(precision * penalty)


def rouge_l(candidate: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence, best precision and recall over references."""
    words = candidate.split(" ")
    precision = recall = 0.0
    for reference in references:
        others = reference.split(" ")
        common = common_length(words, others)
        precision = max(precision, common / len(words))
        recall = max(recall, common / len(others))
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, by bits of one integer (Hyyrö, 2004)."""
    places: defaultdict[str, int] = defaultdict(int)
    for place, word in enumerate(a):
        places[word] |= 1 << place
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        same = row & places[word]
        row = ((row + same) | (row - same)) & full
    return len(a) - row.bit_count()


class Cider:
    """CIDEr with document frequencies of all references of a set.

    references: of each picture.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self._frequency: Counter[tuple[str, ...]] = Counter()
        for texts in references:
            self._frequency.update({gram for text in texts for gram in n_grams(text.split())})
        self._log_pictures = log(len(references))

    def score(self, candidate: str, references: Sequence[str]) -> float:
        """CIDEr of one picture's caption, 0 to 10."""
        own, size, length = self._vector(candidate)
        total = np.zeros(LONGEST)
        for reference in references:
            other, other_size, other_length = self._vector(reference)
            product = np.zeros(LONGEST)
            for gram, weight in own.items():
                if gram in other:
                    product[len(gram) - 1] += min(weight, other[gram]) * other[gram]
            sizes = size * other_size
            product = np.divide(product, sizes, out=product, where=sizes != 0)
            total += product * exp(-((length - other_length) ** 2) / (2 * _SIGMA**2))
        return float(total.mean()) / len(references) * _TEN

    def _vector(self, text: str) -> tuple[dict[tuple[str, ...], float], np.ndarray, int]:
        """Weight of each n-gram, the norm for each n [LONGEST], and the number of 2-grams."""
        weights = {}
        squares = np.zeros(LONGEST)
        pairs = 0
        for gram, count in n_grams(text.split()).items():
            rarity = self._log_pictures - log(max(1, self._frequency[gram]))
            weights[gram] = count * rarity
            squares[len(gram) - 1] += weights[gram] ** 2
            pairs += count if len(gram) == 2 else 0
        return weights, np.sqrt(squares), pairs


def cider_values(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr of each picture's caption, with document frequencies of these references."""
    cider = Cider(references)
    return [cider.score(*pair) for pair in zip(candidates, references, strict=True)]


def measures(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[Measure]:
    """CIDEr, BLEU-1 to 4 and ROUGE-L, in percent. Texts: tokens joined by blanks."""
    pairs = list(zip(candidates, references, strict=True))
    terms = np.array([bleu_terms(*pair) for pair in pairs], np.float64)

    def bleu_of(longest: int) -> Measure:
        return Measure(f"BLEU-{longest}", terms, lambda sums: 100 * bleu(sums, longest))

    return [
        mean_of("CIDEr", cider_values(candidates, references)),
        *(bleu_of(longest) for longest in range(LONGEST, 0, -1)),
        mean_of("ROUGE-L", [rouge_l(*pair) for pair in pairs]),
    ]
