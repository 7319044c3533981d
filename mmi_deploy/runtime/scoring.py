"""Scores of given texts: how probable each of them is after a document.

`Scoring` runs no engine: it yields work, as `Generation` does. `score` drives one over a `Session`,
the batch engine many at once. All texts share the document's KV cache, each in a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmi_deploy.documents.document import Document, encode_document
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import DocumentError
from mmi_deploy.runtime.events import Finished, Reason
from mmi_deploy.runtime.generation import Steps, Stopped, drive, never
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.sampling import log_softmax
from mmi_deploy.runtime.sequence import TokenSequence
from mmi_deploy.runtime.session import Session
from mmi_deploy.runtime.timings import Timings
from mmi_deploy.runtime.work import DOCUMENT, BeamStep


@dataclass(frozen=True)
class Score:
    """logprob: natural logarithm of the probability of a text, all its tokens together. tokens:
    their number."""

    logprob: float
    tokens: int


class Scoring:
    """One document whose continuations are scored.

    rows: of the KV cache that it takes. scores: of the continuations, once all are known.
    """

    writes = False  # no text
    drawable = 0  # pictures

    def __init__(
        self,
        sequence: TokenSequence,
        tokenizer: Tokenizer,
        document: Document,
        continuations: Sequence[str],
        rows: int,
        timings: Timings,
        cancelled: Callable[[], bool] = never,
    ) -> None:
        """sequence: empty; it gets the document. rows: at most. Raises `DocumentError` for a
        document with a place to draw, and for continuations that do not fit the model or have no
        token."""
        config, limits = sequence.config, sequence.limits
        self.sequence, self.timings, self.cancelled = sequence, timings, cancelled
        self.encoded = encode_document(document, tokenizer, config, limits.context, limits.images)
        if any(image is None for image in self.encoded.images):
            raise DocumentError(
                "a document with a picture to draw cannot be scored", fix="draw it first"
            )
        self._texts = [tokenizer.encode(text) for text in continuations]
        lengths = [len(text) for text in self._texts]
        if min(lengths, default=1) == 0:
            raise DocumentError("a continuation without a token has no score")
        room = limits.context - len(self.encoded.token_ids)
        if max(lengths, default=0) > room:
            raise DocumentError(
                "a continuation does not fit into the context",
                expected=f"at most {room} tokens",
                got=max(lengths),
            )
        # Of a continuation of one token nothing is left to compute after the document.
        self.rows = max(min(rows, sum(length > 1 for length in lengths)), 1)
        self.scores: list[Score] = []

    def run(self) -> Steps:
        """Work, and `Finished` at last, also after a `Stopped` is thrown in."""
        reason: Reason = "end"
        try:
            self._read()
            yield from self._score()
        except Stopped as stopped:
            reason = stopped.reason
        yield Finished(reason, 0, 0, self.timings)

    def _read(self) -> None:
        tokens, images = self.sequence.config.tokens, iter(self.encoded.images)
        words: list[int] = []
        for token in self.encoded.token_ids.tolist():
            if token == tokens.boi:
                self.sequence.append_text(words)
                words, image = [], next(images)
                assert image is not None, "documents with a place to draw are refused"
                self.sequence.append_image(image.rgb)
            elif token != tokens.image:
                words.append(token)
        self.sequence.append_text(words)

    def _score(self) -> Steps:
        """Score the continuations, as many at once as there are rows, the longest first; a row that
        is through takes the next one."""
        texts = self._texts
        if not texts:
            return
        (logits,) = yield BeamStep()
        after = log_softmax(logits)
        found = [[float(after[text[0]])] for text in texts]
        left = [number for number, text in enumerate(texts) if len(text) > 1]
        left.sort(key=lambda number: len(texts[number]))
        taken: list[int] = []  # continuation of each row
        parents: list[int] = []
        first = True
        while left or taken:
            if self.cancelled():
                raise Stopped
            while left and len(taken) < self.rows:
                taken.append(left.pop())
                parents.append(0 if first else DOCUMENT)
            first = False
            tokens = tuple(texts[number][len(found[number]) - 1] for number in taken)
            logits = yield BeamStep(tuple(parents), tokens)
            for number, row in zip(taken, logits, strict=True):
                found[number].append(float(log_softmax(row)[texts[number][len(found[number])]]))
            parents = [
                place
                for place, number in enumerate(taken)
                if len(found[number]) < len(texts[number])
            ]
            taken = [taken[place] for place in parents]
        self.scores = [Score(sum(known), len(known)) for known in found]


def score(runtime: Runtime, document: Document, continuations: Sequence[str]) -> list[Score]:
    """Score each of `continuations` as the text that follows `document`.

    The document is read once, its images too; the continuations share decode runs, as many at once
    as these have rows. Each is encoded on its own: with LLaMA's tokenizer `yes` is a word of its
    own. Raises `DocumentError` for a document with a place to draw, and for texts that do not fit
    the model or have no token.
    """
    rows = max(min(len(continuations), runtime.limits.batch), 1)
    session = Session(runtime, rows)
    scoring = Scoring(
        session.sequence, runtime.tokenizer, document, continuations, rows, session.timings
    )
    for _ in drive(scoring.run(), session.do):
        pass
    return scoring.scores
