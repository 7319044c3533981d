"""The pipeline as a user runs it, on a small random model: export, verify, generate."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.small_models import paper_reading
from exports import Exported
from mmi_deploy.cli.app import run
from mmi_deploy.documents.files import read_document
from mmi_deploy.documents.images import read_rgb
from mmi_deploy.spec.graphs import OPSET, Limits, graphs

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

pytestmark = pytest.mark.slow


def mmi(*arguments: object) -> int:
    return run([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def bundle(exported_once: Callable[[str], Exported]) -> Path:
    return exported_once("paper").bundle.folder


def generate(bundle: Path, out: Path, *options: object) -> int:
    common = ("-b", bundle, "-o", out, "--max-tokens", 12, "--max-images", 1)
    return mmi("generate", EXAMPLES / "story.md", *common, *options)


def test_the_bundle_holds_every_graph_of_the_contract_with_a_receipt(bundle: Path) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    contract = graphs(paper_reading(), Limits(**manifest["limits"]))
    assert set(manifest["graphs"]) == set(contract)
    assert {receipt["graph"] for receipt in manifest["receipts"]} == set(contract)
    for name, graph in contract.items():
        proto = onnx.load(bundle / manifest["graphs"][name], load_external_data=False)
        assert [value.name for value in proto.graph.input] == [t.name for t in graph.inputs]
        assert [value.name for value in proto.graph.output] == [t.name for t in graph.outputs]
        assert {entry.domain: entry.version for entry in proto.opset_import}[""] == OPSET


def test_a_fresh_bundle_verifies_and_runs(bundle: Path) -> None:
    assert mmi("verify", bundle, "--run") == 0


def test_a_story_goes_on_with_pictures_the_same_for_the_same_seed(
    bundle: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert generate(bundle, tmp_path / name, "--seed", seed) == 0
    first, again, other = (tmp_path / name for name in "abc")
    assert (first / "story.md").read_bytes() == (again / "story.md").read_bytes()
    drawn = [read_rgb(folder / "picture-02.png") for folder in (first, again, other)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()
    assert drawn[0].shape == (32, 32, 3) and drawn[0].std() > 1
    assert len(read_document(first / "story.md").images) >= 2
    given = (EXAMPLES / "pictures" / "scene.png").read_bytes()
    assert (first / "picture-01.png").read_bytes() == given


def test_another_sampler_of_the_bundle_can_be_chosen(bundle: Path, tmp_path: Path) -> None:
    assert generate(bundle, tmp_path / "out", "--schedule", "ddpm:3") == 0
    assert "ddpm:3" in (tmp_path / "out" / "index.html").read_text()


def test_a_sampler_that_is_not_there_is_refused_with_those_that_are(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(bundle, tmp_path / "out", "--schedule", "ddpm:9") == 2
    assert re.search(r"mmi: .*'ddpm:9'.*unipc:4 or ddpm:3", capsys.readouterr().err)


def test_weights_that_changed_after_the_export_are_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    largest = max(copy.glob("graphs/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert generate(copy, tmp_path / "out") == 2
    assert f"{largest.name} has changed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
