"""Preview map of a model: its VAE decoder as a linear map of one cell, by least absolute errors.

Seeded synthetic scenes are encoded, and the map is fitted from their latents to the mean colours of
the decoded cells. On what the shipped model draws, this is better than latents drawn at random, and
than pictures that it draws unconditionally (docs/export.md).

Letters: b batch, z latent channels.
"""

from __future__ import annotations

from math import lcm

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers.initialization import no_init_weights

from mmi_deploy.errors import WeightsError
from mmi_deploy.spec.config import VaeConfig
from mmi_deploy.spec.preview_map import PreviewMap
from mmi_export.tracing.stored_weights import StoredWeights
from mmi_train.data.synthetic.world import IMAGE_SIDE, medium, random_scene, render
from mmi_train.model.vae import Vae

# Scenes that are fitted, and others that measure the error.
FITTED, MEASURED = 64, 16

# Standard deviation of noise on the latents that are fitted. Those of a step are not exactly those
# of the encoder: without noise, the map would rely on directions in which these hardly vary.
NOISE = 0.05

# Rounds of reweighted least squares, and the error below which a cell has no more weight.
_ROUNDS, _CLOSE = 60, 1e-3

# Scenes that are encoded and decoded at a time.
_BATCH = 8

# Decimals of the map in the manifest: far below a step of 8-bit colour.
_DECIMALS = 6


def fit_preview_map(config: VaeConfig, stored: StoredWeights) -> PreviewMap:
    """Fit the map of the VAE in `stored`, whose weights alone are read. Raises `WeightsError` if it
    gives values that are not finite."""
    latents, colours = _cells(_vae(config, stored), _scenes(config.factor))  # [b, cells, ...]
    if not (np.isfinite(latents).all() and np.isfinite(colours).all()):
        raise WeightsError("the autoencoder gives values that are not finite")
    noise = NOISE * np.random.default_rng(0).standard_normal(latents.shape)
    terms = _with_one(latents + noise)
    fitted = terms[:FITTED].reshape(-1, terms.shape[2]), colours[:FITTED].reshape(-1, 3)
    found = _least_absolute(*fitted).round(_DECIMALS)  # [z + 1, 3]
    shown = (_with_one(latents[FITTED:]) @ found).clip(0, 1)
    red, green, blue = found[:-1].T.tolist()
    return PreviewMap(
        weights=(tuple(red), tuple(green), tuple(blue)),
        bias=tuple(found[-1].tolist()),
        error=float(np.abs(shown - colours[FITTED:]).mean()),
        compared_with=f"the VAE decoder, on {MEASURED} scenes that were not fitted",
    )


def _least_absolute(terms: NDArray, colours: NDArray) -> NDArray:
    """Linear map [z + 1, 3] of least mean absolute error from terms [cells, z + 1] to colours
    [cells, 3], by iteratively reweighted least squares.

    Least squares would give up the background, which is most of a picture, for a few cells in which
    the decoder is far from linear.
    """
    found = np.linalg.lstsq(terms, colours, rcond=None)[0]
    for _ in range(_ROUNDS):
        weights = 1 / np.sqrt(np.maximum(np.abs(terms @ found - colours), _CLOSE))
        columns = [
            np.linalg.lstsq(terms * of_cell[:, None], colour * of_cell, rcond=None)[0]
            for of_cell, colour in zip(weights.T, colours.T, strict=True)
        ]
        found = np.stack(columns, axis=1)
    return np.asarray(found)


def _vae(config: VaeConfig, stored: StoredWeights) -> Vae:
    """The VAE of a model, in float32."""
    with no_init_weights():
        vae = Vae(config).eval()
    with torch.no_grad():
        for name, tensor in vae.state_dict(keep_vars=True).items():
            tensor.copy_(stored.read(f"image_decoder.vae.{name}"))
    return vae


def _scenes(factor: int) -> Tensor:
    """Synthetic scenes [b, 3, side, side] in [0, 1], of a side that is a multiple of `factor`."""
    rng, world = np.random.default_rng(0), medium()
    scenes = [render(random_scene(rng, world, None)) for _ in range(FITTED + MEASURED)]
    repeats = lcm(IMAGE_SIDE, factor) // IMAGE_SIDE
    pixels = torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2) / 255
    return pixels.repeat_interleave(repeats, 2).repeat_interleave(repeats, 3)


def _cells(vae: Vae, pixels: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Latents [b, cells, z] of pictures, and mean colours [b, cells, 3] of the decoded cells."""
    of_latents, of_colours = [], []
    with torch.no_grad():
        for part in pixels.split(_BATCH):
            latents = vae.encode(part).mean * vae.config.scaling_factor
            of_latents.append(latents)
            of_colours.append(F.avg_pool2d(vae.decode(latents), vae.config.factor))
    return _by_cell(of_latents), _by_cell(of_colours)


def _by_cell(parts: list[Tensor]) -> NDArray[np.float64]:
    """Maps [b, channels, side, side] as [b, cells, channels]."""
    found: NDArray[np.float64] = torch.cat(parts).flatten(2).transpose(1, 2).double().numpy()
    return found


def _with_one(latents: NDArray[np.float64]) -> NDArray[np.float64]:
    """Latents [..., z] and a one for the bias: [..., z + 1]."""
    return np.concatenate([latents, np.ones((*latents.shape[:-1], 1))], axis=-1)
