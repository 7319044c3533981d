"""Draws depend on their address alone, and on all of it."""

from __future__ import annotations

import itertools

import numpy as np

from mmi_deploy.runtime.keyed_random import (
    Purpose,
    first_latents,
    generator,
    step_noise,
    text_uniform,
)


def test_every_part_of_the_address_matters() -> None:
    draws = [
        tuple(generator(seed, purpose, picture, step).random(4))
        for seed, purpose, picture, step in itertools.product((0, 1, -1), Purpose, (0, 1), (0, 1))
    ]
    assert len({value for draw in draws for value in draw}) == 4 * len(draws)


def test_draws_do_not_depend_on_earlier_ones() -> None:
    alone = step_noise(5, 2, 7, (3, 4))
    first_latents(5, 2, (100,))
    text_uniform(5, 7)
    np.testing.assert_array_equal(step_noise(5, 2, 7, (3, 4)), alone)


def test_draws_are_standard_normal_and_uniform() -> None:
    noise = first_latents(1, 0, (200_000,))
    assert noise.dtype == np.float32
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    places = np.array([text_uniform(1, place) for place in range(2000)])
    assert places.min() >= 0 and places.max() < 1 and abs(places.mean() - 0.5) < 0.03


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x64-10 as published (Salmon et al., SC 2011)."""
    words = 2**64 - 1
    for round_ in range(10):
        bumped = [
            (key[0] + round_ * 0x9E3779B97F4A7C15) & words,
            (key[1] + round_ * 0xBB67AE8584CAA73B) & words,
        ]
        first, second = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [
            (second >> 64) ^ counter[1] ^ bumped[0],
            second & words,
            (first >> 64) ^ counter[3] ^ bumped[1],
            first & words,
        ]
    return counter


def test_uniforms_are_philox_at_their_address() -> None:
    for seed, place in ((0, 0), (17, 5), (-1, 2000)):
        word = philox([1, Purpose.TEXT, 0, place], [seed % 2**64, 0])[0]
        assert text_uniform(seed, place) == (word >> 11) * 2.0**-53


def test_a_seed_means_the_same_picture_with_every_numpy() -> None:
    """numpy does not promise to keep how it makes normal numbers: this would notice."""
    expected = [0.059911035, 0.015559634, -1.1644385]
    np.testing.assert_allclose(first_latents(0, 0, (3,)), expected, rtol=1e-6)
