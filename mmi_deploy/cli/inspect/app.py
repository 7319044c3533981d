"""`mmi inspect`: a group of views; `parts` is the default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmi_deploy.cli.command_table import INSPECT, TableGroup, table_app
from mmi_deploy.errors import ConfigError
from mmi_deploy.hub.reference import is_reference

RENAMED = {
    "--cost": "cost",
    "--memory": "memory",
    "--fit": "memory --fit",
    "--cards": "gpus",
    "--target": "target",
    "--sensitivity": "sensitivity",
    "--removed": "flops-saved",
}


class Inspect(TableGroup):
    """The views of `mmi inspect`; `parts` is the default."""

    rows = INSPECT

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `parts` before arguments that do not begin with a view or ask for help."""
        if not args or args[0] not in {*self.rows, "-h", "--help"}:
            for word in args:
                option = word.partition("=")[0]
                if option in RENAMED:
                    view, *kept = RENAMED[option].split()
                    others = [other for other in args if other != word]
                    command = " ".join(["mmi inspect", view, *others[:1], *kept, *others[1:]])
                    raise ConfigError(
                        f"{option} is not an option of `mmi inspect`",
                        fix=f"It is a view now: `{command}`",
                    )
            first = args[0] if args else "-"
            if not (first.startswith("-") or is_reference(first) or Path(first).exists()):
                raise ConfigError(
                    f"{first} is neither a folder nor a view",
                    expected=f"a bundle, a model folder, hf://org/name, or one of "
                    f"{', '.join(self.rows)}",
                )
            args = ["parts", *args]
        return super().parse_args(ctx, args)


app = table_app(Inspect)


@app.callback()
def inspect() -> None:
    """Show parts, cost and memory of a bundle, a model folder or a preset.

    `mmi inspect FOLDER` shows its parts; without a folder, the presets.
    """
