"""Latent consistency functions: parameterisation, teacher's solver step, multistep sampling.

A consistency function maps noisy latents of any timestep to the end of the probability-flow ODE
through them (Song et al. 2023; with guidance and in latent space, Luo et al. 2023). Everything here
is in terms of predictions of data and noise, whatever the U-Net's prediction type.

Letters: b batch, z latent channels.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import LCMScheduler
from numpy.typing import NDArray
from torch import Tensor

from mmi_deploy.spec.config import DiffusionConfig
from mmi_train.model.diffusion import Diffusion, scheduler_options

# Standard deviation that the parameterisation assumes of data, and the factor of its timesteps
# (Luo et al. 2023, Sec. 4.1 and the published code).
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0


def solver_timesteps(diffusion: DiffusionConfig, solver_steps: int) -> NDArray[np.int64]:
    """Evenly spread timesteps [solver_steps], the least first: k - 1, 2k - 1, ..., where k is the
    number of training steps that one step of the solver skips."""
    skipped = diffusion.steps // solver_steps
    return np.arange(1, solver_steps + 1, dtype=np.int64) * skipped - 1


def data_and_noise(
    diffusion: Diffusion, prediction: Tensor, noisy: Tensor, timestep: Tensor
) -> tuple[Tensor, Tensor]:
    """Data and noise, each [b, z, side, side] in fp32, that a prediction of the U-Net means."""
    signal, sigma = diffusion.rates(timestep)
    prediction, noisy = prediction.float(), noisy.float()
    if diffusion.config.prediction == "epsilon":
        return (noisy - sigma * prediction) / signal, prediction
    return signal * noisy - sigma * prediction, signal * prediction + sigma * noisy


def boundary_scalings(timestep: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of timesteps [b], each [b, 1, 1, 1] (Song et al. 2023, Eq. 5): at timestep 0
    the consistency function is the identity."""
    scaled = timestep.float()[:, None, None, None] * TIMESTEP_SCALING
    variance = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / variance, scaled / variance.sqrt()


def consistency(
    diffusion: Diffusion, prediction: Tensor, noisy: Tensor, timestep: Tensor
) -> Tensor:
    """Value of the consistency function [b, z, side, side] in fp32 from the U-Net's prediction."""
    skip, out = boundary_scalings(timestep)
    data, _ = data_and_noise(diffusion, prediction, noisy, timestep)
    return skip * noisy.float() + out * data


def solver_step(
    diffusion: Diffusion, prediction: Tensor, noisy: Tensor, timestep: Tensor, earlier: Tensor
) -> Tensor:
    """Latents at the timesteps `earlier` [b] on the trajectory through `noisy`, by one step of DDIM
    from `timestep` (Luo et al. 2023, Sec. 4.3: skipping steps)."""
    data, noise = data_and_noise(diffusion, prediction, noisy, timestep)
    return diffusion.add_noise(data, noise, earlier)


def pseudo_huber(difference: Tensor, width: float) -> Tensor:
    """sqrt(d^2 + width^2) - width of every element: quadratic near zero, then linear."""
    return (difference**2 + width**2).sqrt() - width


def lcm(diffusion: DiffusionConfig, solver_steps: int) -> LCMScheduler:
    """diffusers' scheduler of multistep consistency sampling (Luo et al. 2023, Algorithm 3)."""
    return LCMScheduler(**scheduler_options(diffusion), original_inference_steps=solver_steps)


def with_noise(
    scheduler: LCMScheduler, denoised: Tensor, timestep: Tensor, noise: Tensor
) -> Tensor:
    """Latents of the step after `timestep`: `denoised` with given noise, which the scheduler itself
    would draw; after the last step `denoised` itself."""
    following = scheduler.timesteps[scheduler.timesteps < timestep]
    if not len(following):
        return denoised
    noisy: Tensor = scheduler.add_noise(denoised, noise, following[:1])
    return noisy


def denoised_by(
    scheduler: LCMScheduler, prediction: Tensor, timestep: Tensor, latents: Tensor
) -> Tensor:
    """Value of the consistency function at a step of the scheduler, which moves on."""
    draw = torch.Generator().manual_seed(0)  # of noise that is not used
    found: Tensor = scheduler.step(prediction, timestep, latents, generator=draw).denoised
    return found
