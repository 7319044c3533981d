"""`mmi bench`: a group of benchmarks; the comparison with PyTorch is the default."""

from __future__ import annotations

from typing import Any

from mmi_deploy.cli.command_table import BENCH, TableGroup, table_app


class Bench(TableGroup):
    """The benchmarks of `mmi bench`; `pytorch` is the default."""

    rows = BENCH

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `pytorch` before arguments that do not begin with a benchmark or ask for help."""
        if not args or args[0] not in {*self.rows, "-h", "--help"}:
            args = ["pytorch", *args]
        return super().parse_args(ctx, args)


app = table_app(Bench)


@app.callback()
def bench() -> None:
    """Benchmark the runtime: against PyTorch, with many documents at once, graph by graph.

    `mmi bench BUNDLE` compares with PyTorch, as `mmi bench pytorch BUNDLE` does.
    """
