"""Beam search: the most probable texts of a document grow side by side, and the best is kept.

The rules are those of the scorer in transformers 4.31, by which the published evaluation searches:

* Each step ranks the continuations of all beams together, and looks at as many of them for each
  beam as there are end tokens, and one more, so that enough beams go on.
* A continuation by an end token finishes its text if it is among the best `beams` of the step.
* A finished text is judged by its log probability over its length to the power of
  `length_penalty`. The length counts the tokens of the text and one more: the published code has a
  `<s>` in front.
* The search ends once `beams` texts have finished and no beam, at its present length, is better
  than the worst of them; with `early_stopping` as soon as `beams` texts have finished.

Letters: u vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix

import numpy as np
from numpy.typing import NDArray

from mmi_deploy.runtime.sampling import Logits, TextSampling, largest, log_softmax, processed
from mmi_deploy.runtime.work import DOCUMENT

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class BeamRules:
    """beams: texts that grow side by side. ends: end tokens. length_penalty: exponent of the length
    that a log probability is divided by; above 0 favours long texts. early_stopping: end as soon as
    `beams` texts have finished."""

    beams: int
    ends: frozenset[int]
    length_penalty: float = 1.0
    early_stopping: bool = False


@dataclass(frozen=True)
class Beam:
    """A text that grows. score: the sum of the log probabilities of its tokens."""

    tokens: tuple[int, ...] = ()
    score: float = 0.0


@dataclass(frozen=True)
class Hypothesis:
    """A text that has finished. end: its end token; None if the search was cut off. score: log
    probability over the length, to the power of the length penalty."""

    tokens: tuple[int, ...]
    end: int | None
    score: float


class BeamSearch:
    """One search: `beams` that grow, best first, and the best texts that have finished."""

    def __init__(self, rules: BeamRules) -> None:
        self.rules = rules
        self.beams: tuple[Beam, ...] = (Beam(),)
        self.parents: tuple[int, ...] = ()  # of each beam, among those of the step before
        self.finished: list[Hypothesis] = []
        self.done = False

    @property
    def length(self) -> int:
        """Number of tokens of each beam."""
        return len(self.beams[0].tokens) if self.beams else 0

    def advance(self, scores: Sequence[Float64]) -> None:
        """Extend the beams by a token. scores: log probabilities [u] of the token that follows each
        beam, as the options change them; minus infinity for one that must not come."""
        rules, u = self.rules, len(scores[0])
        totals = np.concatenate(
            [beam.score + row for beam, row in zip(self.beams, scores, strict=True)]
        )
        count = max(1 + len(rules.ends), 2) * rules.beams
        ranked = [pair for pair in largest(totals, count) if pair[1] > -np.inf]
        before, beams, parents = self.beams, list[Beam](), list[int]()
        for rank, (place, score) in enumerate(ranked):
            if len(beams) == rules.beams:
                break
            parent, token = divmod(place, u)
            tokens = before[parent].tokens
            if token not in rules.ends:
                beams.append(Beam((*tokens, token), score))
                parents.append(parent)
            elif rank < rules.beams:
                _keep(self.finished, self._hypothesis(tokens, token, score), rules.beams)
        self.beams, self.parents = tuple(beams), tuple(parents)
        length = len(before[0].tokens) + 2  # of a text that the next token would finish
        self.done = not beams or self._is_done(self._by_length(ranked[0][1], length))

    def best(self) -> Hypothesis:
        """The best text: a finished one, or where the search was cut off a beam as it is."""
        found = self.finished[:]
        for beam in () if self.done else self.beams:
            _keep(found, self._hypothesis(beam.tokens, None, beam.score), self.rules.beams)
        return max(reversed(found), key=lambda one: one.score)

    def agreed(self) -> tuple[int, ...]:
        """Tokens that all texts begin with which may still become the best."""
        texts = [one.tokens for one in self.finished]
        if self.done:
            return self.best().tokens
        texts += [beam.tokens for beam in self.beams]
        return tuple(commonprefix(texts))

    def _hypothesis(self, tokens: tuple[int, ...], end: int | None, score: float) -> Hypothesis:
        return Hypothesis(tokens, end, self._by_length(score, len(tokens) + 1))

    def _by_length(self, score: float, length: int) -> float:
        return score / float(length) ** self.rules.length_penalty

    def _is_done(self, attainable: float) -> bool:
        if len(self.finished) < self.rules.beams:
            return False
        return self.rules.early_stopping or min(x.score for x in self.finished) >= attainable


def _keep(kept: list[Hypothesis], one: Hypothesis, most: int) -> None:
    """Add a text to the best `most`; it must be better than the worst of as many."""
    if len(kept) < most:
        kept.append(one)
        return
    worst = min(range(most), key=lambda place: kept[place].score)
    if one.score > kept[worst].score:
        kept.append(one)
        del kept[worst]


def beam_scores(
    logits: Logits, how: TextSampling, seen: Sequence[int], banned: frozenset[int]
) -> Float64:
    """Log probabilities [u] of the token after a beam, as `BeamSearch.advance` takes them.

    The options change the log probabilities, not the logits, as in transformers: a repetition
    penalty above 1 makes a token that was `seen` less probable, and the others are not scaled up.
    """
    return processed(log_softmax(logits), how, seen, banned)


def place_beams(
    parents: Sequence[int], rows: Sequence[int], of: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """Rows of the KV cache for new beams, and the copies that this takes: (from row, to row).

    The first beam that continues a parent stays in the parent's row; every further one gets a row
    whose beam was given up. So does one that begins at the document: all rows that ever held a beam
    begin with it, and these are the first ones. Nothing is read after it was overwritten. parents:
    of the new beams. rows: of the beams before. of: number of rows.
    """
    placed: list[int] = []
    copies: list[tuple[int, int]] = []
    kept = {rows[parent] for parent in parents if parent != DOCUMENT}
    free = [row for row in range(of) if row not in kept]
    taken: set[int] = set()
    for parent in parents:
        if parent == DOCUMENT:
            row = free.pop(0)
        elif (row := rows[parent]) in taken:
            row = free.pop(0)
            copies.append((rows[parent], row))
        taken.add(row)
        placed.append(row)
    return placed, copies
