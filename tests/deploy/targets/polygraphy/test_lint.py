"""`polygraphy check lint`: every graph of a bundle and every rewrite of it, node by node in ONNX
Runtime, on the inputs of the bundle."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.runtime.buffers import element_type
from mmi_deploy.spec.backends import CPU, TENSORRT
from mmi_deploy.spec.graphs import GRAPHS, Graph
from mmi_deploy.targets.polygraphy.bundle_files import FOLDER, loaders
from mmi_deploy.targets.polygraphy.load_data import read_inputs
from mmi_deploy.targets.precision import RECIPES, rewrite

if TYPE_CHECKING:
    from exports import Exported

NAMES = [make.__name__ for make in GRAPHS]

# What lint finds and is right all the same: part of its message -> the reason.
KNOWN = {
    "TensorScatter: in-place optimization not activated": "lint runs a node alone, with buffers of "
    "its own; engines bind the cache before and after to one address"
}

# Recipes whose rewrites lint cannot read: its page of limits names both types.
UNREADABLE = {"bf16": "bfloat16 has no type in numpy", "fp8": "float8 has no type in numpy"}

LOADER = """
import numpy as np
def load_data():
    with np.load("inputs.npz") as stored:
        yield {name: stored[name] for name in stored.files}
"""


@pytest.fixture
def bundle(exported_once: Callable[[str], Exported]) -> Bundle:
    pytest.importorskip("polygraphy")
    pytest.importorskip("onnx_graphsurgeon", reason="polygraphy check lint reads graphs with it")
    return exported_once("paper").bundle


def lint(model: Path, bundle: Bundle, graph: Graph, work: Path) -> list[dict[str, Any]]:
    """Entries of the report of `polygraphy check lint` on `model`, without those that are known."""
    name = loaders(bundle.graphs[graph.name])[-1]
    inputs = read_inputs(bundle.folder / FOLDER / f"{name}.npz")
    typed = {t.name: inputs[t.name].astype(element_type(t.dtype)) for t in graph.inputs}
    np.savez(work / "inputs.npz", **typed)
    (work / "loader.py").write_text(LOADER)
    # Copies: ONNX reads no weights from a file with hard links, which rewrites make.
    (work / "copy").mkdir()
    for path in model.parent.glob(f"{model.stem}.*"):
        shutil.copyfile(path, work / "copy" / path.name)
    model = work / "copy" / model.name
    program = "import sys; from polygraphy.tools import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, "check", "lint", str(model), "-o", "report.json"]
        + ["--data-loader-script", "loader.py"],
        cwd=work,
        capture_output=True,
        text=True,
        env={**os.environ, "POLYGRAPHY_AUTOINSTALL_DEPS": "0"},
    )
    assert (work / "report.json").is_file(), done.stdout + done.stderr
    report = json.loads((work / "report.json").read_bytes())
    assert report["summary"]["passing"], "lint ran no node"
    return [
        entry
        for entry in report["lint_entries"]
        if not any(known in entry["message"] for known in KNOWN)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_lint_finds_nothing_in_an_exported_graph(bundle: Bundle, name: str, tmp_path: Path) -> None:
    found = lint(bundle.graph_file(name), bundle, bundle.graphs[name], tmp_path)
    assert not found, found


def rewrites() -> list[tuple[str, str, str]]:
    """(recipe, backend, graph) of every rewrite that lint can read."""
    found = []
    for recipe in RECIPES.values():
        if recipe.name in UNREADABLE or recipe.activation_aware:  # nodes of int4
            continue
        for runtime in (CPU, TENSORRT):
            if runtime == CPU and recipe.on_cpu is None:
                continue
            # On the CPU, and beside fp16 on a GPU, a recipe differs in the graphs it quantises.
            plain = recipe.name in ("fp32", "fp16")
            found += [(recipe.name, runtime, name) for name in (NAMES if plain else recipe.weights)]
    return found


@pytest.mark.exhaustive
@pytest.mark.parametrize("precision, runtime, name", rewrites())
def test_lint_finds_nothing_in_a_rewritten_graph(
    bundle: Bundle, precision: str, runtime: str, name: str, tmp_path: Path
) -> None:
    path = tmp_path / f"{name}.onnx"
    graph, portable = bundle.graphs[name], bundle.graph_file(name)
    typed = rewrite(RECIPES[precision], graph, portable, path, runtime=runtime)
    found = lint(path, bundle, typed, tmp_path)
    assert not found, found


def test_lint_sees_a_node_with_wrong_weights(bundle: Bundle, tmp_path: Path) -> None:
    """Lint is not blind: a convolution of its own weights."""
    import onnx

    graph = bundle.graphs["vae_decoder"]
    # A copy: the package refuses weights with several hard links.
    source = shutil.copytree(bundle.graph_file(graph.name).parent, tmp_path / "graphs")
    model = onnx.load(source / bundle.graph_file(graph.name).name)
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    node.input[0] = node.input[1]
    onnx.save(model, tmp_path / "broken.onnx")
    found = lint(tmp_path / "broken.onnx", bundle, graph, tmp_path)
    assert any("does not match actual shape" in entry.get("message", "") for entry in found)
