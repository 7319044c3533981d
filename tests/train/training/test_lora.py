"""Adapters: what learns, what they compute, and that they merge into the weights exactly."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from export.small_models import paper_reading, random_model, released_reading
from mmi_deploy.errors import ConfigError, MmiError, WeightsError
from mmi_deploy.spec.config import ModelConfig
from mmi_train.model.mm_interleaved import Batch, MMInterleaved
from mmi_train.training.checkpoints import latest_checkpoint, learning
from mmi_train.training.loop import RunConfig, train
from mmi_train.training.lora import (
    ABOUT,
    ADAPTERS,
    LoraConfig,
    adapted_layers,
    add_adapters,
    load_adapters,
    lora_rules,
    read_adapters,
    trained_adapters,
)
from mmi_train.training.merging import merge
from mmi_train.training.optimiser import GroupRule, OptimiserConfig, parameter_groups
from mmi_train.weights.model_folder import WEIGHTS, fingerprint, load_model, save_model

SMALL = LoraConfig(rank=3, alpha=5.0)
GATES = GroupRule(r"look_back\.gate$", rate=0.5, decay=0.0)
OPTIMISER = OptimiserConfig(
    rate=1e-2,
    steps=3,
    warmup=1,
    weight_decay=0.01,
    betas=(0.9, 0.99),
    eps=1e-8,
    rules=lora_rules(GATES),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder in fp32."""
    folder = tmp_path_factory.mktemp("base")
    save_model(random_model(paper_reading()), folder)
    return folder


def batch_of(model: MMInterleaved) -> Batch:
    """A row with two pictures, the second of which is drawn from text and an image."""
    tokens = model.config.tokens
    image = [tokens.boi, *[tokens.image] * model.config.visual_tokens]
    draw = torch.Generator().manual_seed(4)
    side, size = model.config.vision.image_size, model.config.image_decoder.image_size
    return Batch(
        torch.tensor([[tokens.bos, 9, *image, 8, *image, 7, tokens.eos]]),
        torch.tensor([[0, 1]]),
        torch.rand(2, 3, side, side, generator=draw),
        pictures=torch.tensor([[0, 1]]),
        target_pixels=torch.rand(1, 3, size, size, generator=draw),
    )


def losses(model: MMInterleaved) -> tuple[Tensor, Tensor]:
    draws = model.image_decoder.random_draws(1, torch.Generator().manual_seed(5))
    draws = replace(draws, drop=torch.ones(1))
    with torch.no_grad():
        found = model.eval()(batch_of(model), draws=draws)
    return found.text, found.image


def move(model: nn.Module, chosen: Callable[[str], bool] = lambda name: True) -> None:
    """Give adapters something to add: B starts at zero."""
    draw = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name and chosen(name):
                value.copy_(0.1 * torch.randn(value.shape, generator=draw))


def test_layers_are_the_matrices_of_the_two_parts():
    config = paper_reading()
    with torch.device("meta"):
        model = MMInterleaved(config)
    llm = adapted_layers(model, LoraConfig(layers=("llm",)))
    assert len(llm) == 7 * config.llama.layers
    unet = adapted_layers(model, LoraConfig(layers=("unet",)))
    # Four matrices in each of two attentions, two in the feed-forward layer.
    assert len(unet) == 10 * len(config.image_decoder.unet.cross_attention_widths)
    assert adapted_layers(model, LoraConfig()) == llm + unet
    few = adapted_layers(model, LoraConfig(layers=(r"llm\.layers\.1\.mlp\..*", "unet")))
    assert few[:3] == [f"llm.layers.1.mlp.{kind}_proj" for kind in ("gate", "up", "down")]
    assert few[3:] == unet


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "llm.q_proj",
            r"no linear layer .* called 'llm.q_proj'; expected llm or unet, or a regular",
        ),
        ("vision.encoder", "no linear layer"),
        ("(", "no pattern of names"),
        (r"llm\..*", r"llm\.layers\.0\.look_back\..* cannot have an adapter"),
        (r"head\.head", "head.head cannot have an adapter"),
    ],
)
def test_layers_that_cannot_be_chosen_are_told(pattern: str, message: str):
    with torch.device("meta"):
        model = MMInterleaved(paper_reading())
    with pytest.raises(ConfigError, match=message) as caught:
        adapted_layers(model, LoraConfig(layers=(pattern,)))
    assert "\n" not in str(caught.value)


def test_only_adapters_and_what_rules_name_learn_and_nothing_is_copied(base):
    model = load_model(base, matrices=lambda name, stored: torch.bfloat16)
    before = {name: value.data_ptr() for name, value in model.named_parameters()}
    layers = add_adapters(model, SMALL)
    after = {name.replace(".base_layer", ""): v.data_ptr() for name, v in model.named_parameters()}
    assert before.items() <= after.items()
    adapters = {f"{layer}.lora_{half}.adapter.weight" for layer in layers for half in "AB"}
    learns = {name for name, value in model.named_parameters() if value.requires_grad}
    assert learns == adapters == after.keys() - before.keys()
    assert {dict(model.named_parameters())[name].dtype for name in learns} == {torch.float32}
    groups = parameter_groups(model, OPTIMISER)
    gates = {name for name in before if name.endswith("look_back.gate")}
    learns = {name for name, value in model.named_parameters() if value.requires_grad}
    assert gates and learns == adapters | gates == learning(model).keys()
    sizes = {group["rate"]: len(group["params"]) for group in groups}
    assert sizes == {1.0: len(adapters), 0.5: len(gates)}
    # A rule cannot thaw a matrix that has an adapter.
    parameter_groups(model, replace(OPTIMISER, rules=lora_rules(GroupRule(r"^llm\."))))
    own = dict(model.named_parameters())
    assert not own["llm.layers.0.mlp.up_proj.base_layer.weight"].requires_grad
    assert own["llm.norm.weight"].requires_grad


def test_new_adapters_change_nothing_and_are_the_same_every_time(base):
    model = load_model(base)
    wanted = losses(model)
    state = torch.random.get_rng_state()
    add_adapters(model, SMALL)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(losses(model), wanted, rtol=0, atol=0)
    other = load_model(base)
    add_adapters(other, SMALL)
    assert all(torch.equal(v, learning(other)[name]) for name, v in learning(model).items())


@pytest.mark.parametrize(
    ("config", "part"),
    [(paper_reading, "llm"), (paper_reading, "unet"), (released_reading, "both")],
)
def test_the_merged_model_computes_what_the_adapted_one_does(
    config: Callable[[], ModelConfig], part: str, tmp_path: Path
):
    save_model(random_model(config()), tmp_path / "base")
    model = load_model(tmp_path / "base")
    plain = losses(model)
    add_adapters(model, SMALL)
    start = {"llm": "llm.", "unet": "image_decoder.", "both": ""}[part]
    move(model, lambda name: name.startswith(start))
    wanted = losses(model)
    moved = [not torch.equal(a, b) for a, b in zip(wanted, plain, strict=True)]
    assert moved == [part != "unet", True]
    trained_adapters(SMALL, tmp_path / "base", learning(model)).save(tmp_path)
    merge(tmp_path / "base", tmp_path, tmp_path / "merged")
    found = losses(load_model(tmp_path / "merged"))
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merged_weights_are_rounded_once(base, tmp_path, dtype):
    """base + scale * B A in fp32, whatever type the run held the base in."""
    save_model(load_model(base), tmp_path / "base", dtype)
    model = load_model(tmp_path / "base", matrices=lambda name, stored: torch.bfloat16)
    layers = add_adapters(model, SMALL)
    move(model)
    state = learning(model)
    trained_adapters(SMALL, tmp_path / "base", state).save(tmp_path)
    merge(tmp_path / "base", tmp_path, tmp_path / "merged")
    before, after = (load_file(tmp_path / part / WEIGHTS) for part in ("base", "merged"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        if (layer := name.removesuffix(".weight")) in layers:
            up, down = (state[f"{layer}.lora_{half}.adapter.weight"] for half in "BA")
            value = (value.float() + 5.0 / 3 * (up @ down)).to(dtype)
        assert torch.equal(after[name], value), name


def test_adapters_are_kept_apart_and_read_back(base, tmp_path):
    model = load_model(base)
    add_adapters(model, SMALL)
    parameter_groups(model, OPTIMISER)
    move(model)
    with torch.no_grad():
        model.llm.layers[0].look_back.gate.fill_(0.3)
    wanted = losses(model)
    trained_adapters(SMALL, base, learning(model)).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {ADAPTERS, ABOUT}
    stored = load_file(tmp_path / ADAPTERS)
    assert stored["llm.layers.0.self_attn.q_proj.lora_A"].shape == (3, model.config.llama.width)
    assert not [name for name in stored if "base_layer" in name or "adapter" in name]
    adapters = read_adapters(tmp_path)
    assert adapters.config == SMALL
    other = load_model(base)
    load_adapters(other, adapters)
    torch.testing.assert_close(losses(other), wanted, rtol=0, atol=0)
    merge(base, tmp_path, tmp_path / "merged")
    torch.testing.assert_close(losses(load_model(tmp_path / "merged")), wanted, rtol=2e-5, atol=0)


def test_adapters_of_something_else_are_refused(base, tmp_path):
    model = load_model(base)
    add_adapters(model, SMALL)
    trained_adapters(SMALL, base, learning(model)).save(tmp_path)
    adapters = read_adapters(tmp_path)

    other = load_model(base)
    with torch.no_grad():
        other.llm.norm.weight[0] += 1e-3
    save_model(other, tmp_path / "other")
    assert fingerprint(tmp_path / "other") != fingerprint(base) == adapters.base
    with pytest.raises(WeightsError, match="do not belong to .*other.* made from"):
        adapters.merged(tmp_path / "other")

    halved = {name: v for name, v in adapters.state.items() if not name.endswith("lora_B")}
    with pytest.raises(WeightsError, match="are incomplete"):
        replace(adapters, state=halved).merged(base)
    with pytest.raises(WeightsError, match=r"another model.*lora_B"):
        load_adapters(load_model(base), replace(adapters, state=halved))
    strange = {**adapters.state, "llm.extra": torch.ones(1)}
    with pytest.raises(WeightsError, match=r"another model.*llm\.extra"):
        load_adapters(load_model(base), replace(adapters, state=strange))
    short = {name: v[:, :5] if v.ndim == 2 else v for name, v in adapters.state.items()}
    with pytest.raises(WeightsError, match="wrong shape"):
        replace(adapters, state=short).merged(base)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "describes no adapters"),
        ('{"base": "x"}', "describes no adapters"),
        ('{"base": "x", "config": {"rank": 0}}', "describes no adapters: .*rank"),
        ('{"base": "x", "config": {"ranks": 4}}', "describes no adapters: .*ranks"),
    ],
)
def test_a_damaged_description_is_told(tmp_path, text: str, message: str):
    (tmp_path / ABOUT).write_text(text)
    save_file({"a": torch.ones(1)}, tmp_path / ADAPTERS)
    with pytest.raises(WeightsError, match=message) as caught:
        read_adapters(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="cannot read"):
        read_adapters(tmp_path / "nowhere")


class Tuning:
    """Stage that fits one batch."""

    name = "tuning"

    def __init__(self, base: Path, config: LoraConfig) -> None:
        self.module = load_model(base)
        add_adapters(self.module, config)

    def describe(self) -> dict[str, object]:
        return {"model": "adapted"}

    def batch(self, index: int, rng: np.random.Generator) -> Batch:
        return batch_of(self.module)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        draws = self.module.image_decoder.random_draws(1, torch.Generator().manual_seed(5))
        found = self.module(batch, draws=draws)
        return {"total": found.total, "text": found.text}


def test_a_run_keeps_and_resumes_only_what_learns(base, tmp_path):
    run = RunConfig(precision="fp32", checkpoint_every=1, average=0.5)
    halted = Tuning(base, SMALL)
    before = losses(halted.module)[0]
    flat = replace(OPTIMISER, schedule="flat_then_cool", cool_from=1.0)
    train(halted, replace(flat, steps=2), run, tmp_path / "run")
    resumed = Tuning(base, SMALL)
    average = train(resumed, flat, run, tmp_path / "run")
    straight = train(Tuning(base, SMALL), flat, run, tmp_path / "straight")
    assert all(torch.equal(value, straight[name]) for name, value in average.items())
    path = latest_checkpoint(tmp_path / "run")
    assert path is not None
    kept = load_file(path / "model.safetensors")
    assert kept.keys() == average.keys() == learning(resumed.module).keys()
    assert all(re.search(r"lora_[AB]|look_back\.gate", name) for name in kept)
    trained_adapters(SMALL, base, average).save(tmp_path / "adapters")
    merge(base, tmp_path / "adapters", tmp_path / "model")
    assert losses(load_model(tmp_path / "model"))[0] < before - 0.01


def test_four_bits_without_the_library_are_told(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(MmiError, match=r"need bitsandbytes, .* install .*\[qlora\]"):
        add_adapters(load_model(base), replace(SMALL, four_bit=True))


@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="pip install 'mmi_deploy[qlora]'")
def test_adapted_matrices_take_four_bits(base, tmp_path):
    model = load_model(base)
    wanted, sizes = losses(model), {n: p.numel() for n, p in model.named_parameters()}
    config = replace(SMALL, four_bit=True)
    layers = add_adapters(model, config)
    own = dict(model.named_parameters())
    for layer in layers:
        quantised = own[f"{layer}.base_layer.weight"]
        assert quantised.nbytes == (sizes[f"{layer}.weight"] + 1) // 2
        assert not quantised.requires_grad
    assert own["llm.layers.0.look_back.mmfs.query_proj.weight"].dtype == torch.float32
    torch.testing.assert_close(losses(model), wanted, rtol=0.1, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(batch_of(model)).total.backward()
    adapters = {name: value for name, value in own.items() if value.requires_grad}
    assert adapters.keys() == learning(model).keys()
    assert all(v.grad is not None and v.grad.any() for n, v in adapters.items() if "lora_B" in n)
    move(model)
    state = learning(model)
    trained_adapters(config, base, state).save(tmp_path)
    merge(base, tmp_path, tmp_path / "merged")
    before, after = (load_file(path / WEIGHTS) for path in (base, tmp_path / "merged"))
    name = "llm.layers.0.mlp.up_proj"
    product = state[f"{name}.lora_B.adapter.weight"] @ state[f"{name}.lora_A.adapter.weight"]
    expected = before[f"{name}.weight"] + 5.0 / 3 * product
    assert torch.equal(after[f"{name}.weight"], expected)
    assert json.loads((tmp_path / ABOUT).read_text())["config"]["four_bit"] is True
