"""`mmi delta`: what a model learned apart from its base, and the two put together again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.small_models import paper_reading, random_model
from mmi_deploy.cli.app import run
from mmi_deploy.spec.config import DistillationConfig, ModelConfig, read_config
from mmi_train.data.synthetic.vocabulary import build_tokenizer
from mmi_train.training.lora import (
    ADAPTERS,
    Adapters,
    LoraConfig,
    add_adapters,
    trained_adapters,
)
from mmi_train.training.stages.distillation import distilled_config
from mmi_train.weights.delta import DELTA, DIFFERENCES
from mmi_train.weights.model_folder import (
    CONFIG,
    TOKENIZER,
    WEIGHTS,
    fingerprint,
    load_model,
    save_model,
)

CHANGED = "image_decoder.unet.conv_in.weight"


def write(folder: Path, change: Callable[[ModelConfig], ModelConfig] = lambda config: config,
          value: float | None = None) -> Path:  # fmt: skip
    """A model folder with the same random weights each time, one of them set to `value`."""
    config = paper_reading()
    model = random_model(config)
    if value is not None:
        with torch.no_grad():
            model.get_parameter(CHANGED).fill_(value)
    model.config = change(config)
    save_model(model, folder, torch.float16)
    build_tokenizer().save(str(folder / TOKENIZER))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base")


def distilled(config: ModelConfig) -> ModelConfig:
    return distilled_config(config, DistillationConfig("lcm", 3.5, 20))


def test_a_delta_and_its_base_are_the_model_to_the_byte(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, delta, again = write(tmp_path / "model", distilled, 0.1), tmp_path / "d", tmp_path / "m"
    assert run(["delta", "make", str(base), str(model), "-o", str(delta)]) == 0
    assert "1 weight, " in capsys.readouterr().out
    assert load_file(delta / DELTA).keys() == {CHANGED}
    assert (delta / DELTA).stat().st_size < (model / WEIGHTS).stat().st_size / 50
    assert run(["delta", "apply", str(base), str(delta), "-o", str(again)]) == 0
    for name in (WEIGHTS, CONFIG, TOKENIZER):
        assert (again / name).read_bytes() == (model / name).read_bytes(), name
    assert read_config(again / CONFIG).image_decoder.branches == 1


def test_adapters_are_applied_with_the_configuration_that_they_were_trained_in(
    base: Path, tmp_path: Path
) -> None:
    adapters, merged = tmp_path / "adapters", tmp_path / "merged"
    lora = LoraConfig(rank=2, alpha=4.0)
    model = load_model(base)
    layer = add_adapters(model, lora)[0]
    state = {n: torch.ones_like(v) for n, v in model.named_parameters() if "lora_" in n}
    trained_adapters(lora, base, state).save(adapters)
    (adapters / CONFIG).write_bytes((write(tmp_path / "x", distilled) / CONFIG).read_bytes())
    assert run(["delta", "apply", str(base), str(adapters), "-o", str(merged)]) == 0
    assert read_config(merged / CONFIG).image_decoder.distillation is not None
    # W + alpha / rank * B A, with A and B of ones: + 2 * rank
    before, after = (load_file(folder / WEIGHTS)[f"{layer}.weight"] for folder in (base, merged))
    assert torch.equal(after, (before.float() + 4).half())
    (adapters / CONFIG).unlink()  # as adapters of earlier versions
    assert run(["delta", "apply", str(base), str(adapters), "-o", str(merged)]) == 0
    assert read_config(merged / CONFIG) == read_config(base / CONFIG)


def test_models_that_differ_in_more_than_values_have_no_delta(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(model: Path) -> str:
        assert run(["delta", "make", str(base), str(model), "-o", str(tmp_path / "d")]) == 2
        assert not (tmp_path / "d").exists()
        return " ".join(capsys.readouterr().err.split())

    llama = replace(paper_reading().llama, layers=1)
    short = random_model(replace(paper_reading(), llama=llama))
    save_model(short, tmp_path / "short", torch.float16)
    assert "in more than values" in (error := refusal(tmp_path / "short"))
    assert "got no such weight" in error
    single = write(tmp_path / "single")
    save_model(load_model(single), single, torch.float32)
    assert "in float16; got" in refusal(single)
    other = write(tmp_path / "other")
    (other / TOKENIZER).write_text("{}")
    assert "another tokenizer" in refusal(other)


def test_what_does_not_belong_together_is_refused_in_a_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, delta, out = write(tmp_path / "model", value=0.1), tmp_path / "delta", tmp_path / "out"
    assert run(["delta", "make", str(base), str(model), "-o", str(delta)]) == 0

    def refusal(base: Path, delta: Path) -> str:
        capsys.readouterr()
        assert run(["delta", "apply", str(base), str(delta), "-o", str(out)]) == 2
        assert not out.exists()
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return " ".join(error.split())

    assert "do not belong to" in refusal(model, delta)
    assert "holds neither a delta nor adapters" in refusal(base, base)
    assert "does not exist" in refusal(base, tmp_path / "none")
    about = (delta / "delta.json").read_text()
    (delta / "delta.json").write_text("[1]")
    assert "describes no delta" in refusal(base, delta)
    (delta / "delta.json").write_text(about)
    config = json.loads((delta / CONFIG).read_text())
    config["llama"]["layers"] = 1
    (delta / CONFIG).write_text(json.dumps(config))
    assert "unknown tensors" in refusal(base, delta)


def test_differences_in_8_bits_are_half_as_large_and_nearly_the_model(
    base: Path, tmp_path: Path
) -> None:
    """Every row within half a step of its scale, and one rounding to fp16."""
    model = load_model(base)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("image_decoder.unet."):
                weight += 0.01 * torch.randn_like(weight)
    save_model(model, tmp_path / "model", torch.float16)
    (tmp_path / "model" / TOKENIZER).write_bytes((base / TOKENIZER).read_bytes())
    whole, small, again = tmp_path / "whole", tmp_path / "small", tmp_path / "again"
    assert run(["delta", "make", str(base), str(tmp_path / "model"), "-o", str(whole)]) == 0
    asked = ["delta", "make", str(base), str(tmp_path / "model"), "-o", str(small), "--int8"]
    assert run(asked) == 0
    sizes = [sum(p.stat().st_size for p in f.glob("*.safetensors")) for f in (whole, small)]
    assert sizes[1] < 0.65 * sizes[0]
    # Whoever may read one file of the folder may read all.
    assert len({path.stat().st_mode for path in small.glob("*.*")}) == 1
    assert run(["delta", "apply", str(base), str(small), "-o", str(again)]) == 0
    start, wanted, found = (load_file(f / WEIGHTS) for f in (base, tmp_path / "model", again))
    for name, weight in wanted.items():
        if weight.dim() < 2 or torch.equal(weight, start[name]):
            assert torch.equal(found[name], weight), name
            continue
        difference = (weight.float() - start[name].float()).flatten(1)
        step = difference.abs().amax(1, keepdim=True) / 127
        error = (found[name].float() - weight.float()).flatten(1).abs()
        assert (error <= 0.51 * step + weight.float().abs().flatten(1) * 2**-10 + 1e-7).all(), name


@pytest.mark.parametrize("damage", ["no scale", "floats", "another shape"])
def test_damaged_differences_are_refused(
    damage: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, delta = write(tmp_path / "model", value=0.1), tmp_path / "delta"
    assert run(["delta", "make", str(base), str(model), "-o", str(delta), "--int8"]) == 0
    stored = load_file(delta / DIFFERENCES)
    if damage == "no scale":
        del stored[f"{CHANGED}.scale"]
    elif damage == "floats":
        stored[CHANGED] = stored[CHANGED].float()
    else:
        stored[CHANGED] = stored[CHANGED][:, :1].contiguous()
    save_file(stored, delta / DIFFERENCES)
    assert run(["delta", "apply", str(base), str(delta), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "is damaged" in error or "has no tensor for the difference" in error
    assert not (tmp_path / "out").exists()


def test_signs_of_zeros_count(base: Path, tmp_path: Path) -> None:
    zero, negative = (write(tmp_path / str(value), value=value) for value in (0.0, -0.0))
    delta, again = tmp_path / "delta", tmp_path / "again"
    assert run(["delta", "make", str(zero), str(negative), "-o", str(delta)]) == 0
    assert run(["delta", "apply", str(zero), str(delta), "-o", str(again)]) == 0
    assert (again / WEIGHTS).read_bytes() == (negative / WEIGHTS).read_bytes()


def test_a_base_that_differs_in_its_last_weight_is_another(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    delta = tmp_path / "delta"
    assert run(["delta", "make", str(base), str(write(tmp_path / "m", value=0.1)),
                "-o", str(delta)]) == 0  # fmt: skip
    data = bytearray((base / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (base / WEIGHTS).write_bytes(data)
    assert run(["delta", "apply", str(base), str(delta), "-o", str(tmp_path / "out")]) == 2
    assert "do not belong to" in capsys.readouterr().err


def test_a_model_that_is_not_its_configuration_has_no_delta(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = paper_reading().llama.layers + 1
    model = write(tmp_path / "m", lambda c: replace(c, llama=replace(c.llama, layers=more)), 0.1)
    assert run(["delta", "make", str(base), str(model), "-o", str(tmp_path / "d")]) == 2
    assert "lacks" in capsys.readouterr().err


@pytest.mark.parametrize("about", ['{"base": ["a"]}', '{"base": "a\\nb\\u001b[31m"}', "{}"])
def test_a_base_that_is_no_checksum_is_refused(
    about: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, what in (("delta.json", "no delta"), ("adapters.json", "no adapters")):
        folder = tmp_path / name.removesuffix(".json")
        folder.mkdir()
        config = '{"config": {}, ' + about[1:] if len(about) > 2 else '{"config": {}}'
        (folder / name).write_text(config)
        assert run(["delta", "apply", str(base), str(folder), "-o", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert f"describes {what}: base is no checksum" in error and error.count("\n") <= 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda up, down: (up[:, :1], down), "wrong shape"),
        (lambda up, down: (up, down[0]), "wrong shape"),
        (lambda up, down: (up, torch.tensor(1.0)), "wrong shape"),
        (lambda up, down: (up, None), "incomplete"),
        (lambda up, down: (None, down), "incomplete"),
        (lambda up, down: (up.long(), down), "no floating-point numbers"),
    ],
)
def test_adapters_that_make_no_matrix_are_refused(
    change: Callable[..., tuple[Tensor | None, ...]],
    why: str,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lora = LoraConfig(rank=2, alpha=4.0)
    layer = "llm.layers.0.self_attn.q_proj"
    rows, columns = load_file(base / WEIGHTS)[f"{layer}.weight"].shape
    halves = change(torch.ones(rows, 2), torch.ones(2, columns))
    named = zip((f"{layer}.lora_B", f"{layer}.lora_A"), halves, strict=True)
    state = {name: half.contiguous() for name, half in named if half is not None}
    Adapters(lora, fingerprint(base), {}).save(tmp_path / "adapters")
    save_file(state, tmp_path / "adapters" / ADAPTERS)
    asked = ["delta", "apply", str(base), str(tmp_path / "adapters"), "-o", str(tmp_path / "out")]
    assert run(asked) == 2
    assert f"the adapters of {layer} " in (error := capsys.readouterr().err) and why in error
    assert not (tmp_path / "out").exists()


def test_integers_in_the_place_of_weights_are_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, delta = write(tmp_path / "model", value=0.1), tmp_path / "delta"
    assert run(["delta", "make", str(base), str(model), "-o", str(delta)]) == 0
    save_file({n: v.long() for n, v in load_file(delta / DELTA).items()}, delta / DELTA)
    assert run(["delta", "apply", str(base), str(delta), "-o", str(tmp_path / "out")]) == 2
    assert "is no type of weights" in capsys.readouterr().err


def test_a_base_is_not_replaced_by_its_delta(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["make", base, base], ["apply", base, base]):
        assert run(["delta", *map(str, arguments), "-o", str(base), "--force"]) == 2
        assert capsys.readouterr().err
    assert (base / WEIGHTS).is_file() and (base / CONFIG).is_file()
