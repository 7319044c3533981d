"""Counter-based random numbers of a generation, keyed by their purpose.

A draw depends only on (seed, purpose, picture, step), never on the draws before it: runs are
reproducible, caching changes nothing, and the PyTorch path makes the same draws.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Purpose(IntEnum):
    """Purpose of a draw. Renumbering would change the result of every seed."""

    LATENTS = 0
    STEP_NOISE = 1
    TEXT = 2


def generator(seed: int, purpose: Purpose, picture: int = 0, step: int = 0) -> np.random.Generator:
    """Generator of one draw.

    Philox is a keyed function of a 256-bit counter. The seed is its key; purpose, picture and step
    fill the upper three 64-bit words of the counter, so streams overlap only after 2^64 draws.
    """
    counter = np.array([0, purpose, picture, step], dtype=np.uint64)
    key = np.array([seed % 2**64, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def first_latents(seed: int, picture: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal latents to start picture number `picture` of a document from."""
    return generator(seed, Purpose.LATENTS, picture).standard_normal(shape, np.float32)


def step_noise(seed: int, picture: int, step: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal noise of one step of an ancestral solver."""
    return generator(seed, Purpose.STEP_NOISE, picture, step).standard_normal(shape, np.float32)


def text_uniform(seed: int, place: int) -> float:
    """Uniform number in [0, 1) that samples the token at position `place` of the document."""
    return float(generator(seed, Purpose.TEXT, step=place).random())
