"""Large models: weights stay in the model's files, and what folding makes is computed alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from export.small_models import paper_reading, released_reading
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.graphs import Graph, Limits, graphs
from mmi_export.export import export_graph
from mmi_export.parity.receipts import onnx_runner, prove
from mmi_export.placeholder_model import write_placeholder_model
from mmi_export.tracing.fake_weights_model import FakeWeightsModel
from mmi_export.tracing.stored_weights import INDEX, link_file, load_stored, stored_weights
from mmi_export.tracing.weight_sources import WeightSources
from mmi_train.weights.model_folder import WEIGHTS
from mmi_train.weights.safetensors_files import read_safetensors

TYPES = {torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Linked:
    """A model folder in 16 bits, and graphs that refer to it."""

    config: ModelConfig
    model: Path
    graphs: Path
    sources: WeightSources
    limits: Limits

    def contract(self, name: str) -> Graph:
        return graphs(self.config, self.limits)[name]

    def proto(self, name: str) -> onnx.ModelProto:
        return onnx.load(self.graphs / f"{name}.onnx", load_external_data=False)


@pytest.fixture(
    scope="module", params=[(torch.float16, paper_reading), (torch.bfloat16, released_reading)]
)
def linked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Linked:
    dtype, reading = request.param
    return linked_graphs(reading(), dtype, tmp_path_factory.mktemp("linked"))


def linked_graphs(config: ModelConfig, dtype: torch.dtype, folder: Path) -> Linked:
    write_placeholder_model(config, folder / "model", "random", dtype)
    model = FakeWeightsModel(config)
    stored = stored_weights(folder / "model", model.weights)
    sources = WeightSources(model, stored, link_file)
    (folder / "graphs").mkdir()
    made = Linked(config, folder / "model", folder / "graphs", sources, Limits(64))
    for name in ("llm_values", "llm"):
        export_graph(sources, made.contract(name), made.graphs / f"{name}.onnx")
    return made


@pytest.mark.parametrize("name", ["llm_values", "llm"])
def test_linked_graphs_compute_what_the_model_does(linked: Linked, name: str) -> None:
    whole = load_stored(linked.config, linked.sources.stored)
    run = onnx_runner(linked.graphs / f"{name}.onnx")
    assert all(
        case.passed for case in prove(whole, linked.contract(name), linked.limits, run).cases
    )


def test_weights_are_neither_copied_nor_widened(linked: Linked) -> None:
    """Everything that folding leaves alone is read in place, from the model's own bytes."""
    link = linked.graphs / WEIGHTS
    assert link.stat().st_ino == (linked.model / WEIGHTS).stat().st_ino
    places = read_safetensors(link)
    stored = linked.sources.stored.dtype
    referred = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in linked.proto("llm").graph.initializer
        if any(entry.value == WEIGHTS for entry in tensor.external_data)
    }
    types = {t.name: t.data_type for t in linked.proto("llm").graph.initializer}
    offsets = {
        (place.offset, place.shape.numel() * place.dtype.itemsize) for place in places.values()
    }
    for name, entry in referred.items():
        assert (int(entry["offset"]), int(entry["length"])) in offsets, name
        assert types[name] == TYPES[stored]
    layers = linked.config.llama.layers
    mats = [name for name in referred if "proj" in name or "head" in name or "embedding" in name]
    assert len(mats) >= 7 * layers + 2
    own = read_safetensors(linked.graphs / "llm.safetensors")
    folded = ("llm.cos", "llm.sin")
    assert all("look_back" in name or name.startswith(folded) for name in own), sorted(own)


def test_sixteen_bits_are_cast_before_use_and_tables_after_the_look_up(linked: Linked) -> None:
    graph = linked.proto("llm").graph
    weights = {t.name for t in graph.initializer if t.external_data and t.data_type != 1}
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in weights:
                assert node.op_type == "Cast" or (node.op_type == "Gather" and index == 0), node


def test_the_file_of_a_graph_holds_no_weight(linked: Linked) -> None:
    size = (linked.graphs / "llm.onnx").stat().st_size
    assert size < 200_000


def test_a_file_of_weights_called_as_a_graph_is_left_as_it_is(tmp_path: Path) -> None:
    """The graph writes weights of its own, and under that name."""
    model = tmp_path / "model"
    write_placeholder_model(paper_reading(), model, "random", torch.float16)
    state = load_file(model / WEIGHTS)
    files = {name: "llm.safetensors" if name.startswith("llm.") else WEIGHTS for name in state}
    for file in set(files.values()):
        save_file({name: state[name] for name in state if files[name] == file}, model / file)
    (model / INDEX).write_text(json.dumps({"weight_map": files}))
    before = (model / "llm.safetensors").read_bytes()
    fake_model = FakeWeightsModel(paper_reading())
    sources = WeightSources(fake_model, stored_weights(model, fake_model.weights), link_file)
    (tmp_path / "graphs").mkdir()
    contract = graphs(paper_reading(), Limits(64))["llm"]
    shared = export_graph(sources, contract, tmp_path / "graphs" / "llm.onnx")
    assert (model / "llm.safetensors").read_bytes() == before
    assert shared == {WEIGHTS, "weights.llm.safetensors"}
    onnx_runner(tmp_path / "graphs" / "llm.onnx")
