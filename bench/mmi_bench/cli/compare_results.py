"""`mmi bench compare`: compare two results of `mmi bench serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from mmi_deploy.cli.console import print_json, print_table, results
from mmi_deploy.cli.extras import extras

if TYPE_CHECKING:
    from mmi_bench.serve.compare import Change


def compare_results(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of the result before.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Folder of the result after.")],
    fail_above: Annotated[
        str | None,
        typer.Option(
            help="Fail if a measure is slower by more, with its whole 95 % interval.",
            metavar="5%",
            show_default="never fail",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two results of `mmi bench serve`, prompt by prompt.

    Refused unless workload, load, machine, precision and outputs are the same. Latencies are paired
    by prompt; with 5 runs or more on both sides, intervals are those of run means.

    Exit code: 4 if a measure is slower beyond --fail-above.
    """
    with extras("bench compare"):
        from mmi_bench.serve.compare import compare, parse_limit, read_result
        from mmi_bench.serve.definitions import EXIT_WORSE
    limit = parse_limit(fail_above) if fail_above is not None else None
    changes = compare(read_result(a), read_result(b))
    if as_json:
        print_json({"limit": limit, "changes": [change.to_json(limit) for change in changes]})
    else:
        print_table(results(), _table(changes, limit))
    if limit is not None and any(change.verdict(limit) == "WORSE" for change in changes):
        raise typer.Exit(EXIT_WORSE)


def _table(changes: list[Change], limit: float | None) -> Table:
    """Table of all measures; latencies in ms, rates a second."""
    from mmi_bench.serve.definitions import BY_KEY
    from mmi_bench.serve.report import ms, number

    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
    headings = ("measure", "A", "B", "slower by", "95 %", "prompts", "")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if 0 < index < 6 else "left", no_wrap=True)
    for change in changes:
        measure = BY_KEY[change.key]
        shown = ms if measure.kind == "latency" else number
        low, high = change.interval or (0.0, 0.0)
        table.add_row(
            measure.name + (", ms" if measure.kind == "latency" else ""),
            shown(change.a),
            shown(change.b),
            f"{100 * change.slower:+.1f} %",
            f"{100 * low:+.1f} to {100 * high:+.1f} %" if change.interval else "",
            str(change.pairs) if change.pairs else "",
            change.verdict(limit),
        )
    return table
