"""A bundle made ready to run: which graphs take the kernels, and from where files are read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exports import Exported
from mmi_deploy.errors import EngineError
from mmi_deploy.runtime import backend as runtime_backend
from mmi_deploy.runtime.onnxruntime import backend as onnxruntime_backend
from mmi_deploy.runtime.onnxruntime.engine import OnnxOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.session import Session
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.graphs import Graph, beyond_kernels
from mmi_deploy.spec.presets import tiny
from mmi_plugins.conformance.calls import draw

LIBRARY = Path("/kernels/libmmi_onnxruntime.so")


def with_llm(config: ModelConfig, **changes: object) -> ModelConfig:
    return replace(config, llm_mmfs=replace(config.llm_mmfs, **changes))


def with_unet(config: ModelConfig, **changes: object) -> ModelConfig:
    decoder = config.image_decoder
    mmfs = replace(decoder.mmfs, **changes)
    return replace(config, image_decoder=replace(decoder, mmfs=mmfs))


@pytest.mark.parametrize(
    ("heads", "width", "points", "taken"),
    [
        (2, 128, 4, True),
        (1, 128, 16, True),
        (16, 128, 1, True),
        (32, 128, 4, False),  # the golden configuration's 4 channels
        (2, 24, 4, False),
        (1, 136, 4, False),
        (1, 256, 4, False),
        (2, 128, 17, False),
    ],
)
def test_what_no_kernel_takes_is_known_from_the_configuration(
    heads: int, width: int, points: int, taken: bool
) -> None:
    """And is what the operator itself refuses."""
    changes = {"heads": heads, "value_width": width, "points": points}
    assert set(beyond_kernels(with_llm(tiny(), **changes))) == (set() if taken else {"llm"})
    unet = {"denoise_step", "denoise_shallow"}
    assert set(beyond_kernels(with_unet(tiny(), **changes))) == (set() if taken else unet)
    sizes = {"h": heads, "d": width // heads, "p": points}
    try:
        draw(np.random.default_rng(0), q=1, **sizes)
        assert taken
    except EngineError:
        assert not taken


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Path | None]:
    """Graph -> library that its engine would be loaded with; nothing is loaded."""
    found: dict[str, Path | None] = {}

    def load(path: Path, graph: Graph, options: OnnxOptions) -> None:
        found[graph.name] = options.library

    monkeypatch.setattr(onnxruntime_backend, "OnnxRuntimeEngine", load)
    monkeypatch.setattr(runtime_backend, "find_kernel_library", lambda target, kernels: kernels)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("part", ["llm", "unet"])
def test_a_graph_beyond_the_kernels_runs_its_function_and_the_others_the_kernel(
    part: str, exported_once: Callable[[str], Exported], loaded: dict[str, Path | None]
) -> None:
    bundle = exported_once("paper").bundle
    changed = {"llm": with_llm, "unet": with_unet}[part](bundle.config, heads=32)
    bundle = replace(bundle, manifest=bundle.manifest.model_copy(update={"config": changed}))
    runtime = Runtime.open(bundle, kernels=LIBRARY)
    for name in bundle.graphs:
        runtime.engine(name)
    without = {"llm": {"llm"}, "unet": {"denoise_step", "denoise_shallow"}}[part]
    assert loaded == {name: None if name in without else LIBRARY for name in bundle.graphs}
    assert [line.split(":")[0] for line in bundle.remarks] == sorted(without, reverse=True)
    reason = "4 channels a head, and kernels take multiples of 8 up to 128"
    assert all(reason in line and "\n" not in line for line in bundle.remarks)


@pytest.mark.slow
def test_a_bundle_of_the_kernels_sizes_has_nothing_to_remark(
    exported_once: Callable[[str], Exported], loaded: dict[str, Path | None]
) -> None:
    bundle = exported_once("paper").bundle
    runtime = Runtime.open(bundle, kernels=LIBRARY)
    runtime.load()
    assert bundle.remarks == [] and loaded == dict.fromkeys(bundle.graphs, LIBRARY)


@pytest.mark.slow
@pytest.mark.parametrize("all_at_once", [False, True])
def test_a_relative_bundle_outlives_a_change_of_folder(
    all_at_once: bool,
    exported_once: Callable[[str], Exported],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Engines that are loaded later are found; after `load` nothing is read from the bundle."""
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(exported_once("paper").bundle.folder, tmp_path / "here" / "bundle")
    monkeypatch.chdir(tmp_path / "here")
    runtime = Runtime.open(Path("bundle"), threads=1, kernels="none")
    if all_at_once:
        runtime.load()
        shutil.rmtree(tmp_path / "here" / "bundle")
    monkeypatch.chdir(tmp_path / "elsewhere")
    session, tokens = Session(runtime), runtime.config.tokens
    session.append_text([tokens.bos, 20, tokens.boi])
    for schedule in ("unipc:4", "ddpm:3"):
        steps = session.draw_steps(schedule, 1.0, 0)
        assert next(steps)[0] == 1
    assert np.isfinite(session.next_logits()).all()
