"""What a command needs to be installed, said in one line when it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmi_deploy.errors import MmiError

EXTRAS = {
    "generate": "cpu",
    "verify --run": "cpu",
    "verify --target": "build",
    "train": "train",
    "evaluate": "train",
    "convert": "train",
    "init": "init",
    "export": "export",
    "inspect --cost": "build",
    "inspect --memory": "build",
    "inspect --removed": "export",
    "inspect --sensitivity": "build",
    "build": "build",
    "bench": "bench",
}
"""Which extra of the package brings all that a command needs."""


@contextmanager
def extras(command: str) -> Iterator[None]:
    """Around the imports of `command`: a missing module becomes a `MmiError` naming the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module.startswith("mmi_"):
            raise  # ours: a fault, not something to install
        raise MmiError(
            f"`mmi {command}` needs {module}, which is not installed",
            fix=f"install it with: pip install 'mmi_deploy[{EXTRAS[command]}]'",
        ) from None
