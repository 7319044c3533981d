"""Graphs of a distilled U-Net: one branch, half the arithmetic, and the predictions of PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from export.small_models import paper_reading, random_model, released_reading
from mmi_deploy.parity import Proof
from mmi_deploy.spec.config import DistillationConfig, ModelConfig
from mmi_deploy.spec.graphs import DEEP, Graph, Limits, denoise_shallow, denoise_step
from mmi_export.export import MODULES, export_graph
from mmi_export.parity.receipts import onnx_runner, prove
from mmi_export.tracing.fake_weights_model import FakeWeightsModel
from mmi_export.tracing.stored_weights import stored_weights
from mmi_export.tracing.weight_sources import WeightSources
from mmi_train.weights.model_folder import save_model

LIMITS = Limits(context=32, batch=3, images=3)


def distilled(config: ModelConfig, kind: str = "lcm") -> ModelConfig:
    steps = {"lcm": 20, "dmd": 2, "guidance": None}[kind]
    own = DistillationConfig(kind, 2.5, steps)  # type: ignore[arg-type]
    return replace(config, image_decoder=replace(config.image_decoder, distillation=own))


def exported_and_proved(config: ModelConfig, make: object, folder: Path) -> tuple[Graph, Proof]:
    model = random_model(config)
    save_model(model, folder)
    graph = make(config, LIMITS)  # type: ignore[operator]
    fake = FakeWeightsModel(config)
    path = folder / f"{graph.name}.onnx"
    export_graph(WeightSources(fake, stored_weights(folder, fake.weights), None), graph, path)
    names = [value.name for value in onnx.load(path, load_external_data=False).graph.input]
    assert names == [tensor.name for tensor in graph.inputs] and "guidance" not in names
    return graph, prove(model, graph, LIMITS, onnx_runner(path))


@pytest.mark.parametrize(
    ("config", "make"),
    [
        pytest.param(distilled(paper_reading()), denoise_step, marks=pytest.mark.slow),
        pytest.param(distilled(paper_reading(), "dmd"), denoise_shallow, marks=pytest.mark.slow),
        (distilled(released_reading(), "guidance"), denoise_shallow),
    ],
    ids=["paper, lcm, whole", "paper, dmd in two steps, shallow", "released, guidance, shallow"],
)
def test_one_branch_computes_what_pytorch_does(
    config: ModelConfig, make: object, tmp_path: Path
) -> None:
    """The receipt: pictures of three steps, alone and in a batch of unlike rows, by `lcm` with its
    noise or `unipc`, against `ImageDecoder.draw` with diffusers' schedulers."""
    graph, proof = exported_and_proved(config, make, tmp_path)
    assert len(proof.cases) == 3
    assert graph[DEEP].shape[1] == 1


def test_one_branch_takes_half_the_arithmetic() -> None:
    """FLOPs by PyTorch's counter: exactly half of those of both branches."""

    def flops(config: ModelConfig) -> int:
        graph = denoise_step(config, LIMITS)
        module = MODULES["denoise_step"](random_model(config), graph)
        sizes = {"b": 1, "n": 1, "m": 1, "steps": 2}
        inputs = {
            tensor.name: torch.zeros(tensor.resolve(**sizes), dtype=getattr(torch, tensor.dtype))
            for tensor in graph.inputs
        }
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(inputs)
        return int(counter.get_total_flops())

    update = 2 * 4 * 6 * int(np.prod((4, 8, 8)))  # the sampler's table, once for each picture
    config = paper_reading()
    assert flops(config) - update == 2 * (flops(distilled(config)) - update)
