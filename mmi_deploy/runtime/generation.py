"""Rules of a generation: turns of text and pictures, limits, stop texts, drawing.

Text is written in turns. A turn ends with a begin-of-image token; its picture is drawn at once and
appended like a given one.

`Generation` runs no engine: it yields events, and work that somebody does for it. `generate` drives
one generation over a `Session`; the PyTorch baseline drives it over its own layers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any, Literal

from mmi_deploy.documents.document import Document, encode_document
from mmi_deploy.documents.tokenizer import TextStream, Tokenizer
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.beam_search import BeamRules, BeamSearch, beam_scores
from mmi_deploy.runtime.events import (
    Event,
    Finished,
    ImageDone,
    ImageProgress,
    ImageStarted,
    Reason,
    TextDelta,
)
from mmi_deploy.runtime.keyed_random import text_uniform
from mmi_deploy.runtime.options import DEFAULTS, GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.sampling import Sampled, SampleRequest, never_sampled
from mmi_deploy.runtime.sequence import TokenSequence
from mmi_deploy.runtime.session import Session
from mmi_deploy.runtime.stop_text import StopText
from mmi_deploy.runtime.timings import Timings
from mmi_deploy.runtime.work import (
    BeamStep,
    Condition,
    DecodeLatents,
    Denoise,
    NextToken,
    Picture,
    Work,
)

# Events and work in order; what is sent back after work is its result.
Steps = Generator[Event | Work, Any, None]


def never() -> bool:
    """Default of `cancelled`."""
    return False


def generate(
    runtime: Runtime,
    document: Document,
    options: GenerationOptions = DEFAULTS,
    *,
    cancelled: Callable[[], bool] = never,
) -> Iterator[Event]:
    """Read `document`, drawing the pictures that it asks for, then continue it.

    Yields events as they happen; the last one is `Finished`. `cancelled` is polled before each
    token and denoising step. Raises `MmiError` if the document does not fit the model.
    """
    session = Session(runtime, options.beams)
    generation = Generation(
        session.sequence,
        runtime.tokenizer,
        document,
        options,
        runtime.denoising_steps(options),
        session.timings,
        cancelled,
    )
    return _then(drive(generation.run(), session.do), runtime.save_kernels)


def _then(events: Iterator[Event], done: Callable[[], None]) -> Iterator[Event]:
    """Yield all `events`, then call `done`."""
    yield from events
    done()


def drive(steps: Steps, do: Callable[[Work], Any]) -> Iterator[Event]:
    """Yield the events of `steps`, doing its work with `do`, which returns the result."""
    result = None
    while True:
        try:
            item = steps.send(result)
        except StopIteration:
            return
        result = None
        if isinstance(item, Work):
            result = do(item)
        else:
            yield item


def preview_steps(steps: int, previews: int) -> frozenset[int]:
    """Steps, from 1 on, after which a picture of `steps` denoising steps is shown: `previews` of
    them, evenly spread, or all but the last, which the picture itself follows."""
    parts = min(previews + 1, steps)
    return frozenset(part * steps // parts for part in range(1, parts))


class Stopped(Exception):
    """Raised into a generation, in place of a result, to end it early for `reason`."""

    def __init__(self, reason: Reason = "cancelled") -> None:
        super().__init__(reason)
        self.reason = reason


class Generation:
    """One document that is read and continued.

    rows: of the KV cache that it takes. drawable: pictures that it may draw beyond those that the
    document asks for.
    """

    writes = True  # text

    def __init__(
        self,
        sequence: TokenSequence,
        tokenizer: Tokenizer,
        document: Document,
        options: GenerationOptions,
        steps: int,
        timings: Timings,
        cancelled: Callable[[], bool] = never,
    ) -> None:
        """sequence: empty; it grows with the document. steps: denoising steps of a picture.
        timings: of the work, for the last event. Raises `MmiError` if the document or the options
        do not fit the model."""
        config, limits = sequence.config, sequence.limits
        options.sampling.check_ids(config.llama.vocab)
        if options.beams > limits.batch:
            raise ConfigError(
                "beams are more than a run of this bundle has rows",
                expected=f"at most {limits.batch}",
                got=options.beams,
                fix="ask for fewer, or export the bundle with more --rows",
            )
        self.sequence, self.options = sequence, options
        self.rows, self.drawable = options.beams, options.max_images
        self.tokenizer, self.tokens = tokenizer, config.tokens
        self.steps, self.timings, self.cancelled = steps, timings, cancelled
        self.guidance = config.image_decoder.guidance_of(options.guidance)
        self.encoded = encode_document(document, tokenizer, config, limits.context, limits.images)
        self.stream = TextStream(tokenizer)
        self.stop_text = StopText(options.stop)
        self.turn: list[int] = []  # text tokens since the last picture
        self.logprobs: list[Sampled] = []  # of tokens since the last text, if asked for
        self.written = 0  # text tokens
        self.drawn = 0  # pictures

    def run(self) -> Steps:
        """Events and work from the first to `Finished`, also after a `Stopped` is thrown in."""
        try:
            yield from self._read()
            reason = yield from self._write()
        except Stopped as stopped:
            reason = stopped.reason
        yield from self._rest_of_text()
        yield Finished(reason, self.written, self.drawn, self.timings)

    def _read(self) -> Steps:
        """Append the document; pictures that it leaves to the model are drawn at their places."""
        begun, images = 0, iter(self.encoded.images)
        ids = self.encoded.token_ids.tolist()
        for place, token in enumerate(ids):
            if token == self.tokens.boi:
                self.sequence.append_text(ids[begun:place])
                begun = place + 1 + self.sequence.config.visual_tokens
                image = next(images)
                if image is not None:
                    self.sequence.append_image(image.rgb)
                else:
                    yield from self._draw()
        self.sequence.append_text(ids[begun:])
        # Decoding depends on the text before, as for the space in front of a word.
        self.stream = TextStream(self.tokenizer, before=ids[begun:])

    def _write(self) -> Generator[Event | Work, Any, Reason]:
        """Write text and draw pictures; returns the reason to end."""
        options, sequence = self.options, self.sequence
        drawable = options.max_images
        draw_now = options.draw_first
        while True:
            if self.cancelled():
                return "cancelled"
            # The limits are checked before sampling: a token beyond them is never computed.
            if draw_now or len(self.turn) == options.turn_tokens:
                token = self.tokens.boi
            elif self.written == options.max_tokens:
                return "max_tokens"
            elif not sequence.room:
                return "context"
            elif options.beams > 1:
                end = yield from self._search()
                if end == "stop":
                    return end
                if end is None:
                    continue  # at a limit, which is found above
                token = end
            else:
                token = yield from self._next_token()
            draw_now = False
            if token in self.tokens.ends:
                return "end"
            if token == self.tokens.boi:
                if not drawable or sequence.images == sequence.limits.images:
                    return "max_images"
                if sequence.room < 1 + sequence.config.visual_tokens:
                    return "context"
                yield from self._draw()
                drawable -= 1
                if options.turn_tokens is not None and not drawable:
                    return "max_images"
                continue
            sequence.append_text([token])
            self.turn.append(token)
            if (yield from self._written(token)):
                return "stop"

    def _search(self) -> Generator[Event | Work, Any, int | Literal["stop"] | None]:
        """Write a turn by beam search; returns the token that ends it, None if a limit does, or
        that a stop text came. Text is shown as far as it is certain."""
        options, sequence, shown = self.options, self.sequence, 0
        ends = frozenset((*self.tokens.ends, self.tokens.boi))
        search = BeamSearch(
            BeamRules(options.beams, ends, options.length_penalty, options.early_stopping)
        )
        most = min(options.max_tokens - self.written, sequence.room)
        step = BeamStep()
        while not search.done and search.length < most:
            if self.cancelled():
                raise Stopped
            logits = yield step
            turns = [(*self.turn, *beam.tokens) for beam in search.beams]
            search.advance(
                [
                    beam_scores(row, options.sampling, turn, self._banned(len(turn)))
                    for row, turn in zip(logits, turns, strict=True)
                ]
            )
            step = BeamStep(search.parents, tuple(beam.tokens[-1] for beam in search.beams))
            certain = search.agreed()
            for token in certain[shown:]:
                if (yield from self._written(token)):
                    return "stop"
            shown = len(certain)
        best = search.best()
        sequence.append_text(best.tokens)
        self.turn += best.tokens
        for token in best.tokens[shown:]:
            if (yield from self._written(token)):
                return "stop"
        return best.end

    def _written(self, token: int) -> Generator[Event, None, bool]:
        """Count a token of text and show it; True if a stop text ends with it."""
        self.written += 1
        text, stopped = self.stop_text.feed(self.stream.feed(token))
        yield from self._text(text)
        return stopped

    def _banned(self, turn: int) -> frozenset[int]:
        """Ids that may not come now or ever, after `turn` tokens of the turn."""
        tokens, options = self.tokens, self.options
        banned = never_sampled(tokens)
        if turn < max(options.min_tokens, options.turn_tokens or 0):
            banned |= {*tokens.ends, tokens.boi}
        return banned

    def _next_token(self) -> Generator[Event | Work, Any, int]:
        """Sample a token."""
        tokens, options = self.tokens, self.options
        banned = self._banned(len(self.turn))
        # Keyed by the position and not drawn from a stream: the text repeats whatever came before.
        uniform = text_uniform(options.seed, len(self.sequence.token_ids))
        request = SampleRequest(options.sampling, uniform, self.turn, banned)
        sampled: Sampled = yield NextToken(request)
        if options.logprobs is not None and sampled.token not in {*tokens.ends, tokens.boi}:
            self.logprobs.append(sampled)
        return sampled.token

    def _draw(self) -> Steps:
        """Append a begin-of-image token, draw its picture and append it; a new turn begins."""
        yield from self._rest_of_text()  # before the picture: it belongs in front of it
        options, index = self.options, self.sequence.images
        self.sequence.append_text([self.tokens.boi])
        yield ImageStarted(index, self.steps)
        picture = Picture(index, options.schedule, self.guidance, options.seed, options.full_every)
        shown = preview_steps(self.steps, options.previews)
        for step in range(self.steps):
            self._check_cancelled()
            if step == 0:
                yield Condition(picture)
            preview = yield Denoise(picture, step, step + 1 in shown)
            yield ImageProgress(index, step + 1, self.steps, preview)
        self._check_cancelled()
        rgb = yield DecodeLatents(picture)
        self.sequence.append_image(rgb)
        self.drawn += 1
        self.turn = []
        yield ImageDone(index, rgb)

    def _check_cancelled(self) -> None:
        if self.cancelled():
            raise Stopped

    def _rest_of_text(self) -> Iterator[Event]:
        """Flush the text that the decoder and the stop texts hold back."""
        text, _ = self.stop_text.feed(self.stream.rest())
        yield from self._text(text + self.stop_text.rest())

    def _text(self, text: str) -> Iterator[Event]:
        if text:
            logprobs, self.logprobs = tuple(self.logprobs), []
            yield TextDelta(text, logprobs, self.written)
