"""What all tests share: one thread per process, and the outputs of the published code.

`MMI_GOLDEN_DIR` names the folder that holds them; tests that need them are skipped without it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before numpy, torch and onnxruntime start their thread pools.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
from safetensors.numpy import load_file

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Golden:
    """Tensors of one run of the published code, and how it was made."""

    tensors: dict[str, np.ndarray]
    about: dict[str, Any]

    def part(self, prefix: str) -> dict[str, np.ndarray]:
        """The tensors `<prefix>.<name>` by name: `state`, `in` or `out`."""
        start = prefix + "."
        return {
            name.removeprefix(start): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(start)
        }


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds pyproject.toml."""
    return REPOSITORY


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of golden files; skips the test where there is none."""
    folder = os.environ.get("MMI_GOLDEN_DIR")
    if not folder:
        pytest.skip("MMI_GOLDEN_DIR is not set: outputs of the published code are not here")
    path = Path(folder)
    assert path.is_dir(), f"MMI_GOLDEN_DIR is {folder}, which is no folder"
    return path


@pytest.fixture(scope="session")
def golden(golden_dir: Path) -> Callable[[str], Golden]:
    """`golden("mmfs_llm")` reads that run's safetensors file and its JSON side-car."""

    def read(name: str) -> Golden:
        side_car = golden_dir / f"{name}.json"
        about = json.loads(side_car.read_text()) if side_car.exists() else {}
        return Golden(load_file(golden_dir / f"{name}.safetensors"), about)

    return read
