"""Fixture: a stub that `huggingface_hub` takes for the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.hub.stub_hub import Hub, constants, stub_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A stub that `huggingface_hub` takes for the Hub, with a cache of its own."""
    library = constants()
    with stub_hub() as stub:
        monkeypatch.setattr(library, "ENDPOINT", stub.endpoint)
        template = library.HUGGINGFACE_CO_URL_TEMPLATE
        if not template.startswith("{endpoint}"):  # the library's default address is part of it
            template = stub.endpoint + template[template.index("/{repo_id}") :]
        monkeypatch.setattr(library, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(library, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(library, "HF_HUB_DISABLE_XET", True)
        yield stub
