"""diffusers' schedulers: the one with which a model draws in evaluation, and a step of any."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler, SchedulerMixin
from torch import Tensor

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import ImageDecoderConfig
from mmi_train.model.consistency import denoised_by, lcm, with_noise
from mmi_train.model.diffusion import scheduler_options

# Denoising steps of a picture, and those of a consistency model.
SOLVER_STEPS, CONSISTENCY_STEPS = 20, 4


def sampler(config: ImageDecoderConfig, steps: int | None = None) -> SchedulerMixin:
    """DPM-Solver++, or for a consistency model multistep consistency sampling, set to `steps`;
    None: `SOLVER_STEPS`, or at most `CONSISTENCY_STEPS`. Raises `ConfigError` for too many
    steps."""
    distilled = config.distillation
    scheduler: SchedulerMixin
    if distilled is None or distilled.solver_steps is None:
        scheduler = DPMSolverMultistepScheduler(**scheduler_options(config.diffusion))
        scheduler.set_timesteps(steps or SOLVER_STEPS)
        return scheduler
    if steps is not None and steps > distilled.solver_steps:
        raise ConfigError(
            f"this model cannot draw in {steps} steps",
            expected=f"1 to {distilled.solver_steps}, on which it was distilled",
        )
    scheduler = lcm(config.diffusion, distilled.solver_steps)
    scheduler.set_timesteps(steps or min(CONSISTENCY_STEPS, distilled.solver_steps))
    return scheduler


def noise_of_steps(
    scheduler: SchedulerMixin, like: Tensor, generator: torch.Generator
) -> Sequence[Tensor] | None:
    """Noise of every step, each of the shape of the latents `like`, where the sampler adds any."""
    if not isinstance(scheduler, LCMScheduler):
        return None
    drawn = (torch.randn(like.shape, generator=generator) for _ in scheduler.timesteps)
    return [noise.to(like.device) for noise in drawn]


def next_latents(
    scheduler: SchedulerMixin,
    prediction: Tensor,
    timestep: Tensor,
    latents: Tensor,
    noise: Tensor | None,
) -> Tensor:
    """One step of a scheduler. `noise`: what it adds, given explicitly to a consistency sampler,
    and to DDIM, which becomes the ancestral sampler with it."""
    if isinstance(scheduler, LCMScheduler):
        assert noise is not None, "a consistency sampler needs its noise"
        denoised = denoised_by(scheduler, prediction, timestep, latents)
        return with_noise(scheduler, denoised, timestep, noise)
    options = {}
    if noise is not None:
        assert isinstance(scheduler, DDIMScheduler), "only DDIM and LCM take their noise explicitly"
        options = {"eta": 1.0, "variance_noise": noise}
    following: Tensor = scheduler.step(prediction, timestep, latents, **options).prev_sample
    return following
