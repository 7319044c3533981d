"""The options that choose whose engines run, and on which GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mmi_deploy.cli.console import remarks
from mmi_deploy.spec.backends import backend_of
from mmi_deploy.system.entry_points import load

if TYPE_CHECKING:
    from mmi_deploy.runtime.runtime import Runtime

# Panel of a command's help for the machine that it runs on.
MACHINE = "Machine"

Kernels = Annotated[
    str,
    typer.Option(
        metavar="auto|none|FILE",
        help="The MMFS kernel for ONNX Runtime: compiled once where there is a C++ compiler, "
        "left out, or a library file. For TensorRT: the plugin.",
        rich_help_panel=MACHINE,
    ),
]

TargetName = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Whose engines run: cpu, or one that `mmi build` made, as in tensorrt-sm89-fp16.",
        rich_help_panel=MACHINE,
    ),
]
Device = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        help="Which GPU, for a target that has one.",
        rich_help_panel=MACHINE,
    ),
]
Resident = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="Engines that stay on the GPU; the others are loaded in turn. Of: encoder, llm, "
        "condition, denoise, vae; none.",
        show_default="all",
        rich_help_panel=MACHINE,
    ),
]


def groups(resident: str | None) -> tuple[str, ...] | None:
    """What `--resident` names; None is all of them."""
    if resident is None or resident == "all":
        return None
    return () if resident == "none" else tuple(name.strip() for name in resident.split(","))


def check_engines(target: str) -> None:
    """Import the backend of `target`. Raises `ModuleNotFoundError` where its runtime is missing."""
    load(backend_of(target).entry_point)


def say_memory(runtime: Runtime, target: str) -> None:
    """What a target takes of its GPU's memory, before it takes it."""
    plan = runtime.backend.plan()
    if plan is None:
        return
    console = remarks()
    console.print(f"{target} on {plan.device}:")
    for line in plan.lines():
        console.print(f"  {line}")
