"""Options that choose the target, its GPU and its kernels."""

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
        help="MMFS kernel for ONNX Runtime: auto (compiled once, if there is a C++ compiler), none "
        "(plain ONNX operators), or a library file. For TensorRT: the plugin.",
        rich_help_panel=MACHINE,
    ),
]

TargetName = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Target to run: cpu, or one of `mmi build`, such as tensorrt-sm89-fp16 or cuda-fp16.",
        rich_help_panel=MACHINE,
    ),
]
Device = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        help="GPU index, for a GPU target.",
        rich_help_panel=MACHINE,
    ),
]
Resident = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="Engine groups to keep on the GPU, of encoder, llm, condition, denoise, vae, or none; "
        "the others are swapped in.",
        show_default="all",
        rich_help_panel=MACHINE,
    ),
]


def resident_groups(resident: str | None) -> tuple[str, ...] | None:
    """Parse `--resident` into engine groups; None stands for all."""
    if resident is None or resident == "all":
        return None
    return () if resident == "none" else tuple(name.strip() for name in resident.split(","))


def check_engines(target: str) -> None:
    """Import the backend of `target`. Raises `ModuleNotFoundError` where its runtime is missing."""
    load(backend_of(target).entry_point)


def say_memory(runtime: Runtime, target: str, beams: int = 1) -> None:
    """Print the planned GPU memory of a target on stderr; nothing for a CPU target."""
    plan = runtime.backend.plan(beams)
    if plan is None:
        return
    console = remarks()
    console.print(f"{target} on {plan.device}:")
    for line in plan.lines():
        console.print(f"  {line}")
