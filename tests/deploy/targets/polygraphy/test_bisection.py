"""An error planted in the middle of a rewritten graph is found, and cut out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.parity import PRECISION_TOLERANCES
from mmi_deploy.runtime.onnxruntime.run_graph import runner
from mmi_deploy.spec.backends import CPU
from mmi_deploy.targets.polygraphy.bisection import bisect, marked_runner
from mmi_deploy.targets.polygraphy.bundle_files import FOLDER, loaders
from mmi_deploy.targets.polygraphy.load_data import read_inputs
from mmi_deploy.targets.precision import recipe, rewrite

if TYPE_CHECKING:
    from exports import Exported

TOLERANCE = PRECISION_TOLERANCES["fp32"]


@pytest.fixture
def bundle(exported_once: Callable[[str], Exported]) -> Bundle:
    return exported_once("paper").bundle


def inputs_of(bundle: Bundle, graph: str) -> dict[str, np.ndarray]:
    name = loaders(bundle.graphs[graph])[-1]
    return read_inputs(bundle.folder / FOLDER / f"{name}.npz")


def rewritten(bundle: Bundle, graph: str, out: Path, precision: str = "fp32") -> Path:
    rewrite(recipe(precision), bundle.graphs[graph], bundle.graph_file(graph), out, runtime=CPU)
    return out


def plant(path: Path, share: float, operators: tuple[str, ...]) -> str:
    """Make the output of one node 1 % too large; returns its name. share: place of the node among
    those of `operators`, from 0 to 1."""
    model = onnx.load(path, load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type in operators]
    node = nodes[int(share * len(nodes))]
    name, place = node.output[0], list(model.graph.node).index(node)
    node.output[0] = f"{name}.before"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1.01), "one percent"))
    scale = onnx.helper.make_node("Mul", [f"{name}.before", "one percent"], [name], name="planted")
    model.graph.node.insert(place + 1, scale)
    onnx.save(model, path)
    return name


@pytest.mark.parametrize(
    "graph, share, operators",
    [
        ("llm", 0.5, ("MatMul",)),
        ("llm", 0.7, ("Attention",)),
        ("vision_encoder", 0.3, ("MatMul", "Gemm")),
        ("vae_decoder", 0.6, ("Conv",)),
    ],
)
def test_a_planted_error_is_named_and_cut_out(
    bundle: Bundle, tmp_path: Path, graph: str, share: float, operators: tuple[str, ...]
) -> None:
    path = rewritten(bundle, graph, tmp_path / f"{graph}.onnx")
    name = plant(path, share, operators)
    inputs = inputs_of(bundle, graph)
    found = bisect(bundle.graph_file(graph), path, inputs, TOLERANCE, tmp_path / "cut")
    assert (found.tensor, found.operator, found.node) == (name, "Mul", "planted")
    assert found.error == pytest.approx(0.01, rel=1e-3)
    assert name in found.line() and f"of {found.compared} tensors" in found.line()

    cut = onnx.load(tmp_path / "cut" / "reduced.onnx", load_external_data=False)
    whole = onnx.load(path, load_external_data=False)
    assert len(cut.graph.node) < len(whole.graph.node) / 6 and cut.graph.node[-1].name == "planted"
    outputs = runner(tmp_path / "cut" / "reduced.onnx")(
        read_inputs(tmp_path / "cut" / "reduced.npz")
    )
    right = marked_runner(bundle.graph_file(graph), [name])(inputs)[name]
    np.testing.assert_allclose(outputs[name], 1.01 * right, rtol=0, atol=1e-2 * np.abs(right).max())
    assert np.abs(outputs[name] - right).max() > 5e-3 * np.abs(right).max()


def test_a_right_graph_has_no_wrong_tensor(bundle: Bundle, tmp_path: Path) -> None:
    path = rewritten(bundle, "llm", tmp_path / "llm.onnx")
    inputs = inputs_of(bundle, "llm")
    found = bisect(bundle.graph_file("llm"), path, inputs, TOLERANCE, tmp_path / "cut")
    assert not found.tensor and found.compared > 60 and "fusion" in found.line()
    assert not (tmp_path / "cut").exists()


def test_the_first_quantised_product_is_found_with_the_tolerance_of_float32(
    bundle: Bundle, tmp_path: Path
) -> None:
    """Rounding of weights to 8 bits begins at the first quantised product; within the tolerance of
    int8 no tensor is wrong. The reduced graph runs in Polygraphy with its own loader."""
    path = rewritten(bundle, "llm", tmp_path / "llm.onnx", "int8")
    inputs = inputs_of(bundle, "llm")
    portable = bundle.graph_file("llm")
    within = bisect(portable, path, inputs, PRECISION_TOLERANCES["int8"], tmp_path / "none")
    assert not within.tensor
    found = bisect(portable, path, inputs, TOLERANCE, tmp_path / "cut")
    assert found.operator.startswith("MatMul") and 1e-4 < found.error < 0.06
    pytest.importorskip("polygraphy")
    program = "import sys; from polygraphy.tools import main; sys.exit(main())"
    words = ["run", "reduced.onnx", "--onnxrt", "--data-loader-script", "load_data.py:reduced"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=tmp_path / "cut",
        capture_output=True,
        text=True,
        env={**os.environ, "POLYGRAPHY_AUTOINSTALL_DEPS": "0"},
    )
    assert done.returncode == 0, done.stdout
