"""Optional dependencies of commands: a missing one is named in one line, with its extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmi_deploy.cli.command_table import row_of
from mmi_deploy.errors import MmiError


@contextmanager
def extras(command: str, extra: str | None = None) -> Iterator[None]:
    """Around the imports of `command`: a missing module becomes a `MmiError` naming the extra, that
    of the command's row by default."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module.startswith("mmi_"):
            raise  # a fault of this project, not something to install
        raise MmiError(
            f"`mmi {command}` needs {module}, which is not installed",
            fix=f"install it with: pip install 'mmi_deploy[{extra or row_of(command).extra}]'",
        ) from None
