"""Segmenters for ADE20K: an ONNX graph or a function, their scores, and code that is not run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from mmi_deploy.cli.app import run
from mmi_deploy.errors import MmiError
from mmi_train.evaluation.metrics.segmenter import open_segmenter, scaled

RED, GREEN, BLUE = (250, 10, 10), (10, 250, 10), (10, 10, 250)


def graph(path: Path, side: int | str, kind: int = TensorProto.FLOAT) -> Path:
    """A segmenter whose scores of classes 0, 1 and 2 are the red, green and blue of a pixel."""
    x = helper.make_tensor_value_info("x", kind, [1, 3, side, side])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, side, side])
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    model = helper.make_model(
        helper.make_graph([node], "g", [x], [y]), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 9
    onnx.save(model, path)
    return path


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `colours` with the same segmenter as the graph, of half its size."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "colours.py").write_text(
        "def segment(rgb):\n    return rgb.argmax(-1)[::2, ::2]\n\nnumber = 3\n\n"
        "def scores(rgb):\n    return rgb\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def ade20k(tmp_path: Path) -> list[str]:
    """A map of 8 x 4 labels: 1 in its left half's right half, else 3, 0 and 2; and the picture of
    its centre, drawn with a green corner in place of a red one."""
    label = np.repeat(np.array([[3, 0, 1, 2]], np.uint8), 2, axis=1).repeat(4, axis=0)
    data = tmp_path / "data"
    place = data / "annotations" / "validation"
    place.mkdir(parents=True)
    for number in (1, 2):
        Image.fromarray(label).save(place / f"ADE_val_{number:08d}.png")
    drawn = np.full((4, 4, 3), BLUE, np.uint8)  # the centre: columns 0 and 1 of no label
    drawn[:, 2:] = RED
    drawn[:2, 2:] = GREEN
    Image.fromarray(drawn).save(tmp_path / "drawn.png")
    line = {"id": "ADE_val_00000001", "image": "drawn.png"}
    (tmp_path / "p.jsonl").write_text(json.dumps(line))
    words = ["evaluate", "--predictions", str(tmp_path / "p.jsonl"), "--benchmark", "ade20k"]
    return [*words, "--data", str(data), "--json"]


@pytest.mark.parametrize("form", ["free", "fixed", "bytes", "function"])
def test_drawn_pictures_are_segmented_and_scored(
    form: str,
    ade20k: list[str],
    code: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The centre of the map has 8 pixels of label 1, of which 4 are right and 4 are of class 2;
    the map that is missing has 8 of each of labels 1, 2 and 3."""
    path = tmp_path / "s.onnx"
    match form:
        case "free":
            named = str(graph(path, "side"))
        case "fixed":
            named = str(graph(path, 4))
        case "bytes":
            named = str(graph(path, "side", TensorProto.UINT8))
        case _:
            named = "colours:segment"
    assert run([*ade20k, "--segmenter", named]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["answered"], found["missing"]) == (1, 1)
    expected = {"mIoU": 100 * (4 / 16 + 0 + 0) / 3, "pixel accuracy": 100 * 4 / 32}
    assert found["metrics"] == pytest.approx(expected)


def test_a_segmenter_is_scaled_by_nearest_neighbours() -> None:
    small = np.array([[1, 2], [3, 4]])
    assert scaled(small, 4, 6).tolist() == np.kron(small, np.ones((2, 3), int)).tolist()
    assert scaled(np.kron(small, np.ones((2, 3), int)), 2, 2).tolist() == small.tolist()


def test_code_in_the_data_folder_is_not_run(
    ade20k: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data"
    for name in ("mine.py", "package/__init__.py", "package/inner.py"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef f(rgb): return rgb\n")
    monkeypatch.syspath_prepend(str(data))
    for named in ("mine:f", "package.inner:f", "package:f"):
        assert run([*ade20k, "--segmenter", named]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "lies in the data folder" in line and "whose code is not run" in line
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ("colours", "expected FILE.onnx or module:function"),
        ("nowhere:f", "there is no Python module nowhere"),
        ("colours:number", "has no function number"),
        ("none.onnx", "there is no file none.onnx"),
    ],
)
def test_other_segmenters_are_refused(named: str, says: str, code: Path, tmp_path: Path) -> None:
    with pytest.raises(MmiError, match=says):
        open_segmenter(named, tmp_path / "data")


def test_results_that_are_no_map_are_refused(code: Path, tmp_path: Path) -> None:
    with pytest.raises(MmiError, match=r"expected integers \[height, width\]"):
        open_segmenter("colours:scores", tmp_path / "data")(np.zeros((2, 2, 3), np.uint8))
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(MmiError, match="is no graph that ONNX Runtime takes"):
        open_segmenter(str(tmp_path / "x.onnx"), tmp_path / "data")


def test_a_segmenter_of_another_benchmark_is_refused(
    code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "captions_val2014.json").write_text(
        json.dumps({"annotations": [{"image_id": 7, "caption": "a"}]})
    )
    words = ["--predictions", "p.jsonl", "--benchmark", "coco-t2i", "--data", str(tmp_path)]
    assert run(["evaluate", *words, "--segmenter", "colours:segment"]) == 2
    assert "--segmenter is of ade20k" in capsys.readouterr().err
