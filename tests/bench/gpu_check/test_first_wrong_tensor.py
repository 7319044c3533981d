"""A comparison that failed leads to the first wrong tensor, over engines of the fake GPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from deploy.runtime.tensorrt.fake_tensorrt import write_plan
from deploy.runtime.tensorrt.gpu_targets import add_target, machine
from mmi_bench.gpu_check.first_wrong_tensor import engine_runner, find_first_wrong_tensors
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.parity import Comparison, Proof, Tolerance
from mmi_deploy.runtime.onnxruntime.run_graph import runner
from mmi_deploy.spec.graphs import Graph, Tensor
from mmi_deploy.spec.target import Target
from mmi_deploy.targets.tensorrt_build import Job, Plugin

if TYPE_CHECKING:
    from exports import Exported

TARGET = Target("tensorrt", "sm89", "fp32")
NO_PLUGIN = Plugin("none", False, None, None, lambda model: model, None)  # type: ignore[arg-type]


@pytest.fixture
def bundle(exported_once: Callable[[str], Exported], tmp_path: Path) -> Bundle:
    folder = tmp_path / "bundle"
    shutil.copytree(exported_once("paper").bundle.folder, folder)
    return Bundle.open(folder)


def fake_build(job: Job, progress: Any) -> None:
    """An engine of the fake TensorRT that runs the marked graph, one convolution 1 % off."""
    model = onnx.load(job.source, load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "Conv"]
    node = nodes[len(nodes) // 2]
    place, name = list(model.graph.node).index(node), node.output[0]
    node.output[0] = f"{name}.right"
    tensor = onnx.helper.make_tensor("factor", onnx.TensorProto.FLOAT, [], [1.01])
    model.graph.initializer.append(tensor)
    scale = onnx.helper.make_node("Mul", [f"{name}.right", "factor"], [name])
    model.graph.node.insert(place + 1, scale)
    path = job.source.with_name("fake.onnx")
    onnx.save(model, path)
    (given,) = model.graph.input
    shape = tuple(dim.dim_value for dim in given.type.tensor_type.shape.dim)
    found = runner(path)({given.name: np.zeros(shape, np.float32)})
    outputs = tuple(Tensor(v.name, "float32", found[v.name].shape) for v in model.graph.output)
    graph = Graph(job.graph, (Tensor(given.name, "float32", shape),), outputs, {})
    write_plan(job.engine, graph, path)


def failed(name: str) -> Proof:
    comparison = Comparison("pixels", Tolerance(1e-5, "", "rms"), flaw="too far")
    return Proof(name, "", (({"b": 1}, comparison),))


def test_the_wrong_layer_of_an_engine_is_named(bundle: Bundle, tmp_path: Path) -> None:
    here = machine(bundle, add_target(bundle, onnx=True))
    lines = find_first_wrong_tensors(
        bundle,
        TARGET,
        [failed("vae_decoder")],
        tmp_path / "report",
        lambda graph: engine_runner(graph, TARGET, here.target, NO_PLUGIN, fake_build),
    )
    (line,) = lines
    convolutions = [
        node
        for node in onnx.load(bundle.graph_file("vae_decoder"), load_external_data=False).graph.node
        if node.op_type == "Conv"
    ]
    middle = convolutions[len(convolutions) // 2]
    assert line.startswith("vae_decoder: the first of ")
    assert middle.output[0] in line and f"Conv {middle.name}" in line
    assert "relative error 0.01;" in line and "report/vae_decoder" in line
    assert (tmp_path / "report" / "vae_decoder" / "reduced.onnx").is_file()
    assert not list((bundle.folder / "engines").glob(".bisect-*"))
