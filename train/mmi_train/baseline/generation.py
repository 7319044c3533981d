"""Interleaved generation as the published code runs it: the baseline of deployment.

Plain eager PyTorch. Every turn, of text or of drawing, starts from scratch: all images are encoded
again and the whole document is prefilled again. A turn of text caches the keys and values of
self-attention only: every token computes the MMFS values of all images in every layer, and so does
every denoising step, for both guidance branches.

The layers are those of the model; `published_mmfs.py` replaces MMFS by the published computation.

The rules are those of `mmi_deploy.runtime.generation.Generation`, whose work is done here: the same
document, options and seed give the same text and pictures. The solver is diffusers' own, not a
table.

Letters: t tokens, m image slots, u vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import LCMScheduler, SchedulerMixin
from torch import Tensor

from mmi_deploy.documents.document import Document
from mmi_deploy.documents.images import Rgb, to_pixels, to_rgb
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.events import Event
from mmi_deploy.runtime.generation import Generation, drive
from mmi_deploy.runtime.keyed_random import first_latents, step_noise
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.sampling import sample_rows
from mmi_deploy.runtime.sequence import TokenSequence
from mmi_deploy.runtime.timings import Timings
from mmi_deploy.runtime.work import Condition, DecodeLatents, Denoise, NextToken, Picture, Work
from mmi_deploy.spec import token_layout
from mmi_deploy.spec.graphs import Limits
from mmi_train.model.image_decoder import PreviousImages
from mmi_train.model.llama import KvCache
from mmi_train.model.mm_interleaved import EncodedImages, MMInterleaved
from mmi_train.model.samplers import next_latents


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

    Every step runs the whole U-Net, no previews are shown and no beams searched; raises
    `ConfigError` if `options.full_every` or `options.beams` is not 1, or `options.previews` not 0.

    `scheduler`: one of diffusers', with its timesteps set; `options.schedule` is ignored. `eta`: of
    a DDIM scheduler; 1 is the ancestral sampler (`diffusion.ddim`). `kv_cache` False computes the
    whole row again for every token. `limits`: those of a bundle that allows less than the model.
    """
    if options.full_every != 1:
        raise ConfigError("this path runs the whole U-Net in every step", got=options.full_every)
    if options.previews:
        raise ConfigError("this path shows no previews", got=options.previews)
    if options.beams != 1:
        raise ConfigError(
            "this path searches no beams",
            got=options.beams,
            fix="mmi_train.model.generation.search_texts does",
        )
    row = Row(model, limits)
    steps = len(scheduler.timesteps)
    worker = _Worker(row, scheduler, eta, kv_cache)
    generation = Generation(row.sequence, tokenizer, document, options, steps, row.timings)
    return drive(generation.run(), worker.do)


class Row:
    """Tokens and images of one document, without any cache."""

    def __init__(self, model: MMInterleaved, limits: Limits | None = None) -> None:
        self.model = model
        self.config = model.config
        most = Limits(self.config.llama.context, images=self.config.llm_mmfs.images - 1)
        self.sequence = TokenSequence(self.config, limits or most)
        self.timings = Timings()
        self.device = model.llm.embed_tokens.weight.device

    @property
    def token_ids(self) -> Tensor:
        """Token ids of the row, [1, t]."""
        return torch.tensor([self.sequence.token_ids], device=self.device)

    @property
    def image_slot(self) -> Tensor:
        """Index of each image among the encoded ones, [1, m]; -1 for the one about to be drawn."""
        given = self.sequence.images
        begun = max(self.sequence.token_ids.count(self.config.tokens.boi), 1)
        slots = [image if image < given else -1 for image in range(begun)]
        return torch.tensor([slots], device=self.device)

    def encode(self) -> EncodedImages:
        """Encode all images from their pixels."""
        pictures = self.sequence.pictures
        with self.timings.measure("encode", len(pictures)):
            if not pictures:
                return self.model.encode_images(None)
            pixels = np.stack([to_pixels(rgb) for rgb in pictures])
            return self.model.encode_images(torch.from_numpy(pixels).to(self.device))


class TextTurn:
    """One turn of text: prefill of the whole row, then decoding token by token."""

    def __init__(self, row: Row, kv_cache: bool) -> None:
        self.row = row
        self.images = row.encode()
        self.cache: KvCache | None = None
        if kv_cache:
            self.cache = KvCache(row.config.llama, 1, row.sequence.limits.context, row.device)

    def next_logits(self) -> np.ndarray:
        """Logits [u] of the token that follows the row."""
        row, model = self.row, self.row.model
        first = self.cache.length if self.cache else 0
        length = len(row.sequence.token_ids)
        count = length - first
        with row.timings.measure("prefill" if count > 1 else "decode", count):
            ids, slot = row.token_ids, row.image_slot
            visual = torch.from_numpy(
                token_layout.visual_index(
                    ids.cpu().numpy(),
                    row.config.tokens,
                    slot.cpu().numpy(),
                    row.config.visual_tokens,
                )
            ).to(row.device)
            hidden = model.llm(
                model.embed(ids[:, first:], self.images.tokens, visual[:, first:]),
                torch.arange(first, length, device=row.device)[None],
                cache=self.cache,
                values=model.llm.image_values(self.images.features),
                image_slot=slot.clamp(min=0),
                image_position=model.image_positions(ids, slot)[:, first:],
            )
            return model.head(hidden[0, -1]).cpu().numpy()


class Drawing:
    """A picture that is being drawn after the row's begin-of-image token."""

    def __init__(self, row: Row, picture: Picture, scheduler: SchedulerMixin, eta: float) -> None:
        self.row, self.picture, self.scheduler, self.eta = row, picture, scheduler, eta
        decoder = row.model.image_decoder
        images, ids, slot = row.encode(), row.token_ids, row.image_slot
        with row.timings.measure("prefill", ids.shape[1]):
            hidden = row.model.read(ids, images, slot)
        with row.timings.measure("condition"):
            wanted = torch.tensor([[0, picture.index]], device=row.device)
            layout = row.model.picture_layout(ids, slot, wanted)
            condition = row.model.condition(hidden, layout)
            self.previous = row.model.previous_images(images, layout)
            self.branches = decoder.config.branches
            if self.branches > 1:
                condition = torch.cat([condition, decoder.null_condition])
                self.previous = _for_both_branches(self.previous)
            self.condition = condition
        self.shape = (1, *decoder.latent_shape)
        # Resets the state that the previous picture left.
        scheduler.set_timesteps(len(scheduler.timesteps))
        first = first_latents(picture.seed, picture.index, self.shape)
        self.latents = torch.from_numpy(first).to(row.device) * scheduler.init_noise_sigma

    def denoise(self, step: int) -> None:
        """Run step `step`, from 0 on."""
        scheduler, picture, previous = self.scheduler, self.picture, self.previous
        timestep = scheduler.timesteps[step].to(self.row.device)
        with self.row.timings.measure("denoise"):
            noisy = scheduler.scale_model_input(self.latents, timestep)
            prediction, *unconditional = self.row.model.image_decoder.unet(
                noisy.repeat(self.branches, 1, 1, 1),
                timestep[None],
                self.condition,
                previous.features,
                previous.slot,
                previous.position,
            ).chunk(self.branches)
            for other in unconditional:
                prediction = other + picture.guidance * (prediction - other)
            noise: Tensor | None = None
            if self.eta or isinstance(scheduler, LCMScheduler):
                drawn = step_noise(picture.seed, picture.index, step, self.shape)
                noise = torch.from_numpy(drawn).to(self.row.device)
            self.latents = next_latents(scheduler, prediction, timestep, self.latents, noise)

    def decode_latents(self) -> Rgb:
        """Decode the picture: uint8 [height, width, 3]."""
        with self.row.timings.measure("vae"):
            pixels = self.row.model.image_decoder.vae.decode(self.latents)[0]
            return to_rgb(pixels.cpu().numpy())


def _for_both_branches(images: PreviousImages) -> PreviousImages:
    """Double the batch for both guidance branches, features included, as published."""
    count = len(images.features)
    return PreviousImages(
        images.features.repeat(2, 1, 1),
        torch.cat([images.slot, images.slot + count]),
        images.position.repeat(2, 1),
    )


class _Worker:
    """Does the work of a generation: a turn of text or a picture at a time, each from scratch."""

    def __init__(self, row: Row, scheduler: SchedulerMixin, eta: float, kv_cache: bool) -> None:
        self.row, self.scheduler, self.eta, self.kv_cache = row, scheduler, eta, kv_cache
        self.turn: TextTurn | None = None
        self.drawing: Drawing | None = None

    @torch.no_grad()
    def do(self, work: Work) -> Any:
        match work:
            case NextToken(request):
                if self.turn is None:
                    self.turn, self.drawing = TextTurn(self.row, self.kv_cache), None
                (sampled,) = sample_rows(self.turn.next_logits()[None], [request])
                return sampled
            case Condition(picture):
                self.turn, self.drawing = None, None  # before the next takes its memory
                self.drawing = Drawing(self.row, picture, self.scheduler, self.eta)
                return None
        assert self.drawing is not None, "a picture begins with its condition"
        match work:
            case Denoise(_, step):
                return self.drawing.denoise(step)
            case DecodeLatents():
                return self.drawing.decode_latents()
