"""JSONL of documents: ids, and memory that does not grow with the lines."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from mmi_deploy.documents import json_lines
from mmi_deploy.documents.document import Draw, Text
from mmi_deploy.documents.json_lines import DocumentLines
from mmi_deploy.errors import DocumentError


def lines_of(path: Path, *values: object, start: str = "") -> DocumentLines:
    path.write_text(start + "".join(json.dumps(value) + "\n" for value in values))
    return DocumentLines(path, 64, 8, {"seed", "stop"})


def test_lines_have_numbers_ids_documents_and_options(tmp_path: Path) -> None:
    first = {"parts": [{"text": " a\u2028b "}, {"draw": True}], "seed": 3}
    second = {"id": "x", "parts": [{"text": "ü"}], "stop": ["."]}
    lines = lines_of(tmp_path / "a.jsonl", first, second, start="\ufeff\n  \n")
    found = list(lines)
    assert [(line.number, line.id, line.options) for line in found] == [
        (3, 3, {"seed": 3}),
        (4, "x", {"stop": ["."]}),
    ]
    assert lines.document(found[0]).parts == (Text("a\u2028b"), Draw())
    assert lines.document(found[1]).parts == (Text("ü"),)
    assert lines.count == 2 and list(lines) == found


def test_ids_are_compared_whole_where_their_hashes_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "_digest", lambda line: len(str(line.id)))
    values = [{"id": name, "parts": [{"text": "w"}]} for name in ("a", "b", "cc", "c")]
    assert lines_of(tmp_path / "a.jsonl", *values).count == 4
    with pytest.raises(DocumentError, match=r"lines 2 and 5 of .* have the same id; .* got b"):
        lines_of(tmp_path / "a.jsonl", *values, {"id": "b", "parts": [{"text": "w"}]})


def test_memory_does_not_grow_with_the_lines(tmp_path: Path) -> None:
    """8 bytes for each line, which numpy sorts in a copy: 8,000 lines of 1.3 kB are 10 MB."""
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for number in range(8_000):
            file.write(json.dumps({"id": f"n{number}", "parts": [{"text": "w5 " * 400}]}) + "\n")
    tracemalloc.start()
    try:
        lines = DocumentLines(path, 2048, 8, ())
        assert sum(1 for _ in lines) == lines.count == 8_000
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()
