"""`mmi inspect target` and `sensitivity`: the targets of a bundle, and weights that are hard to
quantise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from exports import Exported
from mmi_deploy.bundle.build_report import REPORT, GraphReport, TargetReport
from mmi_deploy.bundle.bundle import Bundle, write_target
from mmi_deploy.cli.app import run
from mmi_deploy.parity import Case

TARGET = "tensorrt-rtx-sm89-fp16"


@pytest.fixture
def bundle(exported_once: Callable[[str], Exported], tmp_path: Path) -> Path:
    """A copy of a bundle with a target of two engines, one of them proved."""
    folder = tmp_path / "bundle"
    shutil.copytree(exported_once("paper").bundle.folder, folder)
    opened = Bundle.open(folder)
    recipe = {"precision": "fp16", "architecture": "sm89"}
    with write_target(opened, TARGET, recipe, "float16") as writer:
        for graph in ("llm", "vae_decoder"):
            writer.engine_file(graph, ".engine").write_bytes(b"x" * 2_000_000)
        writer.add_receipt("llm", "the portable graph", [Case(sizes={}, error=0.1, tolerance=1.0)])
        report = TargetReport(
            target=TARGET,
            runtime="tensorrt-rtx",
            version="1.7",
            architecture="sm89",
            precision="fp16",
            remark="not run yet",
            graphs=(
                GraphReport(
                    graph="llm",
                    layers={"MATRIX_MULTIPLY": 9, "PLUGIN_V3": 2},
                    plugin_layers=2,
                    bindings={"hidden": "HALF", "logits": "FLOAT"},
                    engine_bytes=2_000_000,
                    weights_bytes=1_900_000,
                    seconds=12.0,
                    peak_bytes=5_000_000,
                    error=0.1,
                    tolerance=1.0,
                ),
            ),
        )
        (writer.folder / REPORT).write_text(report.model_dump_json())
    return folder


def test_targets_are_listed_with_what_is_proved(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(bundle)]) == 0
    report = capsys.readouterr().out
    row = next(line for line in report.splitlines() if line.strip().startswith(TARGET))
    assert "float16" in row and "1 of 2" in row and "not run yet" in row
    assert run(["inspect", str(bundle), "--json"]) == 0
    (target,) = json.loads(capsys.readouterr().out)["targets"]
    assert target["target"] == TARGET and target["architecture"] == "sm89"
    assert target["receipts"] == {"llm": "proved", "vae_decoder": "none"}


def test_a_target_is_told_by_graph(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "target", str(bundle), TARGET]) == 0
    report = capsys.readouterr().out
    assert "9 MATRIX_MULTIPLY" in report and "2 of our plugin" in report and "12 s" in report
    assert run(["inspect", "target", str(bundle), "cpu-int8"]) == 2
    assert f"has no target 'cpu-int8'; expected {TARGET}" in capsys.readouterr().err


def test_a_target_of_another_export_is_called_stale(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = bundle / "bundle.json"
    manifest.write_text(manifest.read_text() + " ")
    assert run(["inspect", str(bundle)]) == 0
    assert "stale, built from another export" in capsys.readouterr().out


def test_the_weights_that_suffer_most_come_first(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", "sensitivity", str(bundle), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    errors = [weight["error"] for weight in report["weights"]]
    assert report["graph"] == "llm" and report["precision"] == "int4"
    assert errors == sorted(errors, reverse=True) and errors[0] > 0
    assert run(["inspect", "sensitivity", str(bundle), "--precision", "fp16"]) == 2
    assert "precision fp16 quantises no weights" in capsys.readouterr().err
