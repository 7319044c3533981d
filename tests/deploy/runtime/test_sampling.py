"""Text sampling against transformers' logits processors, draws against their distribution."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deploy.runtime.fake_model import fake_config
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime import sampling as sampling_module
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.sampling import (
    Sampled,
    SampleRequest,
    TextSampling,
    candidates,
    draw,
    inverse_cdf,
    never_sampled,
    sample,
    sample_rows,
    softmax,
)
from oracles import sorted_sampling as oracle

VOCAB = 300
SETTINGS = [
    TextSampling(0.7, 0, 0.9, 1.3),
    TextSampling(1.0, 20, 1.0, 1.0),
    TextSampling(1.6, 7, 0.5, 0.8),
    TextSampling(1.0, 1000, 0.05, 1.1),
    TextSampling(1.0, min_p=0.02),
    TextSampling(1.7, 0, 0.8, 1.2, min_p=0.3, logit_bias={7: 5.0, 9: -100, 30: 2.5}),
    TextSampling(0.9, 12, 0.95, 0.9, min_p=1.0, logit_bias={0: 9.5}),
]


def transformers_probabilities(
    logits: np.ndarray, how: TextSampling, seen: list[int], banned: list[int]
) -> np.ndarray:
    processors = LogitsProcessorList()
    if how.logit_bias:
        bias = {(token,): float(value) for token, value in dict(how.logit_bias).items()}
        processors.append(SequenceBiasLogitsProcessor(bias))
    processors += [
        RepetitionPenaltyLogitsProcessor(how.repetition_penalty),
        SuppressTokensLogitsProcessor(banned, device="cpu"),
        TemperatureLogitsWarper(how.temperature),
    ]
    if how.top_k:
        processors.append(TopKLogitsWarper(how.top_k))
    if how.top_p < 1:
        processors.append(TopPLogitsWarper(how.top_p))
    if how.min_p:
        processors.append(MinPLogitsWarper(how.min_p))
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
    kept = {sample(logits, how, x, seen=seen, banned=banned) for x in np.linspace(0, 0.9999, 999)}
    assert kept <= set(np.flatnonzero(expected).tolist())
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
    how = TextSampling(0.5, 3, 0.5, 2.0, 0.1, 0.5, 0.5, {3: 1.0}, logprobs=3)
    sample(logits, how, 0.3, seen=[1, 8], banned=[2])
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


# --- the same token as by sorting -----------------------------------------------------------------


def logits_of(kind: str, vocab: int, generator: np.random.Generator) -> np.ndarray:
    logits = generator.standard_normal(vocab)
    if kind == "peaked":
        logits[generator.integers(0, vocab, 12)] += np.linspace(6, 18, 12)
    elif kind == "spread":
        logits *= 3
    elif kind == "flat":
        logits *= 1e-3
    elif kind == "tied":
        logits = np.round(logits * 4) / 4
    elif kind == "equal":
        logits[:] = 0.25
    elif kind == "banned":
        logits[generator.random(vocab) < 0.7] = -np.inf
    return logits.astype(np.float32)


def check_draws(kind: str, vocab: int, mass: float, draws: int, seed: int) -> int:
    """Compare random draws from one vector of logits, and those at its edges, with the oracle.

    Returns the number of draws."""
    generator = np.random.default_rng(seed)
    logits = logits_of(kind, vocab, generator)
    expected = oracle.keep_top_p(logits, mass)
    kept = candidates(logits, TextSampling(top_p=mass))
    if kept is None:
        assert mass == 1
    else:
        np.testing.assert_array_equal(kept, np.flatnonzero(expected > -np.inf))
    edges = np.cumsum(oracle.softmax(expected))
    some = generator.choice(edges[edges < 1], 5)
    edge = np.concatenate([np.nextafter(some, 0), some, np.nextafter(some, 1), [0.0]])
    uniforms = np.concatenate([generator.random(draws), edge[edge < 1]])
    tokens = [draw(logits, kept, uniform) for uniform in uniforms.tolist()]
    np.testing.assert_array_equal(tokens, oracle.draw(expected, uniforms))
    # The whole call gives the token of its parts.
    how = TextSampling(top_p=mass)
    assert sample(logits, how, float(uniforms[0])) == tokens[0]
    return len(uniforms)


KINDS = ("peaked", "spread", "normal", "flat", "tied", "equal", "banned")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocab", "vectors"), [(111, 30), (32_004, 4), (151_936, 1)])
def test_every_draw_is_that_of_sorting_the_vocabulary(kind: str, vocab: int, vectors: int) -> None:
    for seed in range(vectors):
        mass = (0.9, 0.5, 0.99, 1.0)[seed % 4]
        check_draws(kind, vocab, mass, draws=60, seed=seed)


@pytest.mark.parametrize("vocab", [10, 255, 256, 257, 512, 3000])
def test_top_p_at_the_edge_of_rounding_is_that_of_sorting(vocab: int) -> None:
    """A mass that is a cumulative sum, or next to it: sums in another order would differ."""
    for kind in KINDS:
        logits = logits_of(kind, vocab, np.random.default_rng(vocab))
        sums = np.cumsum(oracle.softmax(np.sort(logits)))
        for place in (0, 1, vocab // 3, vocab // 2, vocab - 3, vocab - 2):
            for mass in (1 - sums[place], np.nextafter(1 - sums[place], 0), 1 - sums[place] / 2):
                if not 0 < mass < 1:
                    continue
                kept = candidates(logits, TextSampling(top_p=float(mass)))
                expected = np.flatnonzero(oracle.keep_top_p(logits, float(mass)) > -np.inf)
                np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_top_k_before_top_p_is_that_of_sorting(kind: str) -> None:
    generator = np.random.default_rng(7)
    for count in (1, 2, 7, 100, 299, 300):
        logits = logits_of(kind, 300, generator)
        temperature = np.float32(generator.uniform(0.3, 3))
        for mass in (*generator.random(5).tolist(), 0.5, 0.9):
            expected = oracle.keep_top_p(oracle.keep_top_k(logits / temperature, count), mass)
            uniforms = generator.random(20)
            how = TextSampling(float(temperature), count, mass)
            tokens = [sample(logits, how, uniform) for uniform in uniforms.tolist()]
            np.testing.assert_array_equal(tokens, oracle.draw(expected, uniforms))


def test_sums_of_blocks_decide_all_but_the_draws_at_an_edge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact: list[float] = []

    def counted(probabilities: np.ndarray, uniform: float) -> int:
        exact.append(uniform)
        return inverse_cdf(probabilities, uniform)

    monkeypatch.setattr(sampling_module, "inverse_cdf", counted)
    logits = logits_of("normal", 1000, np.random.default_rng(0))
    for uniform in np.random.default_rng(1).random(200).tolist():
        draw(logits, None, uniform)
    assert not exact
    edge = float(np.cumsum(oracle.softmax(logits))[500])
    draw(logits, None, edge)
    assert exact == [edge]


def test_top_p_keeps_the_larger_ids_of_equal_logits_and_top_k_all_of_them() -> None:
    logits = np.array([1, 2, 1, 1, 2, 1], np.float32)
    kept = candidates(logits, TextSampling(top_p=0.7))  # the two 2s have 0.576, a 1 0.106
    assert kept is not None and kept.tolist() == [1, 3, 4, 5]
    kept = candidates(logits, TextSampling(top_k=3))
    assert kept is not None and kept.tolist() == [0, 1, 2, 3, 4, 5]
    kept = candidates(logits, TextSampling(top_k=2, top_p=0.4))
    assert kept is not None and kept.tolist() == [4]
    kept = candidates(logits, TextSampling(min_p=1.0))
    assert kept is not None and kept.tolist() == [1, 4]


# --- rows -----------------------------------------------------------------------------------------


def requests_of(generator: np.random.Generator, vocab: int, count: int) -> list[SampleRequest]:
    hows = [
        TextSampling(),
        TextSampling(temperature=0, presence_penalty=1.5, logprobs=0),
        TextSampling(0.7, 0, 0.9, 1.3, logprobs=5),
        TextSampling(1.2, 40, 0.8, min_p=0.1, frequency_penalty=-0.7),
        TextSampling(1.0, 0, 0.9, logit_bias={3: 4.0}, logprobs=20),
    ]
    return [
        SampleRequest(
            hows[int(generator.integers(len(hows)))],
            float(generator.random()),
            tuple(generator.integers(0, vocab, 20).tolist()),
            frozenset(generator.integers(0, vocab, 3).tolist()),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("vocab", [111, 1003, 32_004])
def test_a_row_is_sampled_the_same_alone_and_among_any_neighbours(vocab: int) -> None:
    """Bit for bit, whatever the neighbours' logits, NaN and infinity too, and options."""
    generator = np.random.default_rng(vocab)
    kinds = [KINDS[i % len(KINDS)] for i in range(9)]
    rows = np.stack([logits_of(kind, vocab, generator) for kind in kinds])
    requests = requests_of(generator, vocab, len(rows))
    alone = [sample_rows(row[None].copy(), [r])[0] for row, r in zip(rows, requests, strict=True)]
    assert sample_rows(rows, requests) == alone
    order = generator.permutation(len(rows)).tolist()
    assert sample_rows(rows[order], [requests[i] for i in order]) == [alone[i] for i in order]
    broken = rows.copy()
    broken[1::2, vocab // 3] = np.nan
    broken[3::4, 5] = np.inf
    with np.errstate(all="ignore"):
        assert sample_rows(broken, requests)[::2] == alone[::2]


def test_sample_is_one_row_and_rows_want_as_many_requests() -> None:
    logits = logits_of("spread", 500, np.random.default_rng(3))
    for request in requests_of(np.random.default_rng(4), 500, 20):
        token = sample(
            logits, request.sampling, request.uniform, seen=request.seen, banned=request.banned
        )
        assert [x.token for x in sample_rows(logits[None], [request])] == [token]
    with pytest.raises(ValueError, match="shorter"):
        sample_rows(np.stack([logits, logits]), [SampleRequest(TextSampling(), 0.5)])


# --- penalties, bias, log probabilities -----------------------------------------------------------


def test_presence_and_frequency_penalties_are_those_of_openai() -> None:
    """logit - count x frequency - (count > 0) x presence, before the temperature."""
    generator = np.random.default_rng(5)
    for _ in range(50):
        logits = generator.standard_normal(40).astype(np.float32)
        seen = generator.integers(0, 40, 60).tolist()
        presence, frequency = (float(x) for x in generator.uniform(-2, 2, 2))
        expected = logits.astype(np.float64)
        for token, count in Counter(seen).items():
            expected[token] -= count * frequency + presence
        how = TextSampling(0.5, presence_penalty=presence, frequency_penalty=frequency)
        edges = np.cumsum(softmax((expected / 0.5).astype(np.float32)))
        for uniform in generator.random(20):
            if np.abs(edges - uniform).min() > 1e-5:
                token = sample(logits, how, float(uniform), seen=seen)
                assert token == np.searchsorted(edges, uniform, side="right")
    greedy = TextSampling(0, presence_penalty=1.0)
    assert sample(np.array([2.0, 1.5], np.float32), greedy, 0.0, seen=[0, 0, 0]) == 1
    greedy = TextSampling(0, frequency_penalty=0.2)
    assert sample(np.array([2.0, 1.5], np.float32), greedy, 0.0, seen=[0, 0]) == 0
    assert sample(np.array([2.0, 1.5], np.float32), greedy, 0.0, seen=[0, 0, 0]) == 1


def test_a_bias_forces_a_token_or_excludes_it_and_a_ban_is_stronger() -> None:
    logits = np.array([3.0, 2.0, 1.0, 0.0], np.float32)
    for how in (TextSampling(0, logit_bias={3: 100}), TextSampling(logit_bias={3: 100})):
        assert sample(logits, how, 0.999) == 3
        assert sample(logits, how, 0.0, banned=[3]) == 0
    assert sample(logits, TextSampling(0, logit_bias={0: -100}), 0.5) == 1
    with pytest.raises(ConfigError, match="beyond the model's vocabulary; expected 0 to 3; got 4"):
        sample(logits, TextSampling(logit_bias={1: 1, 4: 0.5}), 0.5)


def test_log_probabilities_are_the_models_whatever_the_options() -> None:
    logits = (2 * np.random.default_rng(6).standard_normal(900)).astype(np.float32)
    expected = torch.from_numpy(logits).double().log_softmax(-1)
    top = expected.topk(20)
    seen, banned = (1, 2, 3), frozenset({int(top.indices[0])})
    for count in (None, 0, 1, 20):
        how = TextSampling(0.5, 9, 0.9, 1.5, 0.1, 1.0, 1.0, {4: -9}, logprobs=count)
        (sampled,) = sample_rows(logits[None], [SampleRequest(how, 0.4, seen, banned)])
        silent = replace(how, logprobs=None)
        assert sampled.token == sample(logits, silent, 0.4, seen=seen, banned=banned)
        if count is None:
            assert sampled == Sampled(sampled.token)
            continue
        assert sampled.logprob == pytest.approx(float(expected[sampled.token]), abs=1e-12)
        assert [token for token, _ in sampled.top] == top.indices[:count].tolist()
        np.testing.assert_allclose([x for _, x in sampled.top], top.values[:count], atol=1e-12)


def test_top_log_probabilities_come_with_ties_by_id_and_no_more_than_there_are() -> None:
    logits = np.array([[1, 3, 1, 3, 1]], np.float32)
    for count, ids in ((1, [1]), (3, [1, 3, 0]), (4, [1, 3, 0, 2]), (20, [1, 3, 0, 2, 4])):
        request = SampleRequest(TextSampling(logprobs=count), 0.0)
        assert [token for token, _ in sample_rows(logits, [request])[0].top] == ids


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"min_p": -0.1}, "min_p is out of range; expected 0 to 1; got -0.1"),
        ({"min_p": float("nan")}, "min_p is out of range"),
        ({"presence_penalty": 2.5}, "presence_penalty is out of range; expected -2 to 2"),
        ({"frequency_penalty": -2.5}, "frequency_penalty is out of range; expected -2 to 2"),
        ({"logit_bias": {3: 101}}, "logit_bias is out of range; expected biases of -100 to 100"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias is out of range"),
        ({"logit_bias": {-1: 1}}, "logit_bias is out of range; expected token ids of 0 or more"),
        ({"logit_bias": {"3": 1}}, "logit_bias has the wrong type; expected a mapping"),
        ({"logit_bias": {3.0: 1}}, "logit_bias has the wrong type"),
        ({"logit_bias": {3: "1"}}, "logit_bias has the wrong type"),
        ({"logit_bias": [3, 1]}, "logit_bias has the wrong type"),
        ({"logit_bias": ((3, 1), (3, 2))}, "logit_bias has the wrong type"),
        ({"logit_bias": None}, "logit_bias has the wrong type"),
    ],
    ids=str,
)
def test_wrong_options_of_sampling_are_refused(options: dict[str, Any], line: str) -> None:
    for kind in (TextSampling, GenerationOptions):
        with pytest.raises(ConfigError, match=line):
            kind(**options)


@pytest.mark.parametrize(
    ("count", "line"), [(-1, "0 to 20; got -1"), (21, "0 to 20; got 21"), (True, "whole number")]
)
def test_wrong_numbers_of_log_probabilities_are_refused(count: int, line: str) -> None:
    for kind in (TextSampling, GenerationOptions):
        with pytest.raises(ConfigError, match=f"logprobs .*{line}"):
            kind(logprobs=count)


def test_options_with_a_bias_are_frozen_and_compare_by_value() -> None:
    given: dict[Any, Any] = {9: 1, np.int64(2): np.float32(-0.5)}
    options = GenerationOptions(logit_bias=given, min_p=0.1)
    given[5] = 2
    assert options.logit_bias == ((2, -0.5), (9, 1.0)) == options.sampling.logit_bias
    pairs: Any = [(9, 1), (2, -0.5)]
    same = GenerationOptions(logit_bias=pairs, min_p=0.1)
    assert same == options and hash(same) == hash(options)
    assert replace(options, seed=1).logit_bias == options.logit_bias
