"""The Python that the README and the docs show, run as it stands against a server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploy.server.server_process import ServerProcess

SNIPPETS = [
    (path, number, text)
    for path in ("README.md", "docs/server.md", "docs/responses.md")
    for number, text in enumerate(
        re.findall(
            r"```python\n(.*?)```",
            (Path(__file__).resolve().parents[3] / path).read_text(),
            re.DOTALL,
        )
    )
    if "OpenAI(" in text
]


@pytest.mark.parametrize(
    ("path", "text"),
    [(path, text) for path, _, text in SNIPPETS],
    ids=[f"{path}-{number}" for path, number, _ in SNIPPETS],
)
def test_a_snippet_runs_as_it_stands(
    path: str,
    text: str,
    server: ServerProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    text, count = re.subn(r"http://(127\.0\.0\.1|localhost):8000", server.address, text)
    assert count == 1, "the address of the server"
    exec(compile(text, path, "exec"), {})
    written = sorted(tmp_path.glob("*.png"))
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written)
    assert capsys.readouterr().out.strip() or written, "it shows something"


def test_every_place_shows_one() -> None:
    assert {path for path, _, _ in SNIPPETS} == {"README.md", "docs/server.md", "docs/responses.md"}
