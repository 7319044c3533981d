"""Interleaved generation as the published code runs it: the baseline of deployment.

Plain eager PyTorch. Every turn, of text or of drawing, starts from scratch: all images are encoded
again and the whole document is prefilled again. A turn of text caches the keys and values of
self-attention only: every token computes the MMFS values of all images in every layer, and so does
every denoising step, for both guidance branches.

The layers are those of the model; `published_mmfs.py` replaces MMFS by the published computation.

The rules are those of `mmi_deploy.runtime.generation`, implemented independently: the same
document, options and seed give the same text and pictures. The solver is diffusers' own, not a
table.

Letters: t tokens, m image slots, u vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import numpy as np
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from mmi_deploy.documents.document import Document, encode_document
from mmi_deploy.documents.images import Rgb, resize, to_pixels, to_rgb
from mmi_deploy.documents.tokenizer import TextStream, Tokenizer
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.events import (
    Event,
    Finished,
    ImageDone,
    ImageProgress,
    ImageStarted,
    Reason,
    TextDelta,
)
from mmi_deploy.runtime.keyed_random import first_latents, step_noise, text_uniform
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.sampling import never_sampled, sample
from mmi_deploy.runtime.stop_text import StopText
from mmi_deploy.runtime.timings import Timings
from mmi_deploy.spec import token_layout
from mmi_deploy.spec.graphs import Limits
from mmi_train.model.image_decoder import PreviousImages
from mmi_train.model.llama import KvCache
from mmi_train.model.mm_interleaved import EncodedImages, MMInterleaved


def generate(
    model: MMInterleaved,
    tokenizer: Tokenizer,
    document: Document,
    options: GenerationOptions,
    scheduler: SchedulerMixin,
    *,
    eta: float = 0.0,
    kv_cache: bool = True,
    limits: Limits | None = None,
) -> Iterator[Event]:
    """Read `document`, draw the pictures that it asks for, then continue it; ends with `Finished`.

    Every step runs the whole U-Net; raises `ConfigError` if `options.full_every` is not 1.

    `scheduler`: one of diffusers', with its timesteps set; `options.schedule` is ignored. `eta`: of
    a DDIM scheduler; 1 is the ancestral sampler (`diffusion.ddim`). `kv_cache` False computes the
    whole row again for every token. `limits`: those of a bundle that allows less than the model.
    """
    if options.full_every != 1:
        raise ConfigError("this path runs the whole U-Net in every step", got=options.full_every)
    return _Generation(
        Row(model, limits), tokenizer, document, options, scheduler, eta, kv_cache
    ).run()


class Row:
    """Tokens and images of one document, without any cache."""

    def __init__(self, model: MMInterleaved, limits: Limits | None = None) -> None:
        self.model = model
        self.config = model.config
        self.context = limits.context if limits else self.config.llama.context
        self.most_images = limits.images if limits else self.config.llm_mmfs.images - 1
        self.ids: list[int] = []
        self.images: list[Rgb] = []
        self.timings = Timings()

    @property
    def room(self) -> int:
        """Number of tokens that still fit into the context."""
        return self.context - len(self.ids)

    def add_image(self, rgb: Rgb) -> None:
        """Append an image and its visual tokens; the row ends with its begin-of-image token."""
        side = self.config.vision.image_size
        self.ids += [self.config.tokens.image] * self.config.visual_tokens
        self.images.append(rgb if rgb.shape == (side, side, 3) else resize(rgb, side))

    @property
    def token_ids(self) -> Tensor:
        """Token ids of the row, [1, t]."""
        return torch.tensor([self.ids])

    @property
    def image_slot(self) -> Tensor:
        """Index of each image among the encoded ones, [1, m]; -1 for the one about to be drawn."""
        begun = max(self.ids.count(self.config.tokens.boi), 1)
        slots = [image if image < len(self.images) else -1 for image in range(begun)]
        return torch.tensor([slots])

    def encode(self) -> EncodedImages:
        """Encode all images from their pixels."""
        with self.timings.measure("encode", len(self.images)):
            if not self.images:
                return self.model.encode_images(None)
            pixels = np.stack([to_pixels(rgb) for rgb in self.images])
            return self.model.encode_images(torch.from_numpy(pixels))


class TextTurn:
    """One turn of text: prefill of the whole row, then decoding token by token."""

    def __init__(self, row: Row, kv_cache: bool) -> None:
        self.row = row
        self.images = row.encode()
        self.cache = KvCache(row.config.llama, 1, row.context) if kv_cache else None

    def next_logits(self) -> np.ndarray:
        """Logits [u] of the token that follows the row."""
        row, model = self.row, self.row.model
        first = self.cache.length if self.cache else 0
        count = len(row.ids) - first
        with row.timings.measure("prefill" if count > 1 else "decode", count):
            ids, slot = row.token_ids, row.image_slot
            visual = token_layout.visual_index(
                ids.numpy(), row.config.tokens, slot.numpy(), row.config.visual_tokens
            )
            hidden = model.llm(
                model.embed(
                    ids[:, first:], self.images.tokens, torch.from_numpy(visual[:, first:])
                ),
                torch.arange(first, len(row.ids))[None],
                cache=self.cache,
                values=model.llm.image_values(self.images.features),
                image_slot=slot.clamp(min=0),
                image_position=model.image_positions(ids, slot)[:, first:],
            )
            return model.head(hidden[0, -1]).numpy()


def draw(
    row: Row, scheduler: SchedulerMixin, eta: float, guidance: float, seed: int
) -> Generator[tuple[int, int], None, Rgb]:
    """Draw the picture of the row's last begin-of-image token.

    Yields (step, number of steps) after each step and returns uint8 [height, width, 3]; the row is
    unchanged."""
    decoder, picture = row.model.image_decoder, len(row.images)
    images, ids, slot = row.encode(), row.token_ids, row.image_slot
    with row.timings.measure("prefill", len(row.ids)):
        hidden = row.model.read(ids, images, slot)
    with row.timings.measure("condition"):
        wanted = torch.tensor([[0, picture]])
        condition = row.model.condition(hidden, ids, wanted)
        both = torch.cat([condition, decoder.null_condition])
        previous = _for_both_branches(row.model.previous_images(images, ids, slot, wanted))
    shape = (1, *decoder.latent_shape)
    steps = len(scheduler.timesteps)
    scheduler.set_timesteps(steps)  # resets the state that the previous picture left
    latents = torch.from_numpy(first_latents(seed, picture, shape)) * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps):
        with row.timings.measure("denoise"):
            conditional, unconditional = decoder.unet(
                scheduler.scale_model_input(latents, timestep).repeat(2, 1, 1, 1),
                timestep[None],
                both,
                previous.features,
                previous.slot,
                previous.position,
            ).chunk(2)
            prediction = unconditional + guidance * (conditional - unconditional)
            noise = {}
            if eta:
                drawn = torch.from_numpy(step_noise(seed, picture, step, shape))
                noise = {"eta": eta, "variance_noise": drawn}
            latents = scheduler.step(prediction, timestep, latents, **noise).prev_sample
        yield step + 1, steps
    with row.timings.measure("vae"):
        return to_rgb(decoder.vae.decode(latents)[0].numpy())


def _for_both_branches(images: PreviousImages) -> PreviousImages:
    """Double the batch for both guidance branches, features included, as published."""
    count = len(images.features)
    return PreviousImages(
        images.features.repeat(2, 1, 1),
        torch.cat([images.slot, images.slot + count]),
        images.position.repeat(2, 1),
    )


class _Generation:
    """State of one call of `generate`."""

    def __init__(
        self,
        row: Row,
        tokenizer: Tokenizer,
        document: Document,
        options: GenerationOptions,
        scheduler: SchedulerMixin,
        eta: float,
        kv_cache: bool,
    ) -> None:
        self.options = options
        self.scheduler, self.eta, self.kv_cache = scheduler, eta, kv_cache
        self.row, self.tokens = row, row.config.tokens
        self.encoded = encode_document(
            document, tokenizer, row.config, row.context, row.most_images
        )
        self.tokenizer, self.stream = tokenizer, TextStream(tokenizer)
        self.stop_text = StopText(options.stop)
        self.turn: TextTurn | None = None
        self.turn_ids: list[int] = []
        self.written = 0
        self.drawn = 0

    def run(self) -> Iterator[Event]:
        """All events, each computed without gradients and yielded outside of `torch.no_grad`."""
        events = self._events()
        while True:
            with torch.no_grad():
                try:
                    event = next(events)
                except StopIteration:
                    return
            yield event

    def _events(self) -> Iterator[Event]:
        yield from self._read()
        reason = yield from self._continue()
        yield from self._held_text()
        yield Finished(reason, self.written, self.drawn, self.row.timings)

    def _read(self) -> Iterator[Event]:
        """Append the given document; pictures that it leaves to the model are drawn in place."""
        images = iter(self.encoded.images)
        text: list[int] = []  # tokens after the last picture
        for token in self.encoded.token_ids.tolist():
            if token == self.tokens.image:
                continue
            self.row.ids.append(token)
            text.append(token)
            if token == self.tokens.boi:
                image, text = next(images), []
                if image is None:
                    yield from self._picture()
                else:
                    self.row.add_image(image.rgb)
        self.stream = TextStream(self.tokenizer, before=text)

    def _continue(self) -> Generator[Event, None, Reason]:
        """Alternate turns of text and of drawing; returns the reason to stop."""
        options, pictures = self.options, 0
        begin = options.draw_first
        while True:
            if not begin:
                reason = yield from self._text_turn()
                if reason is not None:
                    return reason
            begin = False
            if pictures == options.max_images or len(self.row.images) == self.row.most_images:
                return "max_images"
            if self.row.room < 1 + self.row.config.visual_tokens:
                return "context"
            yield from self._held_text()
            self.row.ids.append(self.tokens.boi)
            yield from self._picture()
            pictures += 1
            if options.turn_tokens is not None and pictures == options.max_images:
                return "max_images"

    def _text_turn(self) -> Generator[Event, None, Reason | None]:
        """Generate text up to a begin-of-image token, which is not appended (returns None), or up
        to the end of the generation (returns the reason)."""
        options = self.options
        while len(self.turn_ids) != options.turn_tokens:
            if self.written == options.max_tokens:
                return "max_tokens"
            if not self.row.room:
                return "context"
            token = self._sample()
            if token in self.tokens.ends:
                return "end"
            if token == self.tokens.boi:
                return None
            self.row.ids.append(token)
            self.turn_ids.append(token)
            self.written += 1
            text, stopped = self.stop_text.feed(self.stream.feed(token))
            if text:
                yield TextDelta(text)
            if stopped:
                return "stop"
        return None

    def _sample(self) -> int:
        tokens, options = self.tokens, self.options
        banned = never_sampled(tokens)
        if len(self.turn_ids) < max(options.min_tokens, options.turn_tokens or 0):
            banned |= {*tokens.ends, tokens.boi}
        if self.turn is None:
            self.turn = TextTurn(self.row, self.kv_cache)
        uniform = text_uniform(options.seed, len(self.row.ids))
        logits = self.turn.next_logits()
        return sample(logits, options.sampling, uniform, seen=self.turn_ids, banned=banned)

    def _picture(self) -> Iterator[Event]:
        """Draw after the begin-of-image token that ends the row, then start a new turn."""
        index, options = len(self.row.images), self.options
        yield ImageStarted(index, len(self.scheduler.timesteps))
        drawing = draw(self.row, self.scheduler, self.eta, options.guidance, options.seed)
        while True:
            try:
                yield ImageProgress(index, *next(drawing))
            except StopIteration as stop:
                rgb = stop.value
                break
        self.row.add_image(rgb)
        self.turn, self.turn_ids = None, []
        self.drawn += 1
        yield ImageDone(index, rgb)

    def _held_text(self) -> Iterator[Event]:
        """Flush the text that the token stream and the stop rule have held back."""
        text = self.stop_text.feed(self.stream.rest())[0] + self.stop_text.rest()
        if text:
            yield TextDelta(text)
