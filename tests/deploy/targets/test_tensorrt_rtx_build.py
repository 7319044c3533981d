"""TensorRT-RTX, which needs no GPU to build, makes the engines of the shipped model."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exports import SHIPPED, Exported
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.cli.app import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx") is None,
        reason="pip install tensorrt-rtx-cu13",
    ),
]

# Number of MMFS nodes in each graph of `tiny`.
MMFS = {"llm": 3, "denoise_step": 3, "denoise_shallow": 1}


@pytest.fixture(scope="module")
def bundle(
    exported_once: Callable[[str], Exported], tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """Copy of the bundle that this module builds into."""
    folder = tmp_path_factory.mktemp("built") / "bundle"
    shutil.copytree(exported_once(SHIPPED).bundle.folder, folder, copy_function=os.link)
    return Bundle.open(folder)


@pytest.fixture
def build(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Callable[..., dict[str, Any]]:
    """Run `mmi build BUNDLE --json ...` with a cache of its own; returns the only target."""
    monkeypatch.setenv("MMI_CACHE", str(tmp_path / "cache"))

    def call(*arguments: str) -> dict[str, Any]:
        options = ["--target", "tensorrt-rtx", "--arch", "sm89", "--unproved", "--json"]
        code = run(["build", str(bundle.folder), *options, *arguments])
        said = capsys.readouterr()
        assert code == 0, said.err
        (target,) = json.loads(said.out)["targets"]
        return target

    return call


def test_every_graph_is_built_in_half_precision_with_our_plugin_inside(
    bundle: Bundle, build: Callable[..., dict[str, Any]]
) -> None:
    """All but the vision encoder, which takes as long as the others together."""
    names = [name for name in bundle.graphs if name != "vision_encoder"]
    target = build("--precision", "fp16", *(word for name in names for word in ("--graph", name)))
    reports = {graph["graph"]: graph for graph in target["graphs"]}
    assert list(reports) == names
    assert {name: reports[name]["plugin_layers"] for name in names} == {
        name: MMFS.get(name, 0) for name in names
    }
    for name, report in reports.items():
        activations = {t.name for t in bundle.graphs[name].inputs if t.activation}
        assert {report["bindings"][one] for one in activations} <= {"half"}, name
        assert report["peak_bytes"] > 0 and report["seconds"] > 0
    layers = reports["llm"]["layers"]
    assert layers["KV_CACHE_UPDATE"] == 2 * bundle.config.llama.layers
    assert set(reports["llm"]["profiles"]) == {"prefill", "decode"}
    assert "build-only" in target["remark"] or "mmi verify" in target["remark"]


def test_prefill_and_decode_share_one_copy_of_the_weights(
    bundle: Bundle, build: Callable[..., dict[str, Any]]
) -> None:
    """Bytes from the middle of each of the largest weights occur once in the engine."""
    from safetensors.numpy import load_file

    target = build("--precision", "fp32", "--graph", "llm")
    engine = bundle.target_folder(target["target"]) / "llm.engine"
    data = engine.read_bytes()
    weights = load_file(bundle.graph_file("llm").with_suffix(".safetensors"))
    largest = sorted(weights.values(), key=lambda weight: -weight.nbytes)[:6]
    middles = [weight.tobytes()[4096 : 4096 + 64] for weight in largest]
    assert [data.count(middle) for middle in middles] == [1] * 6


def test_the_language_model_is_built_with_few_bits(build: Callable[..., dict[str, Any]]) -> None:
    """With TensorRT's kernels, and by default, for one document at a time, with our plugin's."""
    options = ("--precision", "fp8", "--graph", "llm")
    (theirs,) = build(*options, "--products", "tensorrt")["graphs"]
    assert theirs["layers"]["DEQUANTIZE"] > 20 and theirs["plugin_layers"] == MMFS["llm"]
    (ours,) = build(*options, "--rows", "1")["graphs"]
    assert "DEQUANTIZE" not in ours["layers"]
    assert ours["plugin_layers"] == MMFS["llm"] + theirs["layers"]["DEQUANTIZE"]
