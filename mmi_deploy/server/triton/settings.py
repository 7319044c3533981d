"""Settings of the model, which a model repository keeps as parameters of its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mmi_deploy.spec.backends import AUTO, CPU


@dataclass(frozen=True)
class ModelSettings:
    """bundle: its path on the server's machine. slots: documents at once, None for as many as the
    memory holds. target, kernels, threads: as in `Runtime.open`."""

    bundle: str
    target: str = CPU
    slots: int | None = None
    kernels: str = AUTO
    threads: int = 0

    def parameters(self) -> dict[str, str]:
        """Strings by name; those that are None are left out."""
        return {name: str(value) for name, value in asdict(self).items() if value is not None}

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelSettings:
        """Settings in a model configuration, as the Python backend hands it over."""
        given = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        numbers = {name: int(given[name]) for name in ("slots", "threads") if name in given}
        return cls(**{**given, **numbers})
