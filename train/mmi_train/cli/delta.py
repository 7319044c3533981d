"""`mmi delta`: a group of commands about what a model learned, apart from its base."""

from __future__ import annotations

from mmi_deploy.cli.command_table import DELTA, TableGroup, table_app


class Delta(TableGroup):
    """The commands of `mmi delta`."""

    rows = DELTA


app = table_app(Delta, no_args_is_help=True)


@app.callback()
def delta() -> None:
    """Keep what a model learned apart from its base, and put the two together again."""
