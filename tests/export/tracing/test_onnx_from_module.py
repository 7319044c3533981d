"""Files keep to the contract they are written for, and their weights are plain safetensors."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from mmi_deploy.spec.graphs import IR_VERSION, OPSET, Graph, Range, Tensor
from mmi_deploy.system.safetensors_writer import ALIGNMENT
from mmi_export.tracing.onnx_from_module import (
    Tensors,
    example_sizes,
    onnx_from_module,
    sharing_copy,
)

GRAPH = Graph(
    "doubling",
    inputs=(Tensor("rows", "float32", ("b", 4)), Tensor("shift", "float32", (4,))),
    outputs=(Tensor("both", "float32", ("2*b", 32)),),
    ranges={"b": Range(1, 2, 5)},
)


class Doubling(nn.Module):
    """Two copies of its rows, projected."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 32)

    def forward(self, inputs: Tensors) -> Tensors:
        rows = self.linear(inputs["rows"] + inputs["shift"])
        return {"both": torch.cat([rows, rows])}


class OnlyTwoRows(Doubling):
    """Asks for the size of a dimension that the contract calls dynamic."""

    def forward(self, inputs: Tensors) -> Tensors:
        if inputs["rows"].shape[0] != example_sizes(GRAPH)["b"]:
            return {"both": inputs["rows"]}
        return super().forward(inputs)


@pytest.fixture(scope="module")
def module() -> Doubling:
    torch.manual_seed(0)
    return Doubling().eval()


@pytest.fixture(scope="module")
def file(module: Doubling, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graphs") / "doubling.onnx"
    onnx_from_module(module, GRAPH, path)
    return path


def test_names_shapes_opset_and_ir_are_those_of_the_contract(file: Path) -> None:
    model = onnx.load(file, load_external_data=False)
    assert model.ir_version == IR_VERSION
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
    for values, tensors in ((model.graph.input, GRAPH.inputs), (model.graph.output, GRAPH.outputs)):
        assert [shape_of(value) for value in values] == [
            (tensor.name, tensor.shape) for tensor in tensors
        ]


def shape_of(value: onnx.ValueInfoProto) -> tuple[str, tuple[int | str, ...]]:
    dims = value.type.tensor_type.shape.dim
    return value.name, tuple(dim.dim_param or dim.dim_value for dim in dims)


def test_shapes_inside_the_file_speak_of_the_contracts_letters(file: Path) -> None:
    model = onnx.load(file, load_external_data=False)
    inside = {shape_of(value)[1] for value in model.graph.value_info}
    assert ("b", 4) in inside and ("b", 32) in inside


def test_weights_are_aligned_safetensors_beside_the_file(file: Path) -> None:
    model = onnx.load(file, load_external_data=False)
    weights = load_file(file.with_suffix(".safetensors"))
    external = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
        if tensor.external_data
    }
    assert external and external.keys() == weights.keys()
    first = min(int(place["offset"]) for place in external.values())
    assert first % ALIGNMENT == 0
    assert {place["location"] for place in external.values()} == {"doubling.safetensors"}


def test_a_moved_folder_still_computes_what_the_module_does(
    module: Doubling, file: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(file.parent, tmp_path / "elsewhere") / file.name
    inputs = {"rows": np.ones((3, 4), np.float32), "shift": np.arange(4, dtype=np.float32)}
    got = ort.InferenceSession(moved).run(None, inputs)[0]
    with torch.no_grad():
        wanted = module({name: torch.from_numpy(value) for name, value in inputs.items()})
    np.testing.assert_allclose(got, wanted["both"].numpy(), atol=1e-6)


def test_a_dimension_with_one_size_is_written_as_that_size(
    module: Doubling, tmp_path: Path
) -> None:
    single = replace(GRAPH, ranges={"b": Range(1, 1, 1)})
    onnx_from_module(module, single, tmp_path / "single.onnx")
    model = onnx.load(tmp_path / "single.onnx", load_external_data=False)
    assert shape_of(model.graph.input[0]) == ("rows", (1, 4))
    assert shape_of(model.graph.output[0]) == ("both", (2, 32))


def test_a_dimension_that_tracing_would_fix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="specialized|Constraints violated"):
        onnx_from_module(OnlyTwoRows().eval(), GRAPH, tmp_path / "two.onnx")


def test_a_sharing_copy_shares_parameters_but_not_parts() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    copy = sharing_copy(module)
    copy[1] = nn.Identity()
    assert copy[0].weight is module[0].weight
    assert isinstance(module[1], nn.Linear)
