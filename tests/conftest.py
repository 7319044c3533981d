"""Shared fixtures: threads, exported bundles, and the outputs of the published code.

The small ones lie in tests/golden. `MMI_GOLDEN_DIR` names a folder that holds the large ones too;
tests that need those are skipped without it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before numpy, torch and onnxruntime start their thread pools.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests that import onnxruntime themselves write nothing into the home of who runs them either.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import pytest
from safetensors.numpy import load_file

if TYPE_CHECKING:
    from exports import Exported

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


@pytest.fixture(scope="module", autouse=True)
def same_threads() -> Iterator[None]:
    """A module that sets torch's number of threads, which moves last digits, keeps it to itself."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else None
    yield
    if torch and before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds pyproject.toml."""
    return REPOSITORY


@pytest.fixture(scope="session")
def exported_once(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Exported]:
    """`exported_once("paper")`: a model of exports.py and its bundle, found in the folder
    `MMI_TEST_EXPORTS`, as `make test` makes it, or made at the first call."""
    from exports import export

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers
    folder = Path(os.environ.get("MMI_TEST_EXPORTS", folder))
    return cache(lambda name: export(name, folder / name, repository / "assets"))


@pytest.fixture(scope="session")
def golden_file() -> Callable[[str], Path]:
    """Finds a golden file by name; skips the test when it is neither here nor there."""

    def find(name: str) -> Path:
        folders = [REPOSITORY / "tests" / "golden"]
        if elsewhere := os.environ.get("MMI_GOLDEN_DIR"):
            folders.append(Path(elsewhere))
            assert folders[-1].is_dir(), f"MMI_GOLDEN_DIR is {elsewhere}, which is not a folder"
        for folder in folders:
            if (folder / name).exists():
                return folder / name
        pytest.skip(f"{name} is not here: set MMI_GOLDEN_DIR to the folder that holds it")

    return find


@pytest.fixture(scope="session")
def golden(golden_file: Callable[[str], Path]) -> Callable[[str], Golden]:
    """`golden("mmfs_llm")` reads that run's safetensors file and its JSON side-car."""

    def read(name: str) -> Golden:
        tensors = golden_file(f"{name}.safetensors")
        side_car = tensors.with_suffix(".json")
        about = json.loads(side_car.read_text()) if side_car.exists() else {}
        return Golden(load_file(tensors), about)

    return read
