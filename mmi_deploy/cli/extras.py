"""Optional dependencies of commands: a missing module becomes a one-line error with its extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmi_deploy.cli.command_table import row_of
from mmi_deploy.errors import MmiError


@contextmanager
def extras(command: str, extra: str | None = None) -> Iterator[None]:
    """Convert a missing module in the imports of `command` to a `MmiError` that names the extra
    (default: that of the command's row)."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module.startswith("mmi_"):
            raise  # a bug in this project, not a missing dependency
        raise MmiError(
            f"`mmi {command}` needs {module}, which is not installed",
            fix=f"install it with: pip install 'mmi_deploy[{extra or row_of(command).extra}]'",
        ) from None
