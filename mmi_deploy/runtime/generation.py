"""Autoregressive generation: read a document, then write text and draw pictures until the end.

Text is written in turns. A turn ends with a begin-of-image token; its picture is drawn at once and
appended like a given one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

from mmi_deploy.documents.document import Document, encode_document
from mmi_deploy.documents.tokenizer import TextStream
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
from mmi_deploy.runtime.sampling import Sampled, SampleRequest, never_sampled, sample_rows
from mmi_deploy.runtime.session import Session
from mmi_deploy.runtime.stop_text import StopText


def generate(
    runtime: Runtime,
    document: Document,
    options: GenerationOptions = DEFAULTS,
    *,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Read `document`, drawing the pictures that it asks for, then continue it.

    Yields events as they happen; the last one is `Finished`. `cancelled` is polled before each
    token and denoising step. Raises `MmiError` if the document does not fit the model.
    """
    return _Generation(runtime, document, options, cancelled).run()


class _Cancelled(Exception):
    """Raised to abandon a picture that is being drawn."""


class _Generation:
    """State of one `generate` call."""

    def __init__(
        self,
        runtime: Runtime,
        document: Document,
        options: GenerationOptions,
        cancelled: Callable[[], bool],
    ) -> None:
        self.options = options
        self.cancelled = cancelled
        self.session = Session(runtime)
        self.tokens = runtime.config.tokens
        self.steps = runtime.schedule(options.schedule).schedule.steps
        options.sampling.check_ids(runtime.config.llama.vocab)
        limits = runtime.limits
        self.encoded = encode_document(
            document, runtime.tokenizer, runtime.config, limits.context, limits.images
        )
        self.stream = TextStream(runtime.tokenizer)
        self.stop_text = StopText(options.stop)
        self.turn: list[int] = []  # text tokens since the last picture
        self.logprobs: list[Sampled] = []  # of tokens since the last text, if asked for
        self.written = 0  # text tokens
        self.drawn = 0  # pictures

    def run(self) -> Iterator[Event]:
        try:
            yield from self._read()
            reason = yield from self._write()
            yield from self._rest_of_text()
        except _Cancelled:
            reason = "cancelled"
        yield Finished(reason, self.written, self.drawn, self.session.timings)

    def _read(self) -> Iterator[Event]:
        """Append the document; pictures that it leaves to the model are drawn at their places."""
        begun, images = 0, iter(self.encoded.images)
        ids = self.encoded.token_ids.tolist()
        for place, token in enumerate(ids):
            if token == self.tokens.boi:
                self.session.append_text(ids[begun:place])
                begun = place + 1 + self.session.config.visual_tokens
                image = next(images)
                if image is not None:
                    self.session.append_image(image.rgb)
                else:
                    yield from self._draw()
        self.session.append_text(ids[begun:])
        # Decoding depends on the text before, as for the space in front of a word.
        self.stream = TextStream(self.session.runtime.tokenizer, before=ids[begun:])

    def _write(self) -> Generator[Event, None, Reason]:
        """Write text and draw pictures; returns the reason to end."""
        options, session = self.options, self.session
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
            elif not session.room:
                return "context"
            else:
                token = self._next_token()
            draw_now = False
            if token in self.tokens.ends:
                return "end"
            if token == self.tokens.boi:
                if not drawable or session.images == session.limits.images:
                    return "max_images"
                if session.room < 1 + session.config.visual_tokens:
                    return "context"
                yield from self._draw()
                drawable -= 1
                if options.turn_tokens is not None and not drawable:
                    return "max_images"
                continue
            session.append_text([token])
            self.turn.append(token)
            self.written += 1
            text, stopped = self.stop_text.feed(self.stream.feed(token))
            yield from self._text(text)
            if stopped:
                return "stop"

    def _next_token(self) -> int:
        """Sample a token, with those banned that may not come now or ever."""
        tokens, options = self.tokens, self.options
        banned = never_sampled(tokens)
        if len(self.turn) < max(options.min_tokens, options.turn_tokens or 0):
            banned |= {*tokens.ends, tokens.boi}
        # Keyed by the position and not drawn from a stream: the text repeats whatever came before.
        uniform = text_uniform(options.seed, len(self.session.token_ids))
        request = SampleRequest(options.sampling, uniform, self.turn, banned)
        (sampled,) = sample_rows(self.session.next_logits()[None], [request])
        if options.logprobs is not None and sampled.token not in {*tokens.ends, tokens.boi}:
            self.logprobs.append(sampled)
        return sampled.token

    def _draw(self) -> Iterator[Event]:
        """Append a begin-of-image token, draw its picture and append it; a new turn begins."""
        yield from self._rest_of_text()  # before the picture: it belongs in front of it
        session, index = self.session, self.session.images
        session.append_text([self.tokens.boi])
        yield ImageStarted(index, self.steps)
        drawing = session.draw_steps(
            self.options.schedule,
            self.options.guidance,
            self.options.seed,
            self.options.full_every,
        )
        while True:
            if self.cancelled():
                raise _Cancelled
            try:
                yield ImageProgress(index, *next(drawing))
            except StopIteration as stop:
                rgb = stop.value
                break
        session.append_image(rgb)
        self.drawn += 1
        self.turn = []
        yield ImageDone(index, rgb)

    def _rest_of_text(self) -> Iterator[Event]:
        """Flush the text that the decoder and the stop texts hold back."""
        text, _ = self.stop_text.feed(self.stream.rest())
        yield from self._text(text + self.stop_text.rest())

    def _text(self, text: str) -> Iterator[Event]:
        if text:
            logprobs, self.logprobs = tuple(self.logprobs), []
            yield TextDelta(text, logprobs)
