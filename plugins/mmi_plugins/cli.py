"""`mmi plugins`: compile the MMFS kernels for the runtimes of this machine."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mmi_deploy.cli.console import remarks, results
from mmi_deploy.cli.program import help_of
from mmi_deploy.errors import ConfigError
from mmi_deploy.system.files import cache_folder
from mmi_deploy.system.progress import shown

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Compile the MMFS kernels for ONNX Runtime and TensorRT.",
)


class Target(StrEnum):
    """Runtime that a library is compiled for."""

    onnxruntime = "onnxruntime"
    tensorrt = "tensorrt"


def build(
    target: Annotated[Target, typer.Argument(help="The runtime that will load it.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the library.", show_default="the user's cache"),
    ] = None,
    cuda: Annotated[
        bool, typer.Option("--cuda", help="For ONNX Runtime: CUDA kernels for NVIDIA GPUs too.")
    ] = False,
    tensorrt_include: Annotated[
        Path | None,
        typer.Option(help="Folder of TensorRT's headers.", show_default="the usual folders"),
    ] = None,
) -> None:
    """Compile a kernel library and print where it is.

    For ONNX Runtime, `mmi generate` compiles it the first time, given a C++ compiler. The TensorRT
    plugin requires CUDA's nvcc and TensorRT's headers, which pip does not install.
    """
    from mmi_plugins.onnxruntime import library
    from mmi_plugins.tensorrt import build_plugin

    for option, given, runtime in (
        ("--cuda", cuda, Target.onnxruntime),
        ("--tensorrt-include", tensorrt_include, Target.tensorrt),
    ):
        if given and target != runtime:
            raise ConfigError(f"{option} does not apply here", expected=f"it with {runtime}")
    with shown(remarks()) as progress:
        if target == Target.onnxruntime:
            path = library.build(out, cuda=cuda, progress=progress)
        else:
            folder = out or cache_folder(writes=True) / "tensorrt"
            progress("compiling the MMFS plugin for TensorRT")
            path = build_plugin.build_tensorrt_plugin(tensorrt_include, folder)
    results().print(str(path), soft_wrap=True)


def show() -> None:
    """List compiled kernel libraries, and the compilers and headers found."""
    from mmi_deploy.errors import EngineError
    from mmi_plugins.compile import compilers
    from mmi_plugins.onnxruntime import library
    from mmi_plugins.tensorrt import build_plugin

    compiled = library.find()
    compiler = library.compiler()
    write = results().print
    write(f"ONNX Runtime  {compiled or 'not compiled'}", soft_wrap=True)
    write(
        f"              C++ compiler: {compiler or 'none (install one, as with `apt install g++`)'}"
    )
    folder = cache_folder() / "tensorrt"
    found = sorted(folder.glob("*.so"))
    for path in found:
        write(f"TensorRT      {path}", soft_wrap=True)
    if not found:
        write("TensorRT      not compiled")
    try:
        headers, version = build_plugin.find_tensorrt_headers()
        write(f"              headers: {version} in {headers}", soft_wrap=True)
        write(f"              nvcc: {compilers.find_nvcc()}", soft_wrap=True)
    except EngineError as error:
        write(f"              {error}", soft_wrap=True)


app.command(help=help_of(build))(build)
app.command("list", help=help_of(show))(show)
