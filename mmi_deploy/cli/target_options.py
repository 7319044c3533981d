"""The options that choose whose engines run, and on which GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mmi_deploy.cli.console import remarks

if TYPE_CHECKING:
    from mmi_deploy.runtime.runtime import Runtime

CPU = "cpu"

MACHINE = "Machine"
"""The panel of a command's help for what it runs on."""

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
    """Import what runs the engines of `target` on the CPU, to see that it is there."""
    from mmi_deploy.runtime.tensorrt.backend import runtime_of

    if runtime_of(target) is None:
        import mmi_deploy.runtime.onnxruntime.engine  # noqa: F401


def say_memory(runtime: Runtime, target: str) -> None:
    """What a target takes of its GPU's memory, before it takes it."""
    if runtime.target is None:
        return
    console = remarks()
    console.print(f"{target} on {runtime.target.memory.gpu.name}:")
    for line in runtime.target.plan().lines():
        console.print(f"  {line}")
