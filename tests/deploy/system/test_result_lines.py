"""Results as JSONL: whole lines, resumed, with nothing of anybody else's overwritten."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mmi_deploy.errors import MmiError
from mmi_deploy.system.result_lines import RECORD, check_results, result_lines, run_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "results.jsonl"


def test_what_results_depend_on_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert run_of(path) is None
    with result_lines(path, {"seed": 1, "stop": ["."]}):
        pass
    assert run_of(path) == {"seed": 1, "stop": ["."]}


def test_lines_of_a_resumed_run_are_those_with_a_result(path: Path) -> None:
    with result_lines(path, {"seed": 1}) as results:
        assert results.done == 0 and 3 not in results
        results.add(300, {"id": "a"})
        results.add(2, {"id": "b", "error": "odd"})
        results.add(3, {"id": "ü\u2028"})
    with result_lines(path, {"seed": 1}) as results:
        assert [line for line in range(1000) if line in results] == [3, 300]
        assert results.done == 2
    lines = path.read_text(encoding="ascii").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"line": 300, "id": "a"},
        {"line": 3, "id": "ü\u2028"},
    ]
    with pytest.raises(MmiError, match="seed differs; expected 1; got 2"):
        with result_lines(path, {"seed": 2}):
            pass


def test_a_line_that_cannot_be_written_whole_is_not_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def short(descriptor: int, data: Any) -> int:
        return real(descriptor, data[:5])

    def broken(descriptor: int, data: Any) -> int:
        if bytes(data).startswith(b'"id"'):
            raise KeyboardInterrupt
        return real(descriptor, data[:12])

    with result_lines(path, {}) as results:
        monkeypatch.setattr(os, "write", short)
        results.add(1, {"id": "a"})
        monkeypatch.setattr(os, "write", broken)
        with pytest.raises(KeyboardInterrupt):
            results.add(2, {"id": "b"})
        monkeypatch.setattr(os, "write", real)
        results.add(3, {"id": "c"})
    assert path.read_text() == '{"line": 1, "id": "a"}\n{"line": 3, "id": "c"}\n'


def test_a_file_never_takes_the_place_of_another(path: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    with result_lines(path, {}) as results:
        assert results.add_file("1.png", b"a") == "results.files/1.png"
        assert results.add_file("1.png", b"a") == "results.files/1.png"
        assert results.add_file("1.png", b"b") == "results.files/1-2.png"
        (path.parent / "results.files" / "2.png").symlink_to(mine)
        (path.parent / "results.files" / "2-2.png").mkdir()
        assert results.add_file("2.png", b"mine") == "results.files/2-3.png"
    folder = path.parent / "results.files"
    assert {p.name for p in folder.iterdir()} == {
        RECORD, "1.png", "1-2.png", "2.png", "2-2.png", "2-3.png",
    }  # fmt: skip
    assert mine.read_text() == "mine" and (folder / "1.png").read_bytes() == b"a"


def test_links_in_place_of_results_are_refused(path: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text("")
    with result_lines(path, {}):
        pass
    path.unlink()
    path.symlink_to(mine)
    with pytest.raises(MmiError, match="is not a file"):
        check_results(path)
    path.unlink()
    record = path.parent / "results.files" / RECORD
    moved = record.rename(tmp_path / "record")
    record.symlink_to(moved)
    before = moved.read_bytes()
    with pytest.raises(MmiError, match="cannot be understood"):
        with result_lines(path, {}):
            pass
    assert record.is_symlink() and moved.read_bytes() == before
