"""Golden case files: every kind is compared, listed as not compared, or said to differ."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmi_train.golden.__main__ import main
from mmi_train.golden.case_files import check_cases, read_cases
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


DATA_KINDS = {
    "ade20k_colour": 4,
    "caption": 24,
    "colour_mode": 8,
    "flip": 10,
    "grounded_boxes": 6,
    "grounding": 40,
    "interleaved_prompt": 10,
    "laion": 32,
    "mixing": 6,
    "mmc4": 64,
    "pack": 16,
    "segmentation": 10,
    "story": 58,
    "text_to_image": 18,
    "transform": 46,
    "transform_small": 12,
    "visdial": 10,
    "vqa": 31,
}


# Cases on which the published code fails.
PUBLISHED_FAILURES = {"grounding": 2, "segmentation": 2, "story": 2, "vqa": 1}


@pytest.fixture(scope="module")
def published(golden_file: Callable[[str], Path]) -> dict[str, Any]:
    path = golden_file("data_and_metrics_2.json")
    found = read_cases(path)
    assert found is not None
    return found


@pytest.mark.parametrize("kind", DATA_KINDS)
def test_every_published_case_of_data_is_reproduced(kind: str, published: dict[str, Any]) -> None:
    assert len(published[kind]) == DATA_KINDS[kind]
    (line,) = check_cases("published", {kind: published[kind]})
    assert line.verdict == "pass", line.detail
    counted = sum(map(int, re.findall(r"(\d+) not compared", line.detail)))
    assert counted == PUBLISHED_FAILURES.get(kind, 0), line.detail


def changed(value: Any) -> Iterator[Any]:
    """The value with each of its numbers and texts changed in turn, one at a time."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from ({**value, key: other} for other in changed(inner))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from ([*value[:index], other, *value[index + 1 :]] for other in changed(inner))
    elif isinstance(value, str):
        yield value + "x"
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value + 1


@pytest.mark.parametrize(
    ("kind", "number", "keys"),
    [
        ("caption", 1, ("items", "texts", "text_ids", "attention_mask", "targets")),
        ("vqa", 1, ("items", "texts", "ignore_prompt_token_offset", "targets", "images")),
        ("text_to_image", 2, ("items", "text_ids", "targets")),
        ("grounding", 1, ("texts", "text_ids", "targets")),
        ("story", 0, ("text_ids", "targets", "images")),
        ("segmentation", 0, ("text_ids", "targets", "images")),
        ("visdial", 3, ("text", "options_ids", "image")),
        ("mmc4", 0, ("text", "text_ids", "images")),
        ("laion", 0, ("text", "text_ids", "images")),
        ("pack", 1, ("rows", "targets_when_dataset_is_laion_en")),
        ("mixing", 0, ("output",)),
        ("interleaved_prompt", 0, ("text", "text_ids", "images")),
        ("transform", 0, ("uint8_sha256",)),
        ("ade20k_colour", 1, ("output",)),
    ],
)
def test_a_changed_case_is_found(
    kind: str, number: int, keys: tuple[str, ...], published: dict[str, Any]
) -> None:
    case = published[kind][number]

    def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        if path and path[-1] in keys:
            yield path
        elif isinstance(value, dict | list):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in pairs:
                yield from places(inner, (*path, key))

    def put_at(value: Any, path: tuple[Any, ...], new: Any) -> Any:
        if not path:
            return new
        copy = dict(value) if isinstance(value, dict) else list(value)
        copy[path[0]] = put_at(value[path[0]], path[1:], new)
        return copy

    output = {"output": case["output"]}
    found = list(places(output))
    assert {path[-1] for path in found} == set(keys)
    for path in found[:6]:
        value: Any = output
        for key in path:
            value = value[key]
        other = next(changed(value))
        broken = {**case, **put_at(output, path, other)}
        (line,) = check_cases("changed", {kind: [broken]})
        assert line.verdict == "FAIL", path
