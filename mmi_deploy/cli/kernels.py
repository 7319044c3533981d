"""The option `--kernels`: our own kernels for ONNX Runtime, or the operator's function."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from mmi_deploy.errors import ConfigError, EngineError

log = logging.getLogger(__name__)

AUTO, NONE = "auto", "none"

Kernels = Annotated[
    str,
    typer.Option(
        metavar="auto|none|FILE",
        help="Our MMFS kernel for ONNX Runtime: compiled once where there is a C++ compiler, "
        "left out, or a library of your own. For TensorRT: our plugin.",
        rich_help_panel="Machine",
    ),
]


def kernel_library(kernels: str, target: str = "cpu") -> Path | None:
    """The library to give to `Runtime.open` for a target; may compile it for ONNX Runtime, which it
    says on stderr.

    With `auto`: None, with a remark, where there is none that can be loaded. Raises `ConfigError`
    or `EngineError` for a file that is no such library.
    """
    from mmi_deploy.runtime.tensorrt.backend import runtime_of

    if kernels == NONE:
        return None
    on_gpu = runtime_of(target) is not None
    if kernels == AUTO and on_gpu:
        from mmi_plugins.tensorrt.plugin import newest_library

        return newest_library()
    if kernels == AUTO:
        from mmi_plugins.onnxruntime.library import ensure

        return _loadable(ensure())
    path = Path(kernels)
    if not path.is_file():
        raise ConfigError(
            "--kernels names no file", expected=f"{AUTO}, {NONE} or a library", got=kernels
        )
    from mmi_plugins.compile.checksum import checksum_error

    if harm := checksum_error(path):  # to open it could end the process
        raise ConfigError(
            f"the kernel library {kernels} is damaged: {harm}",
            fix="Compile it again: mmi plugins build",
        )
    path = path.resolve()
    if not on_gpu:
        from mmi_deploy.runtime.onnxruntime.engine import check_library

        check_library(path)
    return path


def _loadable(library: Path | None) -> Path | None:
    """`library`, or None, with a remark, where ONNX Runtime cannot load it."""
    from mmi_deploy.runtime.onnxruntime.engine import check_library

    try:
        if library is not None:
            check_library(library)
    except EngineError as error:
        log.warning("MMFS runs as standard operators, which is slower: %s", error)
        return None
    return library
