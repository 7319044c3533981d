"""Autoencoder stage, the first of training from scratch: the VAE on pictures of the world."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from mmi_train.data.pixels import pixels_from_images
from mmi_train.data.synthetic.world import WorldConfig, random_scene, render
from mmi_train.model.vae import Vae


@dataclass
class AutoencoderStage:
    """Reconstruction loss |error| + error^2 and a small KL divergence from the unit Gaussian.

    `pictures`: batch size. `segmentation`: share of pictures that are class maps.
    """

    vae: Vae
    world: WorldConfig
    pictures: int = 16
    segmentation: float = 0.1
    kl_weight: float = 1e-4
    name: str = field(default="autoencoder", init=False)

    @property
    def module(self) -> nn.Module:
        return self.vae

    def describe(self) -> dict[str, object]:
        return {
            "model": asdict(self.vae.config),
            "world": self.world,
            "pictures": self.pictures,
            "segmentation": self.segmentation,
            "kl_weight": self.kl_weight,
        }

    def _pixels(self, rng: np.random.Generator) -> Tensor:
        scenes = [random_scene(rng, self.world, "train") for _ in range(self.pictures)]
        return pixels_from_images([render(s, rng.random() < self.segmentation) for s in scenes])

    def batch(self, index: int, rng: np.random.Generator) -> Tensor:
        """Pixels [pictures, 3, height, width]."""
        return self._pixels(rng)

    def losses(self, pixels: Tensor) -> dict[str, Tensor]:
        posterior = self.vae.encode(pixels)
        mean, log_variance = posterior.mean.float(), posterior.log_variance.float().clamp(-12, 4)
        latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        decoded = self.vae.decode_unclipped(latents * self.vae.config.scaling_factor)
        error = 2 * (decoded.float() - pixels)
        reconstruction = (error.abs() + error.square()).mean()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return {
            "total": reconstruction + self.kl_weight * divergence,
            "reconstruction": reconstruction,
            "divergence": divergence,
        }

    @torch.no_grad()
    def latent_scale(self, pictures: int = 512) -> float:
        """Scaling factor that gives latents unit variance, over training pictures."""
        rng = np.random.default_rng([2**31, pictures])
        squares = []
        for _ in range(pictures // self.pictures):
            posterior = self.vae.encode(self._pixels(rng))
            noise = torch.from_numpy(rng.standard_normal(posterior.mean.shape, dtype=np.float32))
            squares.append(posterior.sample(noise).float().square().mean())
        return float(torch.stack(squares).mean().rsqrt())
