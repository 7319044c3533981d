"""Servers for tests: one for all that leave it as it was, and starters of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deploy.server.server_process import SCRIPTED_ENGINE, ServerProcess
from exports import SHIPPED

if TYPE_CHECKING:
    from exports import Exported


@pytest.fixture(scope="session")
def bundle(exported_once: Callable[[str], Exported]) -> Path:
    """The shipped model: pictures of 4 steps (`ddim:4`), or of 20 (`unipc:20`)."""
    return exported_once(SHIPPED).bundle.folder


@pytest.fixture(scope="session")
def server(bundle: Path) -> Iterator[ServerProcess]:
    """A server of four slots without keys, for tests that do it no harm."""
    with ServerProcess(bundle, "--slots", 4, "--log-level", "debug") as started:
        yield started


@pytest.fixture(scope="session")
def scripted(bundle: Path) -> Iterator[ServerProcess]:
    """A server whose engine does at once what texts tell it, see scripted_engine.py."""
    with ServerProcess(bundle, engine=SCRIPTED_ENGINE) as started:
        yield started
