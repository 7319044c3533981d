"""Hooks that record the inputs and outputs of parts of a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[Any, Any]]]:
    """Record (first argument, result) of every call of `modules`, by name, while the context is
    open."""
    seen: dict[str, tuple[Any, Any]] = {}

    def record(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
            seen[name] = (arguments[0], result)

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
