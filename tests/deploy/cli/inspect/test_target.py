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
from mmi_deploy.bundle.kernel_plan import Finding, Kernel, ProfilePlan
from mmi_deploy.cli.app import run
from mmi_deploy.parity import Case

TARGET = "tensorrt-rtx-sm89-fp16"

# 3 MB of weights, 3 kB read and 1 kB written: 10.01 µs at 300 GB/s.
GEMM = Kernel(
    name="node_linear",
    kind="gemm",
    nodes=("node_linear",),
    inputs=("x:Half[-1,1500]",),
    constants=("w:Half[1500,1000]",),
    outputs=("y:Half[-1,500]",),
)
PREFILL = ProfilePlan(profile="prefill", kernels=(Kernel(name="s", kind="shape_call"),))
DECODE = ProfilePlan(profile="decode", kernels=(GEMM, GEMM, Kernel(name="s", kind="shape_call")))
COPY = Finding(
    rule="copies of the KV cache", profile="decode", what="a copies b", why="costly", bytes=10**6
)


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
                    findings=(COPY, COPY),
                    plans=(PREFILL, DECODE),
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


def test_a_plan_shows_kernels_bytes_and_the_time_that_they_take_at_least(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", "target", str(bundle), TARGET, "--plan"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "a token: 2 kernels, 2.0 kB written between them" in shown
    assert "llm decode 2 6.0 MB 6.0 kB 2.0 kB 20 µs" in shown and "at least on l4" in shown
    assert "llm prefill 0" in shown
    assert "gemm 2 6.0 MB 100%" in shown
    assert "copies of the KV cache (decode), 2 times: a copies b; 2.0 MB in vain" in shown
    assert run(["inspect", "target", str(bundle), TARGET, "--plan", "--gpu", "h100", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    prefill, decode = report["graphs"][0]["plans"]
    assert prefill["kernels"] == 0 and decode["kernels"] == 2
    assert decode["weight_bytes"] == 2 * 3_000_000 and decode["read_bytes"] == 2 * 3000
    assert decode["seconds"] == pytest.approx(2 * 3_004_000 / 3350e9)
    assert decode["list"][0]["outputs"] == ["y:Half[-1,500]"]


def test_kernels_are_shown_when_they_are_asked_for(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ((TARGET, "--json"), ("--json",)):
        assert run(["inspect", "target", str(bundle), *words]) == 0
        said = capsys.readouterr().out
        assert "node_linear" not in said and "copies of the KV cache" in said
    assert run(["inspect", "target", str(bundle), "--plan"]) == 2
    assert run(["inspect", "target", str(bundle), TARGET, "--gpu", "l4"]) == 2
    assert run(["inspect", "target", str(bundle), TARGET, "--plan", "--gpu", "none"]) == 2
    assert "unknown GPU" in capsys.readouterr().err


def test_a_target_without_plans_says_how_to_get_them(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = bundle / "engines" / TARGET / REPORT
    found = json.loads(report.read_text())
    for graph in found["graphs"]:
        del graph["plans"], graph["findings"]
    report.write_text(json.dumps(found))
    assert run(["inspect", "target", str(bundle), TARGET, "--plan"]) == 2
    assert "without the plan of its kernels. build it again" in capsys.readouterr().err
