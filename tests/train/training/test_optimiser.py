"""Table 11: what learns, how fast, and with which decay."""

from __future__ import annotations

import json
import math

import pytest
import torch

from mmi_deploy.spec.presets import released_13b
from mmi_train.checkpoint_import.published import DerivedConstant, rename
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.training.optimiser import (
    TABLE_11,
    GroupRule,
    OptimiserConfig,
    parameter_groups,
    set_rate,
)

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
