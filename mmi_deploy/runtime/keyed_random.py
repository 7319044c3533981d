"""Every random number of a generation, addressed by what it is for.

A draw depends on (seed, purpose, picture, step) alone and never on how many were made before, so
that runs repeat, a picture does not change when the text before it is cached, and the PyTorch path
makes the very same draws.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Purpose(IntEnum):
    """What a draw is for. The numbers are part of what a seed means: never renumber them."""

    LATENTS = 0
    STEP_NOISE = 1
    TEXT = 2


def generator(seed: int, purpose: Purpose, picture: int = 0, step: int = 0) -> np.random.Generator:
    """The stream of one draw.

    Philox is a keyed function of a 256-bit counter: the seed is its key, and the address fills the
    upper three 64-bit words of the counter, so streams cannot meet before 2^64 draws.
    """
    counter = np.array([0, purpose, picture, step], dtype=np.uint64)
    key = np.array([seed % 2**64, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def first_latents(seed: int, picture: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal latents that picture number `picture` of a document starts from."""
    return generator(seed, Purpose.LATENTS, picture).standard_normal(shape, np.float32)


def step_noise(seed: int, picture: int, step: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal noise that an ancestral solver adds at one step."""
    return generator(seed, Purpose.STEP_NOISE, picture, step).standard_normal(shape, np.float32)


def text_uniform(seed: int, place: int) -> float:
    """The uniform number in [0, 1) that chooses the token at `place` of the document."""
    return float(generator(seed, Purpose.TEXT, step=place).random())
