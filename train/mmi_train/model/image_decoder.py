"""Image decoder: hidden states of the language model to a picture (paper Sec. 3.3).

Context tokens, backwards from the picture's begin-of-image token, are projected, given a position
embedding by their distance and resampled to the U-Net's condition tokens. The U-Net also attends to
earlier images through MMFS. A frozen autoencoder turns latents into pixels.

Letters: b batch, x context tokens, y condition tokens, n encoded images, s feature cells,
m image slots, z latent channels, c channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn
from torch.nn import functional as F

from mmi_deploy.spec.config import ModelConfig
from mmi_train.model.autocast import without_autocast
from mmi_train.model.diffusion import Diffusion
from mmi_train.model.positions import table_1d
from mmi_train.model.resampler import Resampler
from mmi_train.model.samplers import next_latents
from mmi_train.model.unet import UNet
from mmi_train.model.vae import Posterior, Vae

# Probability that training replaces a picture's condition by the null condition (Sec. 4.1).
CONDITION_DROP = 0.1

# Pictures that the autoencoder encodes at once, whose feature maps are the largest of all.
ENCODED_AT_ONCE = 32


@dataclass(frozen=True)
class PreviousImages:
    """Images that the U-Net attends to: features [n, s, c] of all levels, `slot` [b, m] (row of
    `features`) and `position` [b, m] (0 hidden, 1 the image before). `seeing`: numbers of the
    pictures that see any; None: MMFS runs on all."""

    features: Tensor
    slot: Tensor
    position: Tensor
    seeing: Tensor | None = None

    def repeated(self, times: int) -> PreviousImages:
        """All pictures `times` times, one block after another; features are shared."""
        seeing = self.seeing
        if seeing is not None:
            offsets = torch.arange(times, device=seeing.device)[:, None] * len(self.slot)
            seeing = (seeing + offsets).flatten()
        slot, position = self.slot.repeat(times, 1), self.position.repeat(times, 1)
        return PreviousImages(self.features, slot, position, seeing)


@dataclass(frozen=True)
class RandomDraws:
    """Random numbers of one training step, a row for each picture.

    `drop` [b], uniform in [0, 1): below `CONDITION_DROP` the condition is dropped. `posterior` and
    `noise` [b, z, side, side]: normal. `timestep` [b], uniform.
    """

    drop: Tensor
    posterior: Tensor
    noise: Tensor
    timestep: Tensor

    def __getitem__(self, pictures: Tensor) -> RandomDraws:
        """Select pictures by a bool or index tensor."""
        return RandomDraws(*(getattr(self, field.name)[pictures] for field in fields(self)))


@dataclass(frozen=True)
class DenoisingStep:
    """Results of one step of `ImageDecoder.draw`: the guided prediction, the next latents, and the
    deep features [2b, c, side, side], computed or reused."""

    timestep: int
    prediction: Tensor
    latents: Tensor
    deep: Tensor


class ImageDecoder(nn.Module):
    """Context resampler, U-Net with MMFS, diffusion and autoencoder."""

    context_positions: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.image_decoder
        resampler, unet = self.config.resampler, self.config.unet
        width = config.llama.width
        positions = table_1d(config.llama.context, width)
        self.context_proj = nn.Linear(width, width)
        start = positions[: resampler.queries] if resampler.form == "perceiver" else None
        self.resampler = Resampler(resampler, start)
        self.null_condition = nn.Parameter(torch.zeros(1, resampler.queries, resampler.width))
        self.unet = UNet(unet, self.config.mmfs, config.vision.width, config.vision.level_sides)
        self.vae = Vae(self.config.vae)
        self.diffusion = Diffusion(self.config.diffusion)
        self.register_buffer("context_positions", positions, persistent=False)  # [x, c]
        nn.init.normal_(self.null_condition, std=0.02)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one picture's latents: [z, side, side]."""
        unet = self.config.unet
        return (unet.latent_channels, unet.latent_side, unet.latent_side)

    def condition(self, context: Tensor, length: Tensor) -> Tensor:
        """Hidden states [b, x, c], the begin-of-image token first, then backwards, padding from
        `length` [b] on -> condition tokens [b, y, c]."""
        columns = context.shape[1]
        real = torch.arange(columns, device=context.device) < length[:, None]  # [b, x]
        context = self.context_proj(context) + self.context_positions[:columns]  # [b, x, c]
        return self.resampler(context, real)

    def random_draws(self, pictures: int, generator: torch.Generator | None = None) -> RandomDraws:
        """Draw on the CPU, so that a seed gives the same numbers on every device."""
        shape, device = (pictures, *self.latent_shape), self.null_condition.device
        steps = self.config.diffusion.steps
        made = (
            torch.rand(pictures, generator=generator),
            torch.randn(shape, generator=generator),
            torch.randn(shape, generator=generator),
            torch.randint(steps, (pictures,), generator=generator),
        )
        return RandomDraws(*(draw.to(device) for draw in made))

    def encode(self, pixels: Tensor) -> Posterior:
        """Encode pictures [b, 3, side, side] in [0, 1] in float32, as published, a few at a time;
        the autoencoder is frozen: no gradient."""
        with torch.no_grad(), without_autocast(pixels.device):
            parts = [self.vae.encode(part) for part in pixels.float().split(ENCODED_AT_ONCE)]
        return Posterior(*map(torch.cat, zip(*parts, strict=True)))

    def losses(
        self, posterior: Posterior, condition: Tensor, images: PreviousImages, draws: RandomDraws
    ) -> Tensor:
        """Mean squared error of the prediction for each picture, [b] in fp32 (Sec. 3.3, Eq. 5),
        weighted by its timestep if the configuration says so.

        Where `draws.drop` is below `CONDITION_DROP`, the null condition replaces the condition; the
        previous images stay.
        """
        latents = self.vae.latents(posterior, draws.posterior)
        noisy = self.diffusion.add_noise(latents, draws.noise, draws.timestep)
        drop = (draws.drop < CONDITION_DROP)[:, None, None]
        condition = torch.where(drop, self.null_condition.to(condition.dtype), condition)
        prediction = self.unet(
            noisy,
            draws.timestep,
            condition,
            images.features,
            images.slot,
            images.position,
            images.seeing,
        )
        target = self.diffusion.target(latents, draws.noise, draws.timestep)
        error = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
        weight = self.diffusion.loss_weight(draws.timestep)
        return error if weight is None else error * weight

    @torch.no_grad()
    def draw(
        self,
        condition: Tensor,
        images: PreviousImages,
        latents: Tensor,
        scheduler: SchedulerMixin,
        *,
        guidance: float | None,
        full_every: int = 1,
        step_noise: Sequence[Tensor] | None = None,
        on_step: Callable[[DenoisingStep], None] | None = None,
    ) -> Tensor:
        """Denoise initial noise `latents` [b, z, side, side] to latents of pictures.

        `scheduler`: one of diffusers', with its timesteps set. `step_noise`: noise added after each
        step, which makes a DDIM scheduler the ancestral sampler (`diffusion.ddim`), and which a
        consistency sampler (`consistency.lcm`) needs; None: no noise.
        `guidance`: scale of classifier-free guidance, relative to the null condition; both branches
        see the same images. A distilled U-Net has one branch, and its own guidance alone.
        `full_every` N: only every Nth step runs the whole U-Net; the others reuse its deep features
        (DeepCache), an approximation.
        """
        pictures, branches = len(latents), self.config.branches
        guidance = self.config.guidance_of(guidance)
        if branches > 1:
            null = self.null_condition.to(condition.dtype).expand(pictures, -1, -1)
            condition = torch.cat([condition, null])  # [2b, y, c]
        keys_values = self.unet.condition_keys_values(condition)
        values = self.unet.image_values(images.features)
        slot, position = images.slot.repeat(branches, 1), images.position.repeat(branches, 1)
        unet = self.config.unet
        outer_keys_values = [keys_values[index] for index in unet.outer_cross_attentions]
        outer_values = [values[index] for index in unet.outer_mmfs_blocks]
        latents = latents * scheduler.init_noise_sigma
        for index, timestep in enumerate(scheduler.timesteps):
            # [2b, z, side, side]
            noisy = scheduler.scale_model_input(latents, timestep).repeat(branches, 1, 1, 1)
            time_rows = self.unet.time_rows(timestep[None].to(latents.device))
            if index % full_every == 0:
                rows, deep = self.unet.step_and_deep(
                    noisy, time_rows, keys_values, values, slot, position
                )
            else:
                rows = self.unet.shallow_step(
                    noisy, deep, time_rows, outer_keys_values, outer_values, slot, position
                )
            conditional, *unconditional = rows.float().chunk(branches)
            prediction = conditional
            for other in unconditional:
                prediction = other + guidance * (conditional - other)
            noise = None if step_noise is None else step_noise[index]
            latents = next_latents(scheduler, prediction, timestep, latents, noise)
            if on_step is not None:
                on_step(DenoisingStep(int(timestep), prediction, latents, deep))
        return latents
