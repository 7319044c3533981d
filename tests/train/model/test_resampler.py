"""Resamplers: Flamingo's against float64 NumPy, BLIP-2's against transformers' own Q-Former."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import ResamplerConfig
from mmi_deploy.spec.presets import tiny
from mmi_train.checkpoint_import.published.vision import qformer_rules
from mmi_train.model import resampler as module
from mmi_train.model.attention import attend
from mmi_train.model.positions import table_1d
from mmi_train.model.resampler import Resampler
from oracles import resampler_float64

PERCEIVER = ResamplerConfig(
    form="perceiver",
    queries=6,
    width=32,
    context_width=20,
    layers=3,
    heads=4,
    mlp_width=48,
    eps=1e-6,
)
QFORMER = replace(PERCEIVER, form="qformer", layers=4, cross_every=2, qk_norm=True, eps=1e-12)


def shaken(resampler: Resampler) -> Resampler:
    """With every parameter moved off its starting value, so that none can be left out unseen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in resampler.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return resampler.eval()


@pytest.mark.parametrize("context_width", [32, 20], ids=["own width", "projected"])
def test_perceiver_equals_flamingo_appendix_a11(agree, context_width):
    config = replace(PERCEIVER, context_width=context_width)
    resampler = shaken(Resampler(config))
    context = torch.randn(2, 9, context_width, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        actual = resampler(context)
    state = {name: value.double().numpy() for name, value in resampler.state_dict().items()}
    expected = [
        resampler_float64.perceiver(
            state, row.double().numpy(), config.layers, config.heads, config.eps
        )
        for row in context
    ]
    agree(actual, np.stack(expected), 1e-5)


def test_qformer_without_qk_norm_equals_transformers_blip2(agree):
    config = replace(QFORMER, qk_norm=False)
    theirs = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.mlp_width,
            encoder_hidden_size=config.context_width,
            cross_attention_frequency=config.cross_every,
            layer_norm_eps=config.eps,
        )
    ).eval()
    ours = shaken(Resampler(config))
    names = {f"blip2qformer.{name}": name for name in theirs.state_dict()}
    named = {}
    for pattern, replacement in qformer_rules("", ""):
        for published, name in names.items():
            if match := re.fullmatch(pattern, published):
                named[name] = ours.state_dict()[match.expand(replacement)]
    theirs.load_state_dict(named)  # strict: each of their tensors has one here
    assert len(named) == len(ours.state_dict()) - 1  # the queries are an input of theirs

    context = torch.randn(3, 7, config.context_width, generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3, [True] * 1 + [False] * 6])
    with torch.no_grad():
        expected = theirs(
            query_embeds=ours.queries.expand(3, -1, -1),
            encoder_hidden_states=context,
            encoder_attention_mask=mask.long(),
        ).last_hidden_state
        agree(ours(context, mask), expected, 1e-5)


@pytest.mark.parametrize("config", [PERCEIVER, QFORMER], ids=lambda config: config.form)
def test_padding_of_the_context_has_no_effect(agree, config):
    resampler = shaken(Resampler(config))
    generator = torch.Generator().manual_seed(4)
    context = torch.randn(2, 5, config.context_width, generator=generator)
    padding = 100 * torch.randn(2, 3, config.context_width, generator=generator)
    mask = torch.tensor([True] * 5 + [False] * 3).expand(2, -1)
    with torch.no_grad():
        bare = resampler(context)
        agree(resampler(torch.cat([context, padding], 1), mask), bare, 1e-5)
        seen = resampler(torch.cat([context, padding], 1))
    assert (seen - bare).abs().max() > 0.1  # so the mask is what hides it


@pytest.mark.parametrize("config", [PERCEIVER, QFORMER], ids=lambda config: config.form)
def test_training_on_a_cpu_computes_the_same_and_reaches_every_parameter(agree, config):
    resampler = shaken(Resampler(config)).double()
    context = torch.randn(2, 5, config.context_width, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    with torch.no_grad():
        fused = resampler(context, mask)
    written_out = resampler(context, mask)
    agree(written_out, fused, 1e-12)
    (written_out * torch.randn_like(written_out)).sum().backward()
    for name, parameter in resampler.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A bias of keys moves all logits of a query alike: softmax does not see it.
        if not name.endswith(("key_proj.bias", "key_norm.bias")):
            assert parameter.grad.abs().max() > 1e-9, name


def test_a_query_that_may_see_nothing_sees_all_alike(agree):
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 2, 3, 4, generator=generator) for _ in range(3))
    nothing = torch.zeros(1, 1, 1, 3, dtype=torch.bool)
    mean = v.mean(2, keepdim=True).expand_as(v)
    agree(attend(q, k, v, nothing), mean, 1e-6)
    agree(attend(q.requires_grad_(), k, v, nothing), mean, 1e-6)


def test_queries_started_at_positions_look_at_the_tokens_there(monkeypatch):
    config = tiny().image_decoder.resampler
    positions = table_1d(64, config.context_width)
    generator = torch.Generator().manual_seed(6)
    noise = 0.6 * torch.randn(4, 48, config.context_width, generator=generator)
    near = {}
    for name, start in (("positions", positions[: config.queries]), ("noise", None)):
        torch.manual_seed(0)
        weights = []

        def spy(q, k, v, mask, dropout, weights=weights):
            weights.append(
                (q.detach() @ k.detach().transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
            )
            return attend(q, k, v, mask, dropout)

        monkeypatch.setattr(module, "attend", spy)
        Resampler(config, start)(noise + positions[:48])
        j = torch.arange(2, config.queries - 2)
        first = weights[0]
        near[name] = sum(float(first[:, :, j, j + step].mean()) for step in range(-2, 3))
    assert near["positions"] > 0.5 and near["noise"] < 0.15


def test_contradicting_configurations_are_refused():
    with pytest.raises(ConfigError, match="qk_norm"):
        Resampler(replace(PERCEIVER, qk_norm=True))
    with pytest.raises(ConfigError, match="perceiver"):
        Resampler(QFORMER, table_1d(QFORMER.queries, QFORMER.context_width))
