"""Entry points: functions and classes named by a string and imported on first use.

Tables of commands, backends and kernel libraries hold such strings, so that `mmi_deploy` imports
neither its sibling packages nor a runtime that is not installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def load(entry_point: str) -> Any:
    """The attribute that `"package.module:attribute"` names. Raises `ModuleNotFoundError`."""
    module, _, attribute = entry_point.partition(":")
    return getattr(import_module(module), attribute)
