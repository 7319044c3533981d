"""The option `--kernels`: our own kernels for ONNX Runtime, or the operator's function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmi_deploy.errors import ConfigError

AUTO, NONE = "auto", "none"

Kernels = Annotated[
    str,
    typer.Option(
        metavar="auto|none|FILE",
        help="Our MMFS kernel for ONNX Runtime: compiled once where there is a C++ compiler, "
        "left out, or a library of your own.",
    ),
]


def kernel_library(kernels: str) -> Path | None:
    """The library to give to `Runtime.open`; may compile it, which it says on stderr."""
    if kernels == NONE:
        return None
    if kernels == AUTO:
        from mmi_plugins.onnxruntime_library import ensure

        return ensure()
    path = Path(kernels)
    if not path.is_file():
        raise ConfigError(
            "--kernels names no file", expected=f"{AUTO}, {NONE} or a library", got=kernels
        )
    return path.resolve()
