"""Distillation stages: a U-Net learns to draw in one branch, or in a few steps.

The documents and all that is computed from them, apart from the U-Net, are those of another stage;
encoder, language model, resampler and MMFS are frozen and shared with the teacher. Here are
distilled guidance and consistency models; `distribution_matching` has the third kind.

Letters: b batch, y condition tokens, z latent channels.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated
from torch import Tensor, nn
from torch.func import functional_call

from mmi_deploy.errors import ConfigError, DocumentError
from mmi_deploy.spec.config import (
    DistillationConfig,
    DistillationKind,
    ImageDecoderConfig,
    ModelConfig,
)
from mmi_deploy.spec.config import to_json as config_json
from mmi_train.model.consistency import consistency, pseudo_huber, solver_step, solver_timesteps
from mmi_train.model.image_decoder import PreviousImages
from mmi_train.model.mm_interleaved import Batch, MMInterleaved
from mmi_train.model.unet import UNet

# Settings that only these kinds have.
_OF_KINDS = {"huber": ("lcm",), "solver_steps": ("lcm", "dmd"), "critic_updates": ("dmd",)}

# Micro-batches in a row in which no picture is drawn, after which a run ends.
_MOST_WITHOUT = 100

# Before the U-Net's own names in a model.
UNET = "image_decoder.unet."

# A tensor, or one that is stored.
StateT = TypeVar("StateT")


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Distillation:
    """Settings of a distillation. `guidance`: scale that is folded in; None: the teacher's own, or
    the published one. `solver_steps`: evenly spread timesteps of a consistency model, or of
    distribution matching, whose pictures are drawn in as many steps. `huber`: width of the
    consistency loss. `draws`: noise levels at which each picture is trained in a micro-batch.
    `critic_updates`: optimiser steps of the critic of distribution matching for one of the
    student."""

    kind: DistillationKind
    guidance: float | None = Field(default=None, ge=0, le=100)
    solver_steps: int = Field(default=50, ge=1, le=1000)
    huber: float = Field(default=0.001, gt=0)
    draws: int = Field(default=4, ge=1)
    critic_updates: int = Field(default=5, ge=1)

    def __str__(self) -> str:
        """Settings of the kind, as checkpoints compare them."""
        told = (
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.name != "critic_updates" or self.kind == "dmd"
        )
        return f"Distillation({', '.join(told)})"

    def config_of(self, teacher: ImageDecoderConfig) -> DistillationConfig:
        """Distillation as the configuration of a student of `teacher` holds it. Raises
        `ConfigError` for a teacher that cannot have such a student, and for settings of another
        kind."""
        usual = Distillation(self.kind)
        for name, kinds in _OF_KINDS.items():
            if self.kind not in kinds and getattr(self, name) != getattr(usual, name):
                raise ConfigError(
                    f"distill.{name} has no meaning for {self.kind}",
                    fix=f"leave it out, or distil with {' or '.join(kinds)}",
                )
        if self.kind == "lcm" and self.solver_steps == 1:
            raise ConfigError("a consistency model has at least 2 solver steps")
        own = teacher.distillation
        if own is not None and (own.kind != "guidance" or self.kind == "guidance"):
            raise ConfigError(
                f"the teacher is distilled itself: {own.kind}",
                expected="a model as trained, or for lcm and dmd one with distilled guidance",
                fix="give the model that it was distilled from with --teacher",
            )
        guidance = teacher.guidance_of(self.guidance)
        steps = None if self.kind == "guidance" else self.solver_steps
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
class Rows:
    """Frozen inputs of b rows, one for each picture and noise level: latents [b, z, side, side],
    condition [b, y, width], image values of every MMFS block, and who sees which images."""

    latents: Tensor
    condition: Tensor
    values: list[Tensor]
    images: PreviousImages


class Prediction(nn.Module):
    """The U-Net on image values that are computed before, as a call whose weights can be
    replaced."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, noisy: Tensor, timestep: Tensor, rows: Rows) -> Tensor:
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


class DistillationStage(ABC):
    """Losses of a student, the U-Net of `source.model`, against a frozen `teacher`.

    `teacher_branches`: 2 for a teacher that needs classifier-free guidance.
    """

    def __init__(
        self,
        source: PictureSource,
        teacher: UNet,
        teacher_branches: int,
        settings: Distillation,
        config: DistillationConfig,
        adapters: str = "none",
        accumulate: int = 1,
    ) -> None:
        """accumulate: micro-batches of an optimiser step."""
        self.source, self.model, self.name = source, source.model, f"distil-{config.kind}"
        self.settings, self.config, self.adapters = settings, config, adapters
        self.branches, self.accumulate = teacher_branches, accumulate
        self._without = 0  # micro-batches in a row
        decoder = self.model.image_decoder
        self.student, self.teacher = Prediction(decoder.unet), Prediction(teacher)
        self.diffusion = decoder.diffusion

    @property
    def module(self) -> nn.Module:
        return self.model

    @property
    def copies(self) -> list[UNet]:
        """The U-Nets beside the model's own."""
        return [self.teacher.unet]

    def model_state(self, average: Mapping[str, StateT]) -> dict[str, StateT]:
        """The model's own among the averages of what learns, under its names."""
        return dict(average)

    def describe(self) -> dict[str, object]:
        return {
            **self.source.describe(),
            "model": config_json(self.model.config),
            "distillation": str(self.settings),
            "guidance": self.config.guidance,
            "lora": self.adapters,
        }

    def batch(self, index: int, rng: np.random.Generator) -> Any:
        return self.source.batch(index, rng)

    def costliest(self, documents: Any) -> Any:
        """The micro-batch of `documents` that takes the most memory and arithmetic."""
        return documents

    def losses(self, batch: Any) -> dict[str, Tensor]:
        rows = self.rows(batch)
        if rows is not None:
            self._without = 0
            return self.row_losses(rows, batch)
        self._without += 1
        if self._without == _MOST_WITHOUT:
            raise DocumentError(
                f"{_MOST_WITHOUT} micro-batches in a row have no picture to draw",
                fix="distil on documents with pictures that the model is to draw",
            )
        # Gradients of zero, for an optimiser that needs some.
        learning = self.learning(batch)
        return {"total": sum((0.0 * value.sum() for value in learning), torch.zeros(()))}

    @abstractmethod
    def row_losses(self, rows: Rows, batch: Any) -> dict[str, Tensor]:
        """Losses by name of the rows of a micro-batch."""

    def learning(self, batch: Any) -> Iterable[nn.Parameter]:
        """Weights that learn from a micro-batch."""
        return (value for value in self.module.parameters() if value.requires_grad)

    def rows(self, batch: Any) -> Rows | None:
        """Encode the documents and repeat their pictures once for each noise level; None if there
        are none."""
        # No dropout in the frozen parts: teacher and student see the same condition.
        self.model.eval()
        self.model.image_decoder.unet.train()
        if (report := getattr(self.source, "report", None)) is not None:
            report(batch.broken)
        return self._encoded(batch if isinstance(batch, Batch) else batch.batch)

    @torch.no_grad()
    def _encoded(self, batch: Batch) -> Rows | None:
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
        return Rows(latents, condition, values, look_back)

    def noisy(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Latents with fresh noise at the timestep of each row."""
        return self.diffusion.add_noise(latents, torch.randn_like(latents), timestep)

    @torch.no_grad()
    def guided(self, noisy: Tensor, timestep: Tensor, rows: Rows) -> Tensor:
        """The teacher's prediction [b, z, side, side] in fp32, with classifier-free guidance."""
        if self.branches == 1:
            return self.teacher(noisy, timestep, rows).float()
        null = self.model.image_decoder.null_condition.to(rows.condition.dtype)
        both = replace(
            rows,
            condition=torch.cat([rows.condition, null.expand_as(rows.condition)]),
            images=rows.images.repeated(2),
        )
        found = self.teacher(noisy.repeat(2, 1, 1, 1), timestep.repeat(2), both).float()
        conditional, unconditional = found.chunk(2)
        return unconditional + self.config.guidance * (conditional - unconditional)


class GuidanceStage(DistillationStage):
    """Distilled guidance (Meng et al. 2023, Sec. 3.1): the student learns the teacher's guided
    prediction at any timestep."""

    def row_losses(self, rows: Rows, batch: Any) -> dict[str, Tensor]:
        """Squared error of the prediction (Eq. 3)."""
        steps = self.diffusion.config.steps
        timestep = torch.randint(steps, (len(rows.latents),), device=rows.latents.device)
        noisy = self.noisy(rows.latents, timestep)
        wanted = self.guided(noisy, timestep, rows)
        error = self.student(noisy, timestep, rows).float() - wanted
        loss = (error**2).mean()
        return {"total": loss, self.config.kind: loss}


class ConsistencyStage(DistillationStage):
    """Latent consistency distillation (Luo et al. 2023): the student learns to map any timestep of
    the solver to the end of the teacher's trajectory. Its targets come from the average (EMA) of
    the weights, which the loop keeps."""

    _average: Mapping[str, Tensor] = MappingProxyType({})

    def follow(self, average: Mapping[str, Tensor]) -> None:
        """Take targets from `average`, which the loop updates in place."""
        self._average = {
            f"unet.{name.removeprefix(UNET)}": value
            for name, value in average.items()
            if name.startswith(UNET)
        }

    def row_losses(self, rows: Rows, batch: Any) -> dict[str, Tensor]:
        """Huber loss between the consistency function at two neighbouring timesteps of the solver
        (Algorithm 1)."""
        assert self.config.solver_steps is not None
        diffusion = self.diffusion
        grid = solver_timesteps(diffusion.config, self.config.solver_steps)
        known = torch.tensor(grid, device=rows.latents.device)
        index = torch.randint(len(known), (len(rows.latents),), device=known.device)
        timestep = known[index]
        earlier = (timestep - (known[1] - known[0])).clamp(min=0)
        noisy = self.noisy(rows.latents, timestep)
        with torch.no_grad():
            guided = self.guided(noisy, timestep, rows)
            before = solver_step(diffusion, guided, noisy, timestep, earlier)
            of_target = functional_call(self.student, dict(self._average), (before, earlier, rows))
            wanted = consistency(diffusion, of_target, before, earlier)
        found = consistency(diffusion, self.student(noisy, timestep, rows), noisy, timestep)
        loss = pseudo_huber(found - wanted, self.settings.huber).mean()
        return {"total": loss, self.config.kind: loss}
