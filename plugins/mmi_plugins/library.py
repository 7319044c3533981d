"""Kernel library for a backend: found, compiled, or named by the user."""

from __future__ import annotations

import logging
from pathlib import Path

from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.spec.backends import AUTO, backend
from mmi_plugins.compile.checksum import checksum_error
from mmi_plugins.onnxruntime.library import ensure
from mmi_plugins.tensorrt.plugin import newest_library

log = logging.getLogger(__name__)


def kernel_library(backend_name: str, choice: str | Path = AUTO) -> Path | None:
    """The library of kernels for ONNX Runtime, or of the plugin for TensorRT.

    choice: a file; or `auto`, which may compile the one for ONNX Runtime and gives None, with a
    warning in the log, where none can be loaded. Raises `ConfigError` or `EngineError` for a file
    that is not such a library.
    """
    row = backend(backend_name)
    plugin = row.plugin
    if choice == AUTO:
        return newest_library() if plugin else _loadable(ensure(cuda=row.on_gpu))
    path = Path(choice)
    if not path.is_file():
        raise ConfigError(
            "--kernels names no file", expected=f"{AUTO}, none or a library", got=choice
        )
    if error := checksum_error(path):  # to open it could end the process
        raise ConfigError(
            f"the kernel library {choice} is damaged: {error}",
            fix="Compile it again: mmi plugins build",
        )
    path = path.resolve()
    if not plugin:
        _check(path)
    return path


def _loadable(library: Path | None) -> Path | None:
    """`library`, or None, with a warning, where ONNX Runtime cannot load it."""
    try:
        if library is not None:
            _check(library)
    except EngineError as error:
        log.warning("MMFS runs as standard operators, which is slower: %s", error)
        return None
    return library


def _check(library: Path) -> None:
    # Imported here: a machine that runs TensorRT's engines alone need not have ONNX Runtime.
    from mmi_deploy.runtime.onnxruntime.engine import check_library

    check_library(library)
