"""Preview map: latents to colours without the autoencoder, to show a picture while it is drawn.

The exporter fits it by least squares over the VAE decoder; the runtime applies it to the data
prediction of a denoising step.

Letters: z latent channels.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass

from mmi_deploy.spec.config import STRICT, Finite

Weights = Annotated[tuple[Finite, ...], Field(min_length=1, max_length=2**12)]


@dataclass(frozen=True, config=STRICT)
class PreviewMap:
    """Linear map from the latents of a cell to its colour.

    weights [3, z], bias [3]: colour in [0, 1] = weights x latents + bias, clipped. error: mean
    absolute error of the colours against `compared_with`.
    """

    weights: tuple[Weights, Weights, Weights]
    bias: tuple[Finite, Finite, Finite]
    error: Annotated[float, Field(ge=0, le=1)]
    compared_with: str

    def pixels(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map latents [z, side, side] to pixels [3, side, side], in [0, 1] once clipped."""
        bias = np.array(self.bias, np.float32)[:, None, None]
        return np.tensordot(np.array(self.weights, np.float32), latents, axes=1) + bias
