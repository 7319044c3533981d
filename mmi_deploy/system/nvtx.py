"""Named ranges for NVIDIA's profilers, where the package `nvtx` is installed.

Nsight Systems shows them above the kernels. Without the package a range costs one call.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

_nvtx: Any = None
with suppress(ImportError):
    _nvtx = importlib.import_module("nvtx")

_NOTHING: AbstractContextManager[None] = nullcontext()


def profiler_range(name: str) -> AbstractContextManager[Any]:
    """Context manager that shows its block as `name` in a profiler."""
    if _nvtx is None:
        return _NOTHING
    found: AbstractContextManager[Any] = _nvtx.annotate(name, domain="mmi")
    return found
