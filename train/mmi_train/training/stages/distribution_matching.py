"""Distribution matching: a student draws in a few steps what the teacher would find likely.

Two diffusion models denoise the student's pictures at every noise level: the frozen teacher, and a
critic that learns what the student draws. The pictures move from what the critic finds likely to
what the teacher does, which is the gradient of the KL divergence between both distributions (Yin et
al. 2024a, "One-step diffusion with distribution matching distillation"). As in its second version
(Yin et al. 2024b, "Improved distribution matching distillation") pictures are drawn from noise in
the steps of the runtime, the critic learns more often than the student, and there is no regression
loss. The adversarial loss of that version, against real pictures, is left out.

Letters: b batch, z latent channels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmi_train.model.consistency import consistency, data_and_noise, solver_timesteps
from mmi_train.model.unet import UNet
from mmi_train.training.stages import CRITIC_PREFIX, MODEL_PREFIX
from mmi_train.training.stages.distillation import (
    DistillationStage,
    Prediction,
    Rows,
    StateT,
)

# Share of the timesteps, at both ends, at which pictures are not compared (Yin et al. 2024a,
# Sec. 3.2): next to no noise, and next to nothing but noise.
_UNCOMPARED = 0.02

# Least mean difference of a picture from the teacher's, by which its gradient is divided.
_LEAST = 1e-4


class Turn(NamedTuple):
    """A micro-batch: its documents, the step of the student whose pictures are compared, and
    whether the student learns from them beside the critic."""

    documents: Any
    step: int
    student: bool


def critic_of(student: UNet, teacher: UNet) -> UNet:
    """Copy of the teacher in which the same weights learn as in the student; it shares MMFS, and
    what learns in neither, as the matrices that have adapters."""
    learns = {name: value.requires_grad for name, value in student.named_parameters()}
    frozen = (value for name, value in teacher.named_parameters() if not learns[name])
    shared = {id(part): part for part in (teacher.look_back, *frozen)}
    critic = copy.deepcopy(teacher, shared)
    for name, parameter in critic.named_parameters():
        parameter.requires_grad_(learns[name])
    return critic


class DistributionMatchingStage(DistillationStage):
    """Losses of the student and of its critic, which trains beside the model and is written to
    checkpoints alone."""

    @cached_property
    def critic(self) -> Prediction:
        """The critic, a copy of the teacher at first."""
        return Prediction(critic_of(self.model.image_decoder.unet, self.teacher.unet))

    @cached_property
    def module(self) -> nn.Module:
        parts = {MODEL_PREFIX: self.model, CRITIC_PREFIX: self.critic.unet}
        return nn.ModuleDict({name.rstrip("."): part for name, part in parts.items()})

    @cached_property
    def _timesteps(self) -> list[int]:
        """Timesteps of the student's steps, the noisiest first."""
        assert self.config.solver_steps is not None
        grid = solver_timesteps(self.diffusion.config, self.config.solver_steps)
        return [int(timestep) for timestep in reversed(grid)]

    @property
    def copies(self) -> list[UNet]:
        return [self.teacher.unet, self.critic.unet]

    def model_state(self, average: Mapping[str, StateT]) -> dict[str, StateT]:
        return {
            name.removeprefix(MODEL_PREFIX): value
            for name, value in average.items()
            if name.startswith(MODEL_PREFIX)
        }

    def batch(self, index: int, rng: np.random.Generator) -> Turn:
        documents = super().batch(index, rng)
        step = int(rng.integers(len(self._timesteps)))
        turn = index // self.accumulate % self.settings.critic_updates
        return Turn(documents, step, student=turn == 0)

    def costliest(self, documents: Any) -> Turn:
        return Turn(documents, len(self._timesteps) - 1, student=True)

    def learning(self, batch: Turn) -> Iterable[nn.Parameter]:
        part = self.module if batch.student else self.critic
        return (value for value in part.parameters() if value.requires_grad)

    def rows(self, batch: Turn) -> Rows | None:
        return super().rows(batch.documents)

    def row_losses(self, rows: Rows, batch: Turn) -> dict[str, Tensor]:
        with torch.set_grad_enabled(batch.student):
            drawn = self._drawn(rows, batch.step)
        critic = self._critic_loss(drawn.detach(), rows)
        if not batch.student:
            return {"total": critic, "critic": critic}
        loss = self._matching_loss(drawn, rows)
        return {"total": loss + critic, "critic": critic, self.config.kind: loss}

    def _drawn(self, rows: Rows, step: int) -> Tensor:
        """Pictures [b, z, side, side] of the student at one of its steps; the steps before it,
        from noise on, have no gradient (Yin et al. 2024b, Sec. 4.5)."""
        latents = torch.randn_like(rows.latents)
        with torch.no_grad():
            for timestep, following in pairwise(self._timesteps[: step + 1]):
                denoised = self._denoised(latents, timestep, rows)
                latents = self.noisy(denoised, self._rows_at(following, rows))
        return self._denoised(latents, self._timesteps[step], rows)

    def _denoised(self, latents: Tensor, timestep: int, rows: Rows) -> Tensor:
        """The student's picture as multistep consistency sampling computes it, in fp32."""
        at = self._rows_at(timestep, rows)
        return consistency(self.diffusion, self.student(latents, at, rows), latents, at)

    def _rows_at(self, timestep: int, rows: Rows) -> Tensor:
        return torch.full((len(rows.latents),), timestep, device=rows.latents.device)

    def _matching_loss(self, drawn: Tensor, rows: Rows) -> Tensor:
        """Half the squared error against pictures that are one step of the gradient on, so that the
        loss has that gradient (Yin et al. 2024a, Algorithm 2: their Eq. 7 and 8 in data)."""
        steps = self.diffusion.config.steps
        first, last = round(_UNCOMPARED * steps), round((1 - _UNCOMPARED) * steps)
        count, device = len(drawn), drawn.device
        with torch.no_grad():
            timestep = torch.randint(first, last, (count,), device=device)
            noisy = self.noisy(drawn, timestep)
            likely, _ = data_and_noise(
                self.diffusion, self.guided(noisy, timestep, rows), noisy, timestep
            )
            usual, _ = data_and_noise(
                self.diffusion, self.critic(noisy, timestep, rows), noisy, timestep
            )
            scale = (drawn - likely).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=_LEAST)
            wanted = drawn - (usual - likely) / scale
        return 0.5 * (drawn - wanted).square().mean()

    def _critic_loss(self, drawn: Tensor, rows: Rows) -> Tensor:
        """Denoising loss of the critic on the student's pictures, weighed as that of a base model
        (Yin et al. 2024a, Eq. 6)."""
        steps = self.diffusion.config.steps
        timestep = torch.randint(steps, (len(drawn),), device=drawn.device)
        noise = torch.randn_like(drawn)
        noisy = self.diffusion.add_noise(drawn, noise, timestep)
        error = self.critic(noisy, timestep, rows).float() - self.diffusion.target(
            drawn, noise, timestep
        )
        squared = error.square().mean(dim=(1, 2, 3))
        weight = self.diffusion.loss_weight(timestep)
        return (squared if weight is None else weight * squared).mean()
