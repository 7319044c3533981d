"""Fixtures of the TensorRT tests: TensorRT-RTX, and the plugin library built with local headers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.tensorrt.module import INSTALL, import_tensorrt
from mmi_plugins.compile.compilers import find_cmake, find_nvcc
from mmi_plugins.tensorrt.build_plugin import build_tensorrt_plugin, find_tensorrt_headers


@pytest.fixture(scope="session")
def rtx() -> Any:
    """TensorRT-RTX, which builds engines without a GPU."""
    name = "tensorrt_rtx"
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: {INSTALL[name]}")
    return import_tensorrt(name)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin, for one architecture: two minutes less than for all."""
    try:
        find_tensorrt_headers()
        find_nvcc()
        find_cmake()
    except EngineError as error:
        pytest.skip(f"the C++ plugin cannot be built here: {error}")
    return build_tensorrt_plugin(None, tmp_path_factory.mktemp("plugins"), ("89",))
