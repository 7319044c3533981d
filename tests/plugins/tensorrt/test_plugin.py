"""The MMFS plugin that `mmi build` gives TensorRT: a library, PTX in the engines, build-only."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from mmi_deploy.bundle.manifest import sha256_of
from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.runtime.tensorrt.backend import AHEAD_OF_TIME, BUILD_ONLY
from mmi_deploy.spec.backends import TENSORRT, TENSORRT_RTX
from mmi_plugins.compile import nvrtc
from mmi_plugins.tensorrt import ahead_of_time, plugin_library
from mmi_plugins.tensorrt.plugin import plugin_for

needs_nvrtc = pytest.mark.skipif(nvrtc.missing() is not None, reason=nvrtc.missing() or "")


@pytest.fixture(autouse=True)
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where `mmi plugins build tensorrt` puts what it makes; empty."""
    monkeypatch.setenv("MMI_CACHE", str(tmp_path))
    folder = tmp_path / "tensorrt"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("runtime", [TENSORRT, TENSORRT_RTX])
def test_the_newest_library_is_taken(
    libraries: Path, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    for age, name in enumerate(("libmmi_tensorrt-b.so", "libmmi_tensorrt-a.so", "other.so")):
        (libraries / name).write_text(name)
        os.utime(libraries / name, (1e9 - age, 1e9 - age))
    newest = libraries / "libmmi_tensorrt-b.so"
    plugin = pickle.loads(pickle.dumps(plugin_for(runtime, "sm89")))
    assert plugin.identity == f"{newest.name}:{sha256_of(newest)[:16]}" and not plugin.build_only
    loaded: list[object] = []
    monkeypatch.setattr(plugin_library, "load_tensorrt_plugin", lambda *given: loaded.append(given))
    plugin.load("module")
    assert loaded == [(newest, "module")]


def test_a_library_may_be_named(tmp_path: Path) -> None:
    library = tmp_path / "mine.so"
    library.write_text("x")
    assert plugin_for(TENSORRT, "sm89", str(library)).identity.startswith("mine.so:")
    with pytest.raises(EngineError, match="no TensorRT plugin none.so. compile .* `mmi plugins"):
        plugin_for(TENSORRT, "sm89", "none.so")


def test_rtx_takes_the_build_only_plugin_where_there_is_no_library() -> None:
    plugin = plugin_for(TENSORRT_RTX, "sm89")
    assert plugin.identity.startswith(f"{BUILD_ONLY}:") and plugin.build_only
    with pytest.raises(ConfigError, match="tensorrt-rtx does not take the plugin ahead of time"):
        plugin_for(TENSORRT_RTX, "sm89", AHEAD_OF_TIME)


@needs_nvrtc
@pytest.mark.parametrize(
    ("architecture", "capability", "ptx"),
    [("sm89", (8, 9), "sm80"), ("sm90", (9, 0), "sm90"), ("sm120", (12, 0), "sm120")],
)
def test_tensorrt_takes_it_ahead_of_time_where_there_is_none(
    libraries: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    capability: tuple[int, int],
    ptx: str,
) -> None:
    """As the builder takes it: it is sent to a process of its own, and registered there."""
    plugin = pickle.loads(pickle.dumps(plugin_for(TENSORRT, architecture)))
    assert plugin.identity.startswith(f"{AHEAD_OF_TIME}-{ptx}:") and not plugin.build_only
    asked: list[object] = []
    monkeypatch.setattr(ahead_of_time, "register_ahead_of_time", lambda *given: asked.append(given))
    plugin.load("module")
    assert asked == [("module", capability)]
    (libraries / "libmmi_tensorrt-a.so").write_text("x")  # asked for, it comes before a library
    assert plugin_for(TENSORRT, architecture, AHEAD_OF_TIME).identity == plugin.identity


def test_without_nvrtc_tensorrt_is_told_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "missing", lambda: "NVRTC is not installed: pip install it")
    with pytest.raises(
        EngineError,
        match="needs our plugin: there is no library, and NVRTC is not .* `mmi plugins build "
        "tensorrt`, or install NVRTC",
    ):
        plugin_for(TENSORRT, "sm89")
