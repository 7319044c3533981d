"""The latent autoencoder: diffusers' `AutoencoderKL` on pixels in [0, 1] and scaled latents.

Letters: b batch, z latent channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from mmi_deploy.spec.config import VaeConfig
from mmi_train.model.group_norm import with_exact_group_norms


class Posterior(NamedTuple):
    """Gaussian posterior of the unscaled latents, mean and log variance [b, z, side, side]."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Sample with given normal noise: mean + standard deviation * noise, [b, z, side, side]."""
        return self.mean + torch.exp(0.5 * self.log_variance) * noise


class Vae(nn.Module):
    """Pixels to latents and back. Callers see latents scaled by `config.scaling_factor`."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        blocks = len(config.block_widths)
        self.autoencoder = with_exact_group_norms(
            AutoencoderKL(
                in_channels=3 * config.patch**2,
                out_channels=3 * config.patch**2,
                block_out_channels=config.block_widths,
                layers_per_block=config.layers_per_block,
                down_block_types=("DownEncoderBlock2D",) * blocks,
                up_block_types=("UpDecoderBlock2D",) * blocks,
                latent_channels=config.latent_channels,
                norm_num_groups=config.norm_groups,
                mid_block_add_attention=config.mid_attention,
            )
        )

    def encode(self, pixels: Tensor) -> Posterior:
        """Pixels [b, 3, height, width] in [0, 1] -> posterior of the unscaled latents."""
        # [b, 3 * patch^2, height / patch, width / patch]
        patches = F.pixel_unshuffle(2 * pixels - 1, self.config.patch)
        distribution = self.autoencoder.encode(patches).latent_dist
        return Posterior(distribution.mean, distribution.logvar)

    def latents(self, posterior: Posterior, noise: Tensor) -> Tensor:
        """Sample the posterior, scaled for the U-Net: [b, z, side, side]."""
        return self.config.scaling_factor * posterior.sample(noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [b, z, side, side] -> pixels [b, 3, height, width], clipped to [0, 1]."""
        return self.decode_unclipped(latents).clamp(0, 1)

    def decode_unclipped(self, latents: Tensor) -> Tensor:
        """`decode` without the clipping, for the reconstruction loss: differentiable everywhere."""
        patches = self.autoencoder.decode(latents / self.config.scaling_factor).sample
        return F.pixel_shuffle(patches, self.config.patch) / 2 + 0.5
