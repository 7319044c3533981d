"""The forward diffusion process and the U-Net's prediction target.

With a_t the product of (1 - beta) up to t: noisy = sqrt(a_t) x + sqrt(1 - a_t) eps. The U-Net
predicts eps, or v = sqrt(a_t) eps - sqrt(1 - a_t) x (Salimans and Ho 2022), per `DiffusionConfig`.

Letters: b batch, z latent channels.
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import DiffusionConfig
from mmi_train.model.positions import with_values


class Diffusion(nn.Module):
    """Forward process of `config`, without parameters; timesteps are [b] in [0, config.steps)."""

    signal: Tensor
    sigma: Tensor

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.config = config
        with with_values():
            products = torch.cumprod(1 - betas(config), 0)
        self.register_buffer("signal", products.sqrt().float(), persistent=False)  # [steps]
        self.register_buffer("sigma", (1 - products).sqrt().float(), persistent=False)

    def rates(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t), each [b, 1, 1, 1]."""
        return self.signal[timestep][:, None, None, None], self.sigma[timestep][:, None, None, None]

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Noisy latents [b, z, side, side] at the timestep of each row."""
        signal, sigma = self.rates(timestep)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Prediction target [b, z, side, side]: the noise or the velocity v."""
        if self.config.prediction == "epsilon":
            return noise
        signal, sigma = self.rates(timestep)
        return signal * noise - sigma * latents


def betas(config: DiffusionConfig) -> Tensor:
    """Noise schedule: beta of every timestep, [steps] in fp64; `ConfigError` if unknown."""
    if config.beta_schedule == "linear":
        return torch.linspace(config.beta_start, config.beta_end, config.steps, dtype=torch.float64)
    if config.beta_schedule == "scaled_linear":
        root = torch.linspace(
            config.beta_start**0.5, config.beta_end**0.5, config.steps, dtype=torch.float64
        )
        return root**2
    raise ConfigError(
        "unknown beta schedule", expected="linear or scaled_linear", got=config.beta_schedule
    )


def scheduler_options(config: DiffusionConfig) -> dict[str, object]:
    """Options that make any of diffusers' schedulers describe this process."""
    return {
        "num_train_timesteps": config.steps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": config.beta_schedule,
        "prediction_type": config.prediction,
    }


def ddim(config: DiffusionConfig) -> DDIMScheduler:
    """DDIM scheduler with the timestep spacing of the published model. With eta = 1 it is the
    ancestral DDPM sampler (Song et al. 2021, Sec. 4.1), and takes its noise explicitly."""
    return DDIMScheduler(
        **scheduler_options(config), clip_sample=False, timestep_spacing="leading", steps_offset=1
    )
