"""Shared fixtures: comparisons in one form, and small outputs of the published code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

Published = Callable[[str], tuple[dict[str, Tensor], dict[str, Any]]]
Agree = Callable[..., None]


@pytest.fixture(scope="session")
def published(repository: Path) -> Published:
    """`published("mmfs_llm")` -> (tensors, configuration) of that run of the published code; names:
    `state.<its name>`, `in.<name>`, `out.<name>`."""

    def read(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        path = repository / "tests" / "golden" / name
        about = json.loads(path.with_suffix(".json").read_text())
        return load_file(path.with_suffix(".safetensors")), about["config"]

    return read


@pytest.fixture(scope="session")
def agree() -> Agree:
    """`agree(actual, expected, tolerance)`: greatest error at most tolerance * greatest |expected|;
    on failure it says the greatest and the mean error, where, and what tolerance would pass."""

    def check(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
        got, want = (
            x.detach().double().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, float)
            for x in (actual, expected)
        )
        assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
        error, scale = np.abs(got - want), max(float(np.abs(want).max()), 1e-6)
        worst = np.unravel_index(error.argmax(), error.shape)
        assert float(error.max()) <= tolerance * scale, (
            f"greatest error {error.max():.3g} at {tuple(map(int, worst))}, "
            f"mean {error.mean():.3g}; tolerance {tolerance:.1g} * {scale:.3g}; "
            f"{error.max() / scale:.3g} would pass"
        )

    return check
