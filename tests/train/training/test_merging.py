"""`mmi delta`: what a model learned apart from its base, and the two put together again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from export.small_models import paper_reading, random_model
from mmi_deploy.cli.app import run
from mmi_deploy.spec.config import DistillationConfig, ModelConfig, read_config
from mmi_train.data.synthetic.vocabulary import build_tokenizer
from mmi_train.training.lora import LoraConfig, add_adapters, trained_adapters
from mmi_train.training.stages.distillation import distilled_config
from mmi_train.weights.delta import DELTA
from mmi_train.weights.model_folder import CONFIG, TOKENIZER, WEIGHTS, load_model, save_model

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


def test_a_base_is_not_replaced_by_its_delta(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["make", base, base], ["apply", base, base]):
        assert run(["delta", *map(str, arguments), "-o", str(base), "--force"]) == 2
        assert capsys.readouterr().err
    assert (base / WEIGHTS).is_file() and (base / CONFIG).is_file()
