"""Kernel plans at the widths of the 13B model, by TensorRT-RTX without a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mmi_bench.plan_lint import ARCHITECTURES, PRECISIONS, lint_all, preset_sources, run
from mmi_deploy.bundle.kernel_plan import ProfilePlan

if TYPE_CHECKING:
    from exports import Exported

rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx-cu13"
)

# TensorRT-RTX does not merge two products with int8 weights of a layer, nor two small ones of the
# condition, which runs once a picture.
KNOWN = {("llm", "int8"): {"merged products"}, ("image_condition", "fp16"): {"merged products"}}


@rtx
@pytest.mark.exhaustive
def test_graphs_at_13b_widths_keep_the_rules() -> None:
    """One layer of the language model in each precision, and the outer blocks of the U-Net."""
    names, rows = ("llm", "denoise_shallow", "image_condition"), []
    with preset_sources("released_13b", 1, names) as sources:
        for one in lint_all(sources, PRECISIONS[:1] + PRECISIONS[2:], ARCHITECTURES):
            rows.append(one)
            known = KNOWN.get((one.graph, one.precision), set())
            assert {finding.rule for finding in one.findings} <= known, list(one.lines())
            assert one.scratch <= 600 * 10**6
    assert len(rows) == len(ARCHITECTURES) * (3 + 1 + 1)
    decode = {one.precision: plan(one.plans, "decode") for one in rows if one.graph == "llm"}
    for found in decode.values():
        # One attention, and no copy of a cache: at tiny's sizes there are two.
        assert sum("_gemv_mha" in kernel.name for kernel in found.launched) == 1


def plan(plans: tuple[ProfilePlan, ...], profile: str) -> ProfilePlan:
    return next(plan for plan in plans if plan.profile == profile)


@rtx
def test_the_command_prints_a_line_for_each_plan(
    exported_once: Callable[[str], Exported], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported_once("paper").bundle.folder
    options = ["--graph", "vae_decoder", "--arch", "sm89"]
    assert run([str(folder), *options, "--precision", "fp16", "--precision", "int8"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("vae_decoder default fp16 sm89: ") and "kernels, scratch at most" in line
    assert run([str(folder), "--graph", "unet"]) == 2
    assert "there is no graph 'unet'" in capsys.readouterr().err
