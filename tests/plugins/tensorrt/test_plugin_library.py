"""Libraries that cannot be loaded as a TensorRT plugin: one line with the reason."""

import ctypes.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.tensorrt.module import import_tensorrt
from mmi_plugins.compile.checksum import append_checksum
from mmi_plugins.tensorrt.plugin_library import load_tensorrt_plugin

MODULE: Any = SimpleNamespace(__name__="tensorrt", __version__="11.1.0")


def test_a_missing_library(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="there is no TensorRT plugin .*mmi plugins build"):
        load_tensorrt_plugin(tmp_path / "none.so", MODULE)


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    path = tmp_path / "text.so"
    path.write_text("text")
    with pytest.raises(EngineError, match="is not our TensorRT plugin: .*mmi plugins build"):
        load_tensorrt_plugin(path, MODULE)


def test_a_damaged_library(tmp_path: Path) -> None:
    """It is not opened: that could end the process."""
    path = tmp_path / "cut.so"
    path.write_bytes(b"plugin")
    append_checksum(path)
    path.write_bytes(path.read_bytes().replace(b"plugin", b"plugim"))
    with pytest.raises(EngineError, match="is damaged: its content is not .*mmi plugins build"):
        load_tensorrt_plugin(path, MODULE)


def test_another_library(tmp_path: Path) -> None:
    name = ctypes.util.find_library("m")
    assert name
    found = next(Path(root) / name for root in ("/lib/x86_64-linux-gnu", "/lib64", "/usr/lib",
        "/lib/aarch64-linux-gnu") if (Path(root) / name).exists())  # fmt: skip
    with pytest.raises(EngineError, match="is not our TensorRT plugin: .*undefined symbol"):
        load_tensorrt_plugin(found, MODULE)


def test_a_tensorrt_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(EngineError, match="tensorrt cannot be imported.*pip install tensorrt"):
        import_tensorrt("tensorrt")
