"""A model without numbers gives the same numbers, tensor by tensor, as one that is loaded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from export.small_models import paper_reading, released_reading
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.graphs import Limits, graphs
from mmi_export.export import MODULES
from mmi_export.placeholder_model import write_placeholder_model
from mmi_export.tracing.fake_weights_model import FakeWeightsModel
from mmi_export.tracing.stored_weights import StoredWeights, load_stored, stored_weights


@pytest.fixture(scope="module", params=[paper_reading, released_reading])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return request.param()


@pytest.fixture(scope="module")
def fake_model(config: ModelConfig) -> FakeWeightsModel:
    return FakeWeightsModel(config)


@pytest.fixture(scope="module")
def stored(
    config: ModelConfig, fake_model: FakeWeightsModel, tmp_path_factory: pytest.TempPathFactory
) -> StoredWeights:
    folder = tmp_path_factory.mktemp("model")
    write_placeholder_model(config, folder, "random", torch.float16)
    return stored_weights(folder, fake_model.weights)


@pytest.mark.parametrize("name", list(MODULES))
def test_folding_without_numbers_and_computing_later_is_folding(
    config: ModelConfig, fake_model: FakeWeightsModel, stored: StoredWeights, name: str
) -> None:
    """Every parameter and constant of every graph, bit for bit."""
    graph = graphs(config, Limits(64))[name]
    with torch.no_grad():
        wanted = tensors_of(MODULES[name](load_stored(config, stored), graph))
    with fake_model.building():
        made = tensors_of(MODULES[name](fake_model.module, graph))
    assert made.keys() == wanted.keys()
    for key, tensor in made.items():
        assert isinstance(tensor, FakeTensor), key
        assert torch.equal(fake_model.compute(tensor, stored.read), wanted[key]), key


def tensors_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def test_a_folded_tensor_reads_the_weights_of_its_own_layer_alone(
    config: ModelConfig, fake_model: FakeWeightsModel, stored: StoredWeights
) -> None:
    with fake_model.building():
        module = MODULES["llm"](fake_model.module, graphs(config, Limits(64))["llm"])
    read: list[str] = []

    def spy(name: str) -> Tensor:
        read.append(name)
        return stored.read(name)

    folded = module.get_parameter("llm.layers.0.look_back.mmfs.query_weight")
    fake_model.compute(folded, spy)
    inside = "llm.layers.0.look_back.mmfs"
    assert sorted(read) == [
        f"{inside}.{name}.weight" for name in ("offset_proj", "query_proj", "weight_proj")
    ]


def test_weights_are_known_by_name_and_nothing_else_is(fake_model: FakeWeightsModel) -> None:
    weight = fake_model.module.head.head.weight
    assert fake_model.name(weight) == "head.head.weight"
    with fake_model.building():
        made = weight + 1
    assert fake_model.name(made) is None
    assert torch.equal(fake_model.compute(made, lambda _: torch.zeros(2)), torch.ones(2))
