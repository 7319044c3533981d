"""Table 11: what learns, how fast, and with which decay."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.presets import released_13b, tiny
from mmi_train.checkpoint_import.published import DerivedConstant, rename
from mmi_train.data.synthetic.drawn_world import DrawnWorld
from mmi_train.data.synthetic.vocabulary import build_tokenizer
from mmi_train.data.synthetic.world import easy
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.training.optimiser import (
    GROUPS,
    TABLE_11,
    GroupRule,
    OptimiserConfig,
    parameter_groups,
    set_rate,
)
from mmi_train.training.stages.interleaved import InterleavedStage

PUBLISHED = OptimiserConfig(
    rate=1e-4, steps=15000, warmup=1000, weight_decay=0.05, betas=(0.9, 0.995), eps=1e-6
)


@pytest.fixture(scope="module")
def released() -> MMInterleaved:
    with torch.device("meta"):
        return MMInterleaved(released_13b())


@pytest.fixture(scope="module")
def settings(released: MMInterleaved) -> dict[str, tuple[float, float]]:
    """(rate, decay) of every parameter that learns."""
    names = {parameter: name for name, parameter in released.named_parameters()}
    groups = parameter_groups(released, PUBLISHED)
    return {
        names[parameter]: (1e-4 * group["rate"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }


def test_frozen_parameters_are_those_of_the_published_run(released, settings, golden_file):
    expected = json.loads(golden_file("release_requires_grad.json").read_text())
    differing = []
    for published, learns in expected.items():
        ours = rename(published)
        if not isinstance(ours, DerivedConstant) and (ours in settings) != learns:
            differing.append(ours)
    assert differing == []


@pytest.mark.parametrize(
    ("name", "rate", "decay"),
    [
        ("llm.layers.0.look_back.gate", 1e-4, 0.0),
        ("llm.layers.0.look_back.mmfs.offset_proj.weight", 1e-5, 0.0),
        ("llm.layers.4.look_back.mmfs.value_proj.weight", 1e-4, 0.05),
        ("llm.layers.4.look_back.mmfs.value_proj.bias", 1e-4, 0.0),
        ("image_decoder.unet.conv_in.weight", 1e-5, 0.05),
        ("image_decoder.unet.look_back.5.mmfs.offset_proj.weight", 1e-5, 0.0),
        ("image_decoder.unet.look_back.5.conv.weight", 1e-4, 0.05),
        ("image_decoder.null_condition", 1e-4, 0.05),
        ("head.head_new.weight", 1e-4, 0.05),
    ],
)
def test_groups_are_those_of_table_11(settings, name, rate, decay):
    assert settings[name] == pytest.approx((rate, decay))


def test_all_trained_tensors_have_the_published_decay(released, settings):
    """Decayed are weights, but for those of `LayerNorm` itself; gates and offsets are not."""
    assert len(settings) == 1628
    for name, (rate, decay) in settings.items():
        holder, _, kind = name.rpartition(".")
        norm = type(released.get_submodule(holder)) is torch.nn.LayerNorm
        spared = kind == "bias" or norm or "offset_proj" in name or name.endswith("look_back.gate")
        assert decay == (0.0 if spared else 0.05), name
        slow = "offset_proj" in name or (
            name.startswith("image_decoder.unet.") and ".look_back." not in name
        )
        assert rate == pytest.approx(1e-5 if slow else 1e-4), name
    assert settings["vision.encoder.spatial_prior.stem.1.weight"] == pytest.approx((1e-4, 0.05))


def test_rules_hold_in_every_stage():
    """Though a stage with auxiliary heads has the model's names behind one of its own."""
    with torch.device("meta"):
        model = MMInterleaved(tiny())
        stage = InterleavedStage(model, build_tokenizer(), DrawnWorld(easy()))
    rules = tuple(rule for rule in TABLE_11 if "null_value" not in rule.pattern)
    parameter_groups(stage.module, replace(PUBLISHED, rules=rules))
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert {name.split(".")[0] for name in frozen} >= {"llm", "image_decoder", "vision", "head"}
    assert "head.head.weight" in frozen and "llm.embed_tokens.weight" in frozen


def test_a_rule_that_matches_nothing_is_refused():
    model = torch.nn.ModuleDict({"offset": torch.nn.Linear(2, 2)})
    rules = (GroupRule("offset"), GroupRule(r"^lm\."))
    with pytest.raises(ConfigError, match=r"match no parameter.*\^lm"):
        parameter_groups(model, replace(PUBLISHED, rules=rules))


def test_the_first_matching_rule_wins():
    model = torch.nn.ModuleDict({"offset": torch.nn.Linear(2, 2)})
    config = OptimiserConfig(
        **{**PUBLISHED.__dict__, "rules": (GroupRule("offset", rate=0.5), GroupRule("", rate=0.0))}
    )
    assert {group["rate"] for group in parameter_groups(model, config)} == {0.5}
    assert TABLE_11[0].rate == 0


def test_cosine_schedule_warms_up_and_ends_at_zero():
    optimiser = torch.optim.SGD([{"params": [torch.zeros(1)], "rate": 0.1}], lr=1.0)
    assert set_rate(optimiser, PUBLISHED, 0) == pytest.approx(1e-7)
    assert set_rate(optimiser, PUBLISHED, 999) == pytest.approx(1e-4)
    halfway = set_rate(optimiser, PUBLISHED, 8000)
    assert halfway == pytest.approx(1e-4 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert optimiser.param_groups[0]["lr"] == pytest.approx(halfway * 0.1)
    assert set_rate(optimiser, PUBLISHED, 15000) == pytest.approx(0.0, abs=1e-12)


# Base rate of each table.
BASE = {"table_11": 1e-4, "table_12": 1e-5, "table_13": 2e-5, "table_14": 1e-4, "table_15": 1e-5}

# Of each table: rates of the language model, the image decoder and everything else; 0: frozen.
RATES = {
    "table_11": (0.0, 1e-5, 1e-4),
    "table_12": (1e-6, 1e-5, 1e-5),
    "table_13": (2e-5, 2e-5, 2e-5),
    "table_14": (0.0, 1e-5, 1e-4),
    "table_15": (0.0, 1e-4, 1e-5),
}
FROZEN = (
    "image_decoder.vae.",
    "vision.encoder.embeddings.",
    "vision.encoder.pre_norm.",
    "vision.encoder.layers.",
)


@pytest.mark.parametrize("name", RATES)
def test_every_tensor_has_the_rate_and_decay_of_its_table(released, name):
    """The published sizes; decayed are all but biases and the weights of `LayerNorm`."""
    llm, decoder, others = RATES[name]
    config = replace(PUBLISHED, rate=BASE[name], rules=GROUPS[name])
    names = {parameter: own for own, parameter in released.named_parameters()}
    found = {
        names[parameter]: (config.rate * group["rate"], group["weight_decay"])
        for group in parameter_groups(released, config)
        for parameter in group["params"]
    }
    counted = {"llm": 0, "decoder": 0, "others": 0}
    for own, parameter in released.named_parameters():
        unread = own.startswith("image_decoder.unet.look_back.") and own.endswith("null_value")
        if own.startswith(FROZEN) or unread:
            part, rate = "frozen", 0.0
        elif own.startswith("head.head.") or own.startswith("llm.") and "look_back" not in own:
            part, rate = "llm", llm
        elif own.startswith("image_decoder."):
            part, rate = "decoder", decoder
        else:
            part, rate = "others", others
        assert parameter.requires_grad == (rate > 0) == (own in found), own
        if not rate:
            continue
        counted[part] += parameter.numel()
        holder, _, kind = own.rpartition(".")
        norm = type(released.get_submodule(holder)) is torch.nn.LayerNorm
        decay = 0.0 if kind == "bias" or norm else 0.05
        assert found[own] == (pytest.approx(rate, rel=1e-12), decay), own
    # Millions of parameters in the published module tree (13 016 of the language model).
    assert counted["llm"] == pytest.approx(13_016e6 if llm else 0, rel=2e-3)
    assert counted["decoder"] == pytest.approx(972e6, rel=5e-3)
    assert counted["others"] == pytest.approx(493e6, rel=5e-3)


@pytest.mark.parametrize("name", GROUPS)
def test_every_table_suits_models_without_some_of_the_parts(name):
    """The tiny model has no null values; a stage holds the model behind a name of its own."""
    with torch.device("meta"):
        model = MMInterleaved(tiny())
        stage = InterleavedStage(model, build_tokenizer(), DrawnWorld(easy()))
    parameter_groups(model, replace(PUBLISHED, rules=GROUPS[name]))
    learns = {own for own, value in model.named_parameters() if value.requires_grad}
    assert learns
    parameter_groups(stage.module, replace(PUBLISHED, rules=GROUPS[name]))
    assert learns == {own for own, value in model.named_parameters() if value.requires_grad}
