"""`mmi inspect target --plan`: the kernels of a target's engines, and the bytes that they move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from mmi_deploy.cli.console import duration, print_json, print_table, results
from mmi_deploy.errors import ConfigError
from mmi_deploy.system.files import size

if TYPE_CHECKING:
    from mmi_deploy.analysis.gpu_specs import Gpu
    from mmi_deploy.bundle.build_report import GraphReport, TargetSummary
    from mmi_deploy.bundle.kernel_plan import Finding, Kernel, ProfilePlan

# What a user waits for again and again: (graph, profile) -> its name.
REPEATED = {("llm", "decode"): "token", ("denoise_step", "default"): "denoising step"}

# Kernels shown of each of `REPEATED`, those that move most bytes.
SHOWN = 6

BASIS = (
    "Derived from the plan, not measured: bytes through memory over the GPU's bandwidth, of one "
    "row and one token (a dynamic dimension counts as 1). A KV cache is read whole and updated in "
    "place."
)


def show_plan(summary: TargetSummary, gpu: str | None, as_json: bool) -> None:
    """Print kernels, bytes and findings of one target. gpu: name of the GPU for the times. Raises
    `ConfigError` for a target without plans."""
    graphs = summary.report.graphs if summary.report else ()
    if not any(graph.plans for graph in graphs):
        raise ConfigError(
            f"{summary.target} was built without the plan of its kernels",
            fix="build it again with `mmi build`; targets for the CPU have none",
        )
    card = _gpu(gpu, summary.architecture)
    if as_json:
        print_json(
            {
                "target": summary.target,
                "gpu": card.name,
                "bandwidth": card.bandwidth,
                "graphs": [
                    {
                        "graph": graph.graph,
                        "findings": [one.model_dump(mode="json") for one in graph.findings],
                        "plans": [_as_json(plan, card) for plan in graph.plans],
                    }
                    for graph in graphs
                ],
            }
        )
        return
    out = results()
    print_table(out, _overview(summary.target, graphs, card))
    for graph in graphs:
        for plan in graph.plans:
            if name := REPEATED.get((graph.graph, plan.profile)):
                print_table(out, _largest(name, plan, card))
    for graph in graphs:
        for line in finding_lines(graph.findings):
            out.print(Text.assemble((graph.graph, "bold"), f": {line}"))
    out.print(BASIS)


def _gpu(name: str | None, architecture: str | None) -> Gpu:
    """The GPU called `name`, else the first one of the architecture."""
    from mmi_deploy.analysis.gpu_specs import GPUS, gpu

    if name is not None:
        return gpu(name)
    same = [one for one in GPUS.values() if one.architecture == architecture]
    return same[0] if same else gpu("l4")


def _as_json(plan: ProfilePlan, card: Gpu) -> dict[str, object]:
    totals = ("weight_bytes", "read_bytes", "written_bytes")
    return {
        "profile": plan.profile,
        "kernels": len(plan.launched),
        **{name: plan.total(name) for name in totals},
        "seconds": plan.total("bytes") / card.bandwidth,
        "list": [
            {**kernel.model_dump(mode="json"), "bytes": kernel.bytes} for kernel in plan.kernels
        ],
    }


def _overview(target: str, graphs: Sequence[GraphReport], card: Gpu) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=target, title_justify="left")
    table.add_column("graph", no_wrap=True)
    table.add_column("profile", no_wrap=True)
    headings = ("kernels", "weights", "read", "written", f"at least on {card.name}")
    for heading in headings:
        table.add_column(heading, justify="right")
    for graph in graphs:
        for plan in graph.plans:
            moved = [plan.total(n) for n in ("weight_bytes", "read_bytes", "written_bytes")]
            table.add_row(
                graph.graph,
                plan.profile,
                str(len(plan.launched)),
                *map(size, moved),
                duration(sum(moved) / card.bandwidth),
            )
    return table


def _largest(name: str, plan: ProfilePlan, card: Gpu) -> Table:
    """The kernels of a token or a step that move most, those of one name and size together."""
    count, whole = len(plan.launched), max(plan.total("bytes"), 1)
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"a {name}: {count} kernels, {size(plan.total('written_bytes'))} written between "
        "them; most bytes:",
        title_justify="left",
    )
    table.add_column("kernel", overflow="ellipsis", no_wrap=True)
    for heading in ("times", "bytes", "share", "at least"):
        table.add_column(heading, justify="right", no_wrap=True)
    same: dict[tuple[str, int], int] = {}
    for kernel in plan.launched:
        key = (_what(kernel), kernel.bytes)
        same[key] = same.get(key, 0) + 1
    most = sorted(same.items(), key=lambda item: -item[0][1] * item[1])[:SHOWN]
    for (what, moved), times in most:
        total = moved * times
        table.add_row(
            what, str(times), size(total), f"{total / whole:.0%}", duration(total / card.bandwidth)
        )
    return table


def _what(kernel: Kernel) -> str:
    """Operations of a kernel, as TensorRT names it, without the numbers of its nodes."""
    name = kernel.name.removeprefix("__myl_").strip("_")
    return kernel.kind if name in kernel.nodes or "+" in name else name


def finding_lines(findings: Sequence[Finding]) -> Iterator[str]:
    """One line per rule and profile: how often it is broken, the first place, and the cost."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.rule, finding.profile), []).append(finding)
    for (rule, profile), same in groups.items():
        wasted = sum(finding.bytes for finding in same)
        cost = f"; {size(wasted)} in vain each time" if wasted else ""
        first = same[0]
        yield f"{rule} ({profile}), {len(same)} times: {first.what}{cost}. {first.why}"
