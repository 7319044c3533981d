"""`mmi data`: a group of commands about data sets."""

from __future__ import annotations

from mmi_deploy.cli.command_table import DATA, TableGroup, table_app


class Data(TableGroup):
    """The commands of `mmi data`."""

    rows = DATA


app = table_app(Data, no_args_is_help=True)


@app.callback()
def data() -> None:
    """Check data sets in their published formats, before a training or an evaluation reads them."""
