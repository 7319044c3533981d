"""Text sampling against transformers' logits processors, draws against their distribution."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deploy.runtime.fake_model import fake_config
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.sampling import (
    TextSampling,
    ban,
    inverse_cdf,
    keep_top_k,
    keep_top_p,
    never_sampled,
    penalise_repetition,
    sample,
    softmax,
)

VOCAB = 300
SETTINGS = [
    TextSampling(0.7, 0, 0.9, 1.3),
    TextSampling(1.0, 20, 1.0, 1.0),
    TextSampling(1.6, 7, 0.5, 0.8),
    TextSampling(1.0, 1000, 0.05, 1.1),
]


def transformers_probabilities(
    logits: np.ndarray, how: TextSampling, seen: list[int], banned: list[int]
) -> np.ndarray:
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(how.repetition_penalty),
            SuppressTokensLogitsProcessor(banned, device="cpu"),
            TemperatureLogitsWarper(how.temperature),
        ]
    )
    if how.top_k:
        processors.append(TopKLogitsWarper(how.top_k))
    if how.top_p < 1:
        processors.append(TopPLogitsWarper(how.top_p))
    scores = processors(torch.tensor([seen]), torch.from_numpy(logits)[None])
    return scores.double().softmax(-1)[0].numpy()


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("seed", range(5))
def test_candidates_and_their_probabilities_equal_transformers(
    how: TextSampling, seed: int
) -> None:
    """The chosen token at evenly spread uniforms is the one of transformers' distribution."""
    generator = np.random.default_rng(seed)
    logits = (3 * generator.standard_normal(VOCAB)).astype(np.float32)
    seen = generator.integers(0, VOCAB, 40).tolist()
    banned = [4, int(logits.argmax())]
    expected = transformers_probabilities(logits, how, seen, banned)
    scores = ban(penalise_repetition(logits, seen, how.repetition_penalty), banned)
    scores = keep_top_p(keep_top_k(scores / np.float32(how.temperature), how.top_k), how.top_p)
    np.testing.assert_allclose(softmax(scores), expected, atol=1e-6)
    edges = np.cumsum(expected)
    for uniform in np.linspace(0.005, 0.995, 100):
        if np.abs(edges - uniform).min() < 1e-5:
            continue
        token = sample(logits, how, float(uniform), seen=seen, banned=banned)
        assert token == np.searchsorted(edges, uniform, side="right")


def test_temperature_zero_takes_the_likeliest_after_penalty_and_bans() -> None:
    logits = np.array([0.0, 5.0, 4.0, 3.0, -1.0], np.float32)
    greedy = TextSampling(temperature=0)
    assert sample(logits, greedy, 0.99) == 1
    assert sample(logits, greedy, 0.99, banned=[1]) == 2
    assert sample(logits, TextSampling(0, repetition_penalty=2.0), 0.5, seen=[1, 2]) == 3


@pytest.mark.parametrize(("temperature", "beyond"), [(0.001, 0.0009), (1000.0, 1001.0)])
def test_extreme_temperatures_give_probabilities(temperature: float, beyond: float) -> None:
    logits = np.array([3, 9, -2, 8.5], np.float32) * np.float32(1e4)
    how = TextSampling(temperature=temperature, repetition_penalty=100)
    with np.errstate(all="raise", under="ignore"):
        assert sample(logits, how, 0.5, seen=[2, 0], banned=[1]) == 3
    with pytest.raises(ConfigError, match="temperature is out of range"):
        TextSampling(temperature=beyond)


def test_logits_are_left_as_they_were() -> None:
    """They are the session's buffer."""
    logits = np.arange(9, dtype=np.float32) - 4
    before = logits.copy()
    sample(logits, TextSampling(0.5, 3, 0.5, 2.0), 0.3, seen=[1, 8], banned=[2])
    np.testing.assert_array_equal(logits, before)


def test_draws_follow_the_probabilities() -> None:
    probabilities = np.array([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    uniforms = (np.arange(10_000) + 0.5) / 10_000
    drawn = [inverse_cdf(probabilities, uniform) for uniform in uniforms]
    np.testing.assert_array_equal(np.bincount(drawn, minlength=6), probabilities * 10_000)


@pytest.mark.parametrize("uniform", [0.0, np.nextafter(1, 0)])
def test_ends_of_the_unit_interval_never_give_an_impossible_token(uniform: float) -> None:
    for total in (0.1, 0.3, 0.7, 1.0, 1.1):
        probabilities = np.array([0.0, total / 3, total / 3, total / 3, 0.0])
        assert inverse_cdf(probabilities, uniform) in (1, 3)


def test_image_start_and_padding_ids_are_never_sampled() -> None:
    tokens = fake_config().tokens
    assert never_sampled(tokens) == {tokens.image, tokens.bos, tokens.pad}
    assert not never_sampled(tokens) & {tokens.eos, tokens.boi}


def test_an_end_token_can_be_sampled_even_where_it_is_the_padding_or_the_start() -> None:
    tokens = replace(fake_config().tokens, other_eos=(fake_config().tokens.bos, 9))
    assert never_sampled(tokens) == {tokens.image, tokens.pad}
    tokens = replace(tokens, other_eos=(), pad=tokens.eos)
    assert never_sampled(tokens) == {tokens.image, tokens.bos}
