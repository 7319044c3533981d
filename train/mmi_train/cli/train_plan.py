"""`mmi train --plan`: memory and FLOPs of a run as a table."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.table import Table

from mmi_deploy.analysis.memory_estimate import parse_bytes
from mmi_deploy.cli.console import print_table, results
from mmi_deploy.system.files import size
from mmi_train.data.documents import Documents
from mmi_train.training.memory_plan import memory_plan
from mmi_train.training.settings import Settings

_SECONDS = 24 * 3600


def print_plan(
    model: Path,
    documents: Documents,
    settings: Settings,
    ranks: int,
    memory: str | None,
    tflops: float | None,
    teacher: Path | None = None,
) -> None:
    """Print what each of `ranks` would hold; `memory`: amount of a rank; `tflops`: sustained."""
    room = None if memory is None else parse_bytes(memory)
    plan = memory_plan(
        model,
        documents,
        settings.tuning(),
        precision=settings.precision,
        accumulate=settings.accumulate,
        ranks=ranks,
        teacher=teacher,
    )
    who = f"each of {ranks} ranks" if ranks > 1 else "one process"
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{who}, {settings.batch} documents of {plan.tokens} tokens",
        title_justify="left",
    )
    table.add_column("memory")
    for title in ("", "--checkpoint-gradients"):
        table.add_column(title, justify="right")
    for name, held in plan.held.items():
        if held:
            table.add_row(name, *[size(plan.share(name))] * 2)
    if ranks > 1:
        table.add_row("gathered from all ranks", *[size(plan.gathered)] * 2)
    batch = settings.batch
    both = (False, True)
    table.add_row("activations", *(size(plan.activations(batch, kind)) for kind in both))
    table.add_row("sum", *(size(plan.per_rank(batch, kind)) for kind in both))
    table.add_row("beside the weights, in host memory:")
    table.add_row("while they are read", *[size(plan.reading)] * 2)
    if ranks > 1:
        table.add_row("copy of a checkpoint", *[size(plan.checkpoint_copy)] * 2)
    if room is not None:
        largest = (plan.largest_batch(room, kind) for kind in both)
        table.add_row(f"largest batch in {memory}", *(str(found) for found in largest))
    work = [plan.flops(batch, kind) * settings.accumulate * ranks for kind in both]
    table.add_row("TFLOP of a step", *(f"{one / 1e12:.4g}" for one in work))
    if tflops is not None:
        steps = settings.steps_for(len(documents), ranks)
        days = (one * steps / (tflops * 1e12 * ranks * _SECONDS) for one in work)
        table.add_row(f"days of {steps} steps", *(f"{one:.3g}" for one in days))
    print_table(results(), table)
