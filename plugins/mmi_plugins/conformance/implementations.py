"""Implementations of the operator under test, each behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Protocol

import numpy as np

from mmi_plugins.operator import Call


class Implementation(Protocol):
    """One implementation of the operator."""

    name: str
    most_rows: int | None  # rows of a call that are run, chosen at random; None: all

    def missing(self) -> str | None:
        """Reason why it cannot run on this machine, or None."""

    def run(self, call: Call, rows: np.ndarray) -> np.ndarray:
        """Outputs [rows, d] of `rows` (b, q, h), [rows, 3]."""


def _from(module: str, name: str) -> Callable[[], Implementation]:
    def load() -> Implementation:
        implementation: Implementation = getattr(import_module(module), name)
        return implementation

    return load


# Implementations of the package `mmi_emulator`, which comes with the source tree, not the wheel.
EMULATED = ("emulator", "shim")

# By the name of `--through`; importing one may take packages that are not installed.
IMPLEMENTATIONS: Mapping[str, Callable[[], Implementation]] = MappingProxyType(
    {
        "emulator": _from("mmi_emulator.emulator", "EMULATOR"),
        "shim": _from("mmi_emulator.shim", "SHIM"),
        "onnxruntime": _from("mmi_plugins.conformance.onnxruntime_kernel", "ONNXRUNTIME"),
        "function": _from("mmi_plugins.conformance.function", "FUNCTION"),
        "torch": _from("mmi_plugins.conformance.torch_op", "TORCH_OP"),
    }
)
