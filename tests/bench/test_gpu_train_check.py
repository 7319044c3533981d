"""`make gpu-train-check`, driven on the CPU: it passes there, and fails where it should."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from export.small_models import paper_reading, write_small_model
from mmi_bench import gpu_train_check as module
from mmi_bench.gpu_train_check import SAME, Finding, compare, forward_and_backward, micro_batch, run
from mmi_deploy.spec.config import ModelConfig
from mmi_train.model.mmfs import Mmfs
from mmi_train.weights.model_folder import load_model

CPU = torch.device("cpu")


def small() -> ModelConfig:
    config = paper_reading()
    return replace(config, llama=replace(config.llama, context=128))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_small_model(folder, small())


@pytest.mark.slow
def test_every_check_passes_against_itself(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "TIMED_STEPS", 2)
    out = tmp_path / "report.json"
    assert run([str(folder), "--device", "cpu", "-o", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["passed"] * 4 + ["not", "passed", "passed"]
    report = json.loads(out.read_text())
    assert report["device"] == "cpu" and len(report["findings"]) == 7
    assert report["findings"][0]["detail"].startswith("losses 0.0e+00 of 1e-04")


def test_a_wrong_gradient_and_a_wrong_loss_fail(folder: Path) -> None:
    batch = micro_batch(folder, load_model(folder))
    wanted = forward_and_backward(folder, batch, CPU)
    assert compare("same", wanted, wanted, SAME).passed
    name = max(wanted.gradients, key=lambda name: float(wanted.gradients[name].norm()))
    wrong = {**wanted.gradients, name: 1.01 * wanted.gradients[name]}
    assert not compare("gradient", replace(wanted, gradients=wrong), wanted, SAME).passed
    missing = {key: value for key, value in wanted.gradients.items() if key != name}
    assert not compare("missing", replace(wanted, gradients=missing), wanted, SAME).passed
    losses = {**wanted.losses, "text": float("nan")}
    assert not compare("loss", replace(wanted, losses=losses), wanted, SAME).passed


def test_a_fused_operator_that_is_wrong_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shifted(model: torch.nn.Module, device: torch.device) -> int:
        layers = [layer for layer in model.modules() if isinstance(layer, Mmfs)]
        for layer in layers:
            own = layer.operator
            layer.operator = lambda *a, own=own, **k: 1.01 * own(*a, **k)
        return len(layers)

    monkeypatch.setattr(module, "use_fused_mmfs", shifted)
    monkeypatch.setattr(module, "check_speed", lambda *arguments: Finding("speed", True, "0 ms"))
    monkeypatch.setattr(module, "check_fine_tuning", lambda *arguments: 1 / 0)
    assert run([str(folder), "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("FAILED  the fused MMFS as its definition")
    assert "ZeroDivisionError" in lines[5]


def test_without_a_gpu_it_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run([]) == 2
    assert "PyTorch sees no GPU" in capsys.readouterr().err
