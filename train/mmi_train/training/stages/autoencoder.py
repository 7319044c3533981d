"""Autoencoder stage, the first of training from scratch: the VAE on pictures of the corpus."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from mmi_train.data.corpus import Corpus
from mmi_train.data.pixels import pixels_from_images
from mmi_train.model.vae import Vae


@dataclass
class AutoencoderStage:
    """Reconstruction loss |error| + error^2 and a small KL divergence from the unit Gaussian.

    `pictures`: batch size.
    """

    vae: Vae
    corpus: Corpus
    pictures: int = 16
    kl_weight: float = 1e-4
    name: str = field(default="autoencoder", init=False)

    @property
    def module(self) -> nn.Module:
        return self.vae

    def describe(self) -> dict[str, object]:
        return {
            "model": asdict(self.vae.config),
            "world": self.corpus.describe(),
            "pictures": self.pictures,
            "kl_weight": self.kl_weight,
        }

    def _pixels(self, rng: np.random.Generator) -> Tensor:
        return pixels_from_images(self.corpus.pictures(rng, self.pictures))

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
