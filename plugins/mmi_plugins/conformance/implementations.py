"""The implementations of the operator, each behind one interface so that all are tried alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Protocol

import numpy as np

from mmi_plugins.operator import Call


class Implementation(Protocol):
    """One way to run the operator."""

    name: str
    most_rows: int | None
    """Rows of a call above which a chosen few are tried; None: all, always."""

    def missing(self) -> str | None:
        """Why it cannot run on this machine, or None."""

    def run(self, call: Call, rows: np.ndarray) -> np.ndarray:
        """Outputs [k, d] of `rows` [k, 3], each a (b, q, h)."""


def _from(module: str, name: str) -> Callable[[], Implementation]:
    def load() -> Implementation:
        implementation: Implementation = getattr(import_module(module), name)
        return implementation

    return load


IMPLEMENTATIONS: Mapping[str, Callable[[], Implementation]] = MappingProxyType(
    {
        "emulator": _from("mmi_emulator.emulator", "EMULATOR"),
        "shim": _from("mmi_emulator.shim", "SHIM"),
        "onnxruntime": _from("mmi_plugins.conformance.onnxruntime_kernel", "ONNXRUNTIME"),
        "function": _from("mmi_plugins.conformance.function", "FUNCTION"),
        "torch": _from("mmi_plugins.conformance.torch_op", "TORCH_OP"),
    }
)
"""By the name that people use; importing one may need packages that are not installed."""
