"""Golden case files: every kind is compared, listed as not compared, or said to differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmi_train.golden.__main__ import main
from mmi_train.golden.check import check_folder

PACKING = {
    "truncation_level": "image",
    "max_num_images": -1,
    "num_total_token": 6,
    "num_img_token": 2,
    "soi": 8,
    "image": 9,
    "bos": 1,
    "eos": 2,
    "input": [{"text_ids": [1, 5, 8, 9, 9, 6, 7, 2], "images": [0]}],
    "output": [{"text_ids": [1, 5, 8, 9, 9, 6], "images": [0], "nearest_bos_idxs": [0]}],
}


def put(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value))


def test_known_kinds_are_compared_and_others_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "data_and_metrics.json", {"packing": [PACKING], "poems": [{}, {}], "about": {}})
    (tmp_path / "data_and_metrics.safetensors").write_bytes(b"arrays")
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "packing (1)" in printed and "poems (2)" in printed and "ignored" not in printed
    assert "1 passed, 0 failed, 1 not compared" in printed


def test_a_case_that_differs_fails_with_its_place(tmp_path: Path) -> None:
    wrong = json.loads(json.dumps(PACKING))
    wrong["output"][0]["text_ids"][3] = 7
    put(tmp_path, "other_name.json", {"packing": [PACKING, wrong | {"name": "cut"}, {}]})
    report = check_folder(tmp_path)
    assert report.failed
    assert report.lines[0].detail.startswith("2 of 3 cases differ: case 1 (cut): rows[0].text_ids")
    assert "case 2: KeyError" in report.lines[0].detail


def test_a_file_without_known_kinds_is_ignored(tmp_path: Path) -> None:
    put(tmp_path, "notes.json", {"poems": [{}]})
    put(tmp_path, "list.json", [1])
    report = check_folder(tmp_path)
    assert report.failed and len(report.ignored) == 2
