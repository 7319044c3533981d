"""Both readings, exported with their receipts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from exports import Exported


@pytest.fixture(scope="session", params=["paper", pytest.param("released", marks=pytest.mark.slow)])
def exported(request: pytest.FixtureRequest, exported_once: Callable[[str], Exported]) -> Exported:
    """A small random model of either reading, and its bundle."""
    return exported_once(request.param)
