"""`mmi export` of models that are too large to be loaded, up to the graphs themselves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from export.small_models import paper_reading
from mmi_deploy.bundle import manifest
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.cli.app import run
from mmi_deploy.parity import Comparison, Error, Proof, Tolerance
from mmi_deploy.spec import presets
from mmi_deploy.spec.graphs import Graph
from mmi_export import export
from mmi_export.placeholder_model import write_placeholder_model
from mmi_export.tracing.weight_sources import WeightSources
from mmi_train.weights.model_folder import WEIGHTS

COMPARED = Comparison(
    "hidden", Tolerance(1e-5, "a test"), Error(1e-6, 1e-7, 5e-7, 1.0, 0.5, (0,), 8), 1.0, 1.0
)
PROOF = Proof("llm", "the model", (({"b": 1}, COMPARED),))


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Graphs are not traced, which takes a minute, but written and proved by word alone; the names
    of the models that they are of."""
    models: list[str] = []

    def export_graph(sources: WeightSources, graph: Graph, path: Path) -> set[str]:
        models.append(sources.model.module.config.name)
        path.write_bytes(graph.name.encode())
        if not sources.links:
            return set()
        for file in sources.stored.files:
            export.link_file(file, path.parent)
        return {file.name for file in sources.stored.files}

    monkeypatch.setattr(export, "export_graph", export_graph)
    monkeypatch.setattr(export, "onnx_runner", lambda path: path)
    monkeypatch.setattr(export, "prove", lambda *_: PROOF)
    monkeypatch.setattr(export, "_write_inputs", lambda *_: None)  # which it reads from graphs
    monkeypatch.setitem(presets.PRESETS, "small", paper_reading)
    return models


def test_a_preset_without_weights_becomes_a_bundle_that_says_so(
    tmp_path: Path,
    untraced: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "bundle"
    command = ["export", "--preset", "small", "--sparse-weights", "--layers", "1", "-o", str(out)]
    assert run(command) == 0
    captured = capsys.readouterr()
    assert "8 graphs, 8 comparisons" in captured.out
    assert "holds empty weights" in captured.err and "proved by a slice" in captured.err
    # A slow machine adds the seconds so far.
    assert re.search(r"exporting llm \(.*graph 3 of 8", captured.err) and "linked" in captured.err
    monkeypatch.setattr(manifest, "sha256_of", pytest.fail)  # hashed when it was written
    bundle = Bundle.open(out)
    assert bundle.config.llama.layers == 1 and bundle.manifest.weights == "empty"
    assert {receipt.scope for receipt in bundle.manifest.receipts} == {"slice"}
    assert all("random weights" in r.compared_with for r in bundle.manifest.receipts)
    weights = out / "graphs" / WEIGHTS
    assert weights.stat().st_size > 10**6 > 512 * weights.stat().st_blocks
    assert {*untraced} == {"paper_reading_1_layers", "paper_reading_1_layers_slice"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_a_large_model_shares_its_file_with_the_bundle(
    tmp_path: Path, untraced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmi_export import plan

    monkeypatch.setattr(plan, "LINKED_FROM", 1000)
    write_placeholder_model(paper_reading(), tmp_path / "model", "random", torch.float16)
    command = ["export", str(tmp_path / "model"), "-o", str(tmp_path / "bundle")]
    assert run(command) == 0
    bundle = Bundle.open(tmp_path / "bundle")
    link = tmp_path / "bundle" / "graphs" / WEIGHTS
    assert link.stat().st_ino == (tmp_path / "model" / WEIGHTS).stat().st_ino
    assert bundle.manifest.weights == "given" and not bundle.remarks
    assert all("graphs/model.safetensors" in files for files in bundle.manifest.shared.values())
    assert {*untraced} == {"paper_reading"}


def test_a_dry_run_tells_sizes_and_writes_nothing(
    tmp_path: Path, untraced: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    command = [
        "export",
        "--preset",
        "released_13b",
        "--sparse-weights",
        "--dry-run",
        "-o",
        str(out),
    ]
    assert run([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["model"] == "released_13b" and plan["layout"] == "linked"
    assert plan["weights"] == plan["linked"] > 29e9 > 2e9 > plan["memory"]
    assert plan["disk"] == plan["computed"] < 1e9
    assert not untraced and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--preset", "small"], "small is a preset without weights: choose"),
        (["--preset", "small", "--sparse-weights", "--random-weights"], "choose placeholder"),
        (["--preset", "small", "--sparse-weights", "--layers", "3"], "expected 1 to 2"),
        (["--preset", "nobody", "--sparse-weights"], "there is no preset 'nobody'"),
        (["model", "--preset", "small", "--sparse-weights"], "give a model folder or --preset"),
        (["--layers", "3"], "--layers apply to a preset"),
        (["--sparse-weights"], "apply to a preset"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    tmp_path: Path,
    untraced: list[str],
    options: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["export", *options, "-o", str(tmp_path / "bundle")]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir()) and not untraced


LARGE = """
import sys, torch
from dataclasses import replace
from pathlib import Path
from mmi_deploy.spec.graphs import Limits, graphs
from mmi_deploy.spec.presets import released_13b
from mmi_export.tracing.fake_weights_model import FakeWeightsModel
from mmi_export.export import export_graph
from mmi_export.placeholder_model import cut, write_placeholder_model
from mmi_export.tracing.stored_weights import link_file, stored_weights
from mmi_deploy.system.process_memory import peak_bytes
from mmi_export.tracing.weight_sources import WeightSources
folder, config = Path(sys.argv[1]), cut(released_13b(), 2)
write_placeholder_model(config, folder, "empty", torch.float16)
fake_model = FakeWeightsModel(config)
sources = WeightSources(fake_model, stored_weights(folder, fake_model.weights), link_file)
(folder / "graphs").mkdir()
export_graph(sources, graphs(config, Limits(2048))["llm"], folder / "graphs" / "llm.onnx")
print(sources.stored.bytes, peak_bytes())
"""


@pytest.mark.slow
def test_layers_of_full_width_are_exported_in_less_memory_than_they_take(tmp_path: Path) -> None:
    """Two layers of the 13B language model: 2 GB in 16 bits, of which no half is ever held."""
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    weights, peak = map(int, done.stdout.split())
    assert weights > 4e9 and peak < 1.7e9
    graphs = list((tmp_path / "graphs").iterdir())
    assert sum(512 * path.stat().st_blocks for path in graphs) < 100e6
