"""The kernel's benchmark: what it compares is equal, and what is wrong is not timed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmi_bench import kernel
from mmi_bench.kernel import FUNCTION, GRID_SAMPLE, OURS, Shape
from mmi_bench.runs import Settings
from mmi_bench.statistics import ratios
from mmi_deploy.cli.app import run
from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.spec.presets import paper_13b, released_13b, tiny
from mmi_plugins.conformance.onnxruntime_kernel import OnnxRuntimeKernel
from mmi_plugins.operator import Call

pytest.importorskip("onnxruntime")

SHAPE = Shape.of(paper_13b())
BRIEF = Settings(1e-4, 1e-4, 3)


@pytest.fixture(scope="module")
def ours() -> OnnxRuntimeKernel:
    found = OnnxRuntimeKernel()
    if reason := found.missing():
        pytest.skip(reason)
    return found


@pytest.mark.parametrize("null_slot", [False, True])
def test_all_implementations_compute_the_same(ours: OnnxRuntimeKernel, null_slot: bool) -> None:
    shape = replace(SHAPE, null_slot=null_slot)
    found = kernel.compare(shape, 40, ours.library, 1, BRIEF, turns=3)
    assert 0 < found.error < 1e-4
    assert list(found.measurements) == [OURS, FUNCTION, GRID_SAMPLE]
    times = {name: one.means for name, one in found.measurements.items()}
    assert all(len(means) == 3 and min(means) > 0 for means in times.values())
    assert found.speedup(GRID_SAMPLE) == ratios(times[GRID_SAMPLE], times[OURS])
    assert found.speedup(OURS).median == 1
    assert kernel.table([found], shape).row_count == 3
    assert len(found.times()) == sum(len(one.runs) for one in found.measurements.values())


@pytest.mark.parametrize(
    ("config", "part", "images"),
    [(tiny(), "image_decoder", 9), (tiny(), "llm", 1), (released_13b(), "image_decoder", None)],
)
def test_sizes_are_those_of_the_model(
    ours: OnnxRuntimeKernel, config: object, part: str, images: int | None
) -> None:
    shape = Shape.of(config, part, images)  # type: ignore[arg-type]
    sizes = kernel.call_of(shape, 5).sizes
    if config == tiny():
        levels = [16, 8, 4, 2] if part == "image_decoder" else [16, 8, 4]
        wanted = {"q": 5, "h": 2, "d": 64, "p": 4, "m": images, "s": sum(n * n for n in levels)}
        assert wanted.items() <= sizes.items()
        assert shape.base_grid == (16 if part == "image_decoder" else 8) and not shape.null_slot
    else:  # its U-Net looks at one image
        assert sizes["m"] == 1 and shape.null_slot and shape.levels == (64, 32, 16, 8)
    kernel.compare(shape, 5, ours.library, 1, BRIEF, turns=1)


def test_the_default_is_the_published_language_model() -> None:
    assert str(SHAPE) == "16 heads x 64, 4 images, 8 points, levels 32x32, 16x16, 8x8"


def test_a_baseline_that_computes_something_else_is_refused(
    ours: OnnxRuntimeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = kernel.precomputed

    def shifted(call: Call) -> dict[str, np.ndarray]:
        inputs = honest(call)
        return inputs | {"grid": inputs["grid"] + np.float32(0.01)}

    monkeypatch.setattr(kernel, "precomputed", shifted)
    with pytest.raises(EngineError, match="GridSample is wrong at 1 queries"):
        kernel.compare(SHAPE, 1, ours.library, 1, BRIEF, turns=1)


def test_sizes_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="--part is unknown; expected llm or image_decoder; got"):
        Shape.of(tiny(), "unet")
    for images in (0, 50):
        with pytest.raises(ConfigError, match="--images is out of range; expected 1 to 49"):
            Shape.of(tiny(), "llm", images)
    wide = replace(tiny(), llm_mmfs=replace(tiny().llm_mmfs, value_width=2 * 136))
    with pytest.raises(ConfigError, match="does not support its llm: 136 channels a head"):
        Shape.of(wide)


def test_the_command_prints_a_table_and_writes_every_run(
    ours: OnnxRuntimeKernel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, times = tmp_path / "mmfs.json", tmp_path / "times.json"
    line = ["bench", "mmfs", "--preset", "tiny", "--quick", "--queries", "3", "--threads", "1"]
    assert run([*line, "-o", str(out), "--export-times", str(times)]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (OURS, FUNCTION, GRID_SAMPLE, "times as fast", "p99"))
    (size,) = json.loads(out.read_text())["sizes"]
    assert size["queries"] == 3 and size["implementations"][OURS]["runs"] >= 9
    every = json.loads(times.read_text())
    assert {one["implementation"] for one in every} == {OURS, FUNCTION, GRID_SAMPLE}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--preset", "huge"], "huge"),
        (["bundles", "--preset", "tiny"], "a bundle and --preset were given"),
        (["no/such/bundle"], "no/such/bundle"),
        (["--queries", "0"], "Invalid value for '--queries'"),
        (["--images", "50"], "--images is out of range"),
        (["--part", "vae"], "--part is unknown"),
        (["--duration", "0"], "--duration is out of range"),
        (["--duration", "inf"], "--duration is out of range"),
        (["-o", "."], "is there already, and would be lost"),
    ],
)
def test_hostile_arguments_are_one_readable_line(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "mmfs", *options]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("mmi: ") == 1 and "Traceback" not in err
