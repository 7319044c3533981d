"""The forward diffusion process and the U-Net's prediction target.

With a_t the product of (1 - beta) up to t: noisy = sqrt(a_t) x + sqrt(1 - a_t) eps. The U-Net
predicts eps, or v = sqrt(a_t) eps - sqrt(1 - a_t) x (Salimans and Ho 2022), per `DiffusionConfig`.
The signal-to-noise ratio SNR is a_t / (1 - a_t).

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

    def loss_weight(self, timestep: Tensor) -> Tensor | None:
        """Weight [b] of the squared error of a prediction, None for one everywhere.

        Min-SNR (Hang et al. 2023, Sec. 3.4) weighs the squared error of the picture by
        min(SNR, gamma), which is min(SNR, gamma) / SNR for that of the noise and
        min(SNR, gamma) / (SNR + 1) for that of v. In signal and sigma neither divides by zero
        where the SNR is zero.
        """
        gamma = self.config.min_snr_gamma
        if gamma is None:
            return None
        signal, noise = self.signal[timestep].square(), self.sigma[timestep].square()  # [b]
        weighted = torch.minimum(signal, gamma * noise)
        return weighted if self.config.prediction == "v_prediction" else weighted / signal


def betas(config: DiffusionConfig) -> Tensor:
    """Noise schedule: beta of every timestep, [steps] in fp64; `ConfigError` if unknown."""
    found = _published_betas(config)
    if not config.rescale_betas_zero_snr:
        return found
    signal = torch.cumprod(1 - found, 0).sqrt()
    # Shifted so that the last one is zero, and scaled so that the first one stays (Algorithm 1).
    products = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])).square()
    return 1 - torch.cat([products[:1], products[1:] / products[:-1]])


def _published_betas(config: DiffusionConfig) -> Tensor:
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
    """Options that make any of diffusers' schedulers describe this process. Solvers in log SNR take
    2**-24 for a product of zero at the last timestep."""
    return {
        "num_train_timesteps": config.steps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": config.beta_schedule,
        "prediction_type": config.prediction,
        "rescale_betas_zero_snr": config.rescale_betas_zero_snr,
    }


def ddim(config: DiffusionConfig, spacing: str | None = None) -> DDIMScheduler:
    """DDIM scheduler with the timestep spacing of the model, which is that of the published one
    unless its terminal SNR is zero. With eta = 1 it is the ancestral DDPM sampler (Song et al.
    2021, Sec. 4.1), and takes its noise explicitly."""
    return DDIMScheduler(
        **scheduler_options(config), clip_sample=False, **spacing_options(spacing or config.spacing)
    )


def spacing_options(spacing: str) -> dict[str, object]:
    """Options of diffusers' schedulers for a timestep spacing; `leading` with Stable Diffusion's
    offset."""
    return {"timestep_spacing": spacing, "steps_offset": 1 if spacing == "leading" else 0}
