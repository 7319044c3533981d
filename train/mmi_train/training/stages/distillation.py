"""Distillation stage: a U-Net learns to draw in one branch, or in a few steps.

The documents and all that is computed from them, apart from the U-Net, are those of another stage;
encoder, language model, resampler and MMFS are frozen and shared with the teacher.

Letters: b batch, y condition tokens, z latent channels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated
from torch import Tensor, nn
from torch.func import functional_call

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import DistillationConfig, ImageDecoderConfig, ModelConfig
from mmi_deploy.spec.config import to_json as config_json
from mmi_train.model.consistency import consistency, pseudo_huber, solver_step, solver_timesteps
from mmi_train.model.image_decoder import PreviousImages
from mmi_train.model.mm_interleaved import Batch, MMInterleaved
from mmi_train.model.unet import UNet

# Before the U-Net's own names in a model.
UNET = "image_decoder.unet."


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Distillation:
    """Settings of a distillation. `guidance`: scale that is folded in; None: the teacher's own, or
    the published one. `solver_steps`: timesteps of a consistency model. `huber`: width of its loss.
    `draws`: noise levels at which each picture is trained in a micro-batch."""

    kind: Literal["guidance", "lcm"]
    guidance: float | None = Field(default=None, ge=0, le=100)
    solver_steps: int = Field(default=50, ge=2, le=1000)
    huber: float = Field(default=0.001, gt=0)
    draws: int = Field(default=4, ge=1)

    def config_of(self, teacher: ImageDecoderConfig) -> DistillationConfig:
        """Distillation as the configuration of a student of `teacher` holds it. Raises
        `ConfigError` for a teacher that cannot have such a student."""
        own = teacher.distillation
        if own is not None and (own.kind == "lcm" or self.kind == "guidance"):
            raise ConfigError(
                f"the teacher is distilled itself: {own.kind}",
                expected="a model as trained, or for lcm one with distilled guidance",
                fix="give the model that it was distilled from",
            )
        guidance = teacher.guidance_of(self.guidance)
        steps = self.solver_steps if self.kind == "lcm" else None
        if steps is not None and steps > teacher.diffusion.steps:
            raise ConfigError(
                f"{steps} solver steps are more than the model's training steps",
                expected=f"at most {teacher.diffusion.steps}",
            )
        return DistillationConfig(self.kind, guidance, steps)


def distilled_config(config: ModelConfig, distillation: DistillationConfig) -> ModelConfig:
    """The configuration of a model whose U-Net is distilled."""
    return replace(config, image_decoder=replace(config.image_decoder, distillation=distillation))


class PictureSource(Protocol):
    """Stage that makes micro-batches of documents with pictures to draw."""

    model: MMInterleaved

    def batch(self, index: int, rng: np.random.Generator) -> Any:
        """Micro-batch `index` of the run."""

    def describe(self) -> Mapping[str, object]:
        """Settings that decide the micro-batches."""


@dataclass(frozen=True)
class _Rows:
    """Frozen inputs of b rows, one for each picture and noise level: latents [b, z, side, side],
    condition [b, y, width], image values of every MMFS block, and who sees which images."""

    latents: Tensor
    condition: Tensor
    values: list[Tensor]
    images: PreviousImages


class _Prediction(nn.Module):
    """The U-Net on image values that are computed before, as a call whose weights can be
    replaced."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, noisy: Tensor, timestep: Tensor, rows: _Rows) -> Tensor:
        """Prediction [b, z, side, side] for noisy latents at timesteps [b]."""
        unet, images = self.unet, rows.images
        return unet.step(
            noisy,
            unet.time_rows(timestep),
            unet.condition_keys_values(rows.condition),
            rows.values,
            images.slot,
            images.position,
            images.seeing,
        )


def teacher_of(unet: UNet) -> UNet:
    """Frozen copy of a U-Net that shares its MMFS blocks; made before the first step, while new
    adapters add nothing."""
    shared = unet.look_back
    copied = copy.deepcopy(unet, {id(shared): shared})
    for name, parameter in copied.named_parameters():
        if not name.startswith("look_back."):
            parameter.requires_grad_(False)
    return copied


class DistillationStage:
    """Losses of a student, the U-Net of `source.model`, against a frozen `teacher`.

    `teacher_branches`: 2 for a teacher that needs classifier-free guidance. The consistency loss
    takes its target from the average (EMA) of the weights, which the loop keeps.
    """

    def __init__(
        self,
        source: PictureSource,
        teacher: UNet,
        teacher_branches: int,
        settings: Distillation,
        config: DistillationConfig,
        adapters: str = "none",
    ) -> None:
        self.source, self.model, self.name = source, source.model, f"distil-{config.kind}"
        self.settings, self.config, self.adapters = settings, config, adapters
        self.branches = teacher_branches
        decoder = self.model.image_decoder
        self._student, self._teacher = _Prediction(decoder.unet), _Prediction(teacher)
        self._target: dict[str, Tensor] = {}
        self._diffusion = decoder.diffusion

    @property
    def module(self) -> nn.Module:
        return self.model

    def describe(self) -> dict[str, object]:
        return {
            **self.source.describe(),
            "model": config_json(self.model.config),
            "distillation": str(self.settings),
            "guidance": self.config.guidance,
            "lora": self.adapters,
        }

    def follow(self, average: Mapping[str, Tensor]) -> None:
        """Take targets from `average`, which the loop updates in place."""
        self._target = {
            f"unet.{name.removeprefix(UNET)}": value
            for name, value in average.items()
            if name.startswith(UNET)
        }

    def batch(self, index: int, rng: np.random.Generator) -> Any:
        return self.source.batch(index, rng)

    def losses(self, batch: Any) -> dict[str, Tensor]:
        # No dropout in the frozen parts: teacher and student see the same condition.
        self.model.eval()
        self.model.image_decoder.unet.train()
        if (report := getattr(self.source, "report", None)) is not None:
            report(batch.broken)
        rows = self._rows(batch if isinstance(batch, Batch) else batch.batch)
        if rows is None:  # no picture is drawn
            learning = (value for value in self.model.parameters() if value.requires_grad)
            loss = sum((0.0 * value.sum() for value in learning), torch.zeros(()))
        elif self.config.kind == "guidance":
            loss = self._guidance_loss(rows)
        else:
            loss = self._consistency_loss(rows)
        return {"total": loss, self.config.kind: loss}

    @torch.no_grad()
    def _rows(self, batch: Batch) -> _Rows | None:
        """Encode the documents and repeat their pictures once for each noise level."""
        model, decoder = self.model, self.model.image_decoder
        batch = model.with_layout(batch)
        assert batch.layout is not None
        if batch.layout.pictures is None:
            return None
        images = model.encode_images(batch.pixels)
        hidden = model.read_rows(batch.token_ids, images, batch.layout.rows)
        inputs = model.picture_inputs(hidden, images, batch).repeated(self.settings.draws)
        posterior, condition, look_back = inputs
        latents = decoder.vae.latents(posterior, torch.randn_like(posterior.mean))
        values = decoder.unet.image_values(look_back.features)
        return _Rows(latents, condition, values, look_back)

    def _guidance_loss(self, rows: _Rows) -> Tensor:
        """Squared error against the guided prediction of the teacher (Meng et al. 2023, Eq. 3)."""
        steps = self._diffusion.config.steps
        timestep = torch.randint(steps, (len(rows.latents),), device=rows.latents.device)
        noisy = self._noisy(rows, timestep)
        wanted = self._guided(noisy, timestep, rows)
        error = self._student(noisy, timestep, rows).float() - wanted
        return (error**2).mean()

    def _consistency_loss(self, rows: _Rows) -> Tensor:
        """Huber loss between the consistency function at two neighbouring timesteps of the solver
        (Luo et al. 2023, Algorithm 1)."""
        assert self.config.solver_steps is not None
        diffusion = self._diffusion
        grid = solver_timesteps(diffusion.config, self.config.solver_steps)
        known = torch.tensor(grid, device=rows.latents.device)
        index = torch.randint(len(known), (len(rows.latents),), device=known.device)
        timestep = known[index]
        earlier = (timestep - (known[1] - known[0])).clamp(min=0)
        noisy = self._noisy(rows, timestep)
        with torch.no_grad():
            guided = self._guided(noisy, timestep, rows)
            before = solver_step(diffusion, guided, noisy, timestep, earlier)
            of_target = functional_call(self._student, self._target, (before, earlier, rows))
            wanted = consistency(diffusion, of_target, before, earlier)
        found = consistency(diffusion, self._student(noisy, timestep, rows), noisy, timestep)
        return pseudo_huber(found - wanted, self.settings.huber).mean()

    def _noisy(self, rows: _Rows, timestep: Tensor) -> Tensor:
        noise = torch.randn_like(rows.latents)
        return self._diffusion.add_noise(rows.latents, noise, timestep)

    @torch.no_grad()
    def _guided(self, noisy: Tensor, timestep: Tensor, rows: _Rows) -> Tensor:
        """The teacher's prediction [b, z, side, side] in fp32, with classifier-free guidance."""
        if self.branches == 1:
            return self._teacher(noisy, timestep, rows).float()
        null = self.model.image_decoder.null_condition.to(rows.condition.dtype)
        both = replace(
            rows,
            condition=torch.cat([rows.condition, null.expand_as(rows.condition)]),
            images=rows.images.repeated(2),
        )
        found = self._teacher(noisy.repeat(2, 1, 1, 1), timestep.repeat(2), both).float()
        conditional, unconditional = found.chunk(2)
        return unconditional + self.config.guidance * (conditional - unconditional)
