"""Report of `make gpu-check`: Markdown to paste into an issue, JSON with every number."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmi_bench.gpu_check.hypotheses import judge
from mmi_deploy.system.files import write_file

if TYPE_CHECKING:
    from mmi_bench.gpu_check.check import Step

# Kind of the output folder in its marker.
KIND = "report"
MARKDOWN, JSON = "report.md", "report.json"


def write_report(
    out: Path, machine: dict[str, Any], bundle: Path, target: str, steps: Sequence[Step]
) -> tuple[Path, Path]:
    """Write report.md and report.json into the folder `out`; return their paths."""
    report = {
        "machine": machine,
        "bundle": str(bundle),
        "target": target,
        "steps": [asdict(step) for step in steps],
        "hypotheses": [asdict(verdict) for verdict in judge(steps)],
    }
    paths = out / MARKDOWN, out / JSON
    write_file(paths[0], markdown(machine, bundle, target, steps))
    write_file(paths[1], json.dumps(report, indent=2, default=str) + "\n")
    return paths


def markdown(machine: dict[str, Any], bundle: Path, target: str, steps: Sequence[Step]) -> str:
    """Format the report as Markdown."""
    lines = [
        "# GPU check",
        "",
        f"{bundle.name}, {target}, on {machine['processor']}, {machine['system']}, Python "
        f"{machine['python']}; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        "",
        "| step | result | | seconds |",
        "|---|---|---|---|",
    ]
    for step in steps:
        cell = step.line.replace("|", "\\|")
        lines.append(f"| {step.name} | {step.state} | {cell} | {step.seconds:.1f} |")
    for step in steps:
        if "cuda graphs" in step.detail:
            lines += ["", *_timings(step)]
        if "lines" in step.detail:
            lines += ["", f"## Memory, {step.name}", "", "```", *step.detail["lines"], "```"]
        if "traceback" in step.detail:
            lines += ["", f"## {step.name}", "", "```", step.detail["traceback"].rstrip(), "```"]
    lines += ["", "## Hypotheses", "", *(verdict.line for verdict in judge(steps))]
    return "\n".join(lines) + "\n"


def _timings(step: Step) -> list[str]:
    """Format medians in milliseconds with quartiles, as a Markdown table."""
    recorded, plain = step.detail["cuda graphs"], step.detail["without"]
    lines = [
        f"## Milliseconds, {step.name}",
        "",
        f"Median (quartiles) of {step.detail['repeats']} documents, {step.detail['schedule']}.",
        "",
        "| | CUDA graphs | without |",
        "|---|---|---|",
    ]
    for name in recorded:
        if name not in ("launches", "refusals"):
            cells = (_milliseconds(times[name]) for times in (recorded, plain))
            lines.append(f"| {name} | {' | '.join(cells)} |")
    launches = ", ".join(f"{name} {count}" for name, count in recorded["launches"].items() if count)
    lines += ["", f"Launched from recordings: {launches or 'nothing'}."]
    return lines + [f"Not recorded: {name}: {why}." for name, why in recorded["refusals"].items()]


def _milliseconds(seconds: dict[str, float]) -> str:
    median, low, high = (1000 * seconds[name] for name in ("median", "low", "high"))
    return f"{median:.2f} ({low:.2f}–{high:.2f})"
