"""FLOPs saved by folding, image values and hoisting: as published and as deployed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from export.small_models import paper_reading, released_reading
from exports import Exported
from mmi_bench.flops_saved import CHANGING, Published, compare, repeated_in_step
from mmi_deploy.analysis.cost import cost, cost_of_file, loop_invariant
from mmi_deploy.analysis.flop_rules import MMFS
from mmi_deploy.analysis.gpu_specs import GPUS
from mmi_deploy.analysis.shapes import read_graph, sized
from mmi_deploy.analysis.stored_bytes import as_in_file
from mmi_deploy.cli.app import run
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.graphs import Graph, Limits, chosen_sizes, feature_cells, graphs
from mmi_deploy.spec.presets import released_13b
from mmi_deploy.targets.precision.recipes import RECIPES

LLM_VALUES = "image values of the LLM, per token and image"
UNET_VALUES = "image values of the U-Net, per branch, call and image"


@pytest.fixture(scope="module")
def exported(exported_once: Callable[[str], Exported]) -> Exported:
    return exported_once("paper")


def per_image(config: ModelConfig) -> int:
    """By hand, what one more image adds to a token as published, in every MMFS layer: its values
    (value_proj of all cells), W_q, and offsets and weights of the projected query."""
    mmfs, width = config.llm_mmfs, config.llama.width
    cells, levels = feature_cells(config, mmfs), len(mmfs.levels)
    values = 2 * cells * config.vision.width * mmfs.value_width
    slots = mmfs.points + 1 if mmfs.null_slot else mmfs.points
    outputs = mmfs.heads * (2 * mmfs.points + levels * slots)
    return len(config.llama.mmfs_layers) * (values + 2 * width * (width + outputs))


@pytest.mark.parametrize("config", [paper_reading(), released_reading()], ids=lambda c: c.name)
def test_every_image_costs_a_published_token_its_values_and_its_query(config: ModelConfig) -> None:
    published = Published(config)
    tokens = [published.token(images, 64) for images in (0, 1, 2, 4)]
    assert tokens[2] - tokens[1] == per_image(config)
    assert tokens[3] - tokens[2] == 2 * per_image(config)
    projections = len(config.llama.mmfs_layers) * 2 * config.llama.width
    assert tokens[1] - tokens[0] == per_image(config) + projections * config.llm_mmfs.value_width


@pytest.mark.slow
def test_at_the_released_sizes_it_is_28_gflop_a_token_and_148_a_call() -> None:
    """The figures of the reference's analysis: 10 layers of 1344 x 1024 x 1024, 13 blocks of 5440 x
    1024 x 1024, a multiply-add as 2; with four images a token costs five times one without."""
    published = Published(released_13b())
    parts = published.parts()
    assert parts[LLM_VALUES] == 10 * 2 * 1344 * 1024 * 1024
    assert parts[LLM_VALUES] / 1e9 == pytest.approx(28, rel=0.01)
    assert parts[UNET_VALUES] == 13 * 2 * 5440 * 1024 * 1024
    assert parts[UNET_VALUES] / 1e9 == pytest.approx(148, rel=0.01)
    none, four = published.token(0, 2048), published.token(4, 2048)
    assert none / 1e9 == pytest.approx(27.4, rel=0.01)
    assert 5 < four / none < 5.5


def decode(path: Path, contract: Graph, images: int) -> int:
    """All FLOPs of one token that looks at `images`."""
    sizes = {"b": 1, "t": 1, "w": 1, "m": images, "n": images}
    return cost_of_file(path, contract, sizes).total.flops


@pytest.fixture(scope="module")
def llm_13b(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    """The `llm` graph of four of forty layers at full width; one has MMFS, as every fourth has."""
    import torch

    from mmi_export.graphs.llm import LlmGraph
    from mmi_export.placeholder_model import cut, write_placeholder_model
    from mmi_export.tracing.fake_weights_model import FakeWeightsModel
    from mmi_export.tracing.onnx_from_module import onnx_from_module
    from mmi_export.tracing.stored_weights import link_file, stored_weights
    from mmi_export.tracing.weight_sources import WeightSources

    work = tmp_path_factory.mktemp("llm_13b")
    config = cut(released_13b(), 4)
    write_placeholder_model(config, work / "model", "empty", torch.float16)
    fake_model = FakeWeightsModel(config)
    sources = WeightSources(
        fake_model, stored_weights(work / "model", fake_model.weights), link_file
    )
    contract = graphs(config, Limits(2048))["llm"]
    with fake_model.building():
        module = LlmGraph(fake_model.module, contract, False)
    (work / "graphs").mkdir()
    path = work / "graphs" / "llm.onnx"
    onnx_from_module(module, contract, path, sources)
    return path, config


@pytest.mark.slow
def test_a_13b_token_with_four_images_costs_what_one_without_does(
    llm_13b: tuple[Path, ModelConfig],
) -> None:
    """At most 1.05 times, and so do as many images as there can be. Without images the graph runs
    with one hidden slot. As published four images cost five times as much."""
    path, config = llm_13b
    contract = graphs(config, Limits(2048))["llm"]
    assert decode(path, contract, 4) <= 1.05 * decode(path, contract, 1)
    assert decode(path, contract, 49) <= 1.05 * decode(path, contract, 1)
    matrix = cost_of_file(path, contract, {"m": 4, "n": 4}).total.matrix
    published = Published(config)
    assert matrix < 1.01 * published.token(0, 2048)
    assert published.token(4, 2048) > 4.5 * matrix


@pytest.mark.slow
def test_floors_of_13b_are_the_known_limits(llm_13b: tuple[Path, ModelConfig]) -> None:
    """Tokens per second at batch 1, bandwidth over weights, as others give them for LLaMA-13B: H100
    129, 258 and 472 in fp16, fp8 and int4, A100 80 GB 78, L4 23 in fp8 and 42 in int4, AGX Orin 7.9
    and 29. In int4 ours lie on either side, with a scale per 32 or per 128 rows. Of MMFS: a token's
    folded projections of 10 layers take 51 microseconds of an H100's bandwidth, its gathering from
    4 images 2.3."""
    path, config = llm_13b
    contract = graphs(config, Limits(2048))["llm"]

    def tokens(gpu: str, precision: str) -> float:
        """Weights of forty layers: those of four ten times, the head once."""
        found = cost_of_file(path, contract, {}, RECIPES[precision])
        wide = 2 if precision == "fp16" else 1  # bytes per number of the head
        rest = wide * config.llama.vocab * config.llama.width
        return GPUS[gpu].bandwidth / (10 * (found.weight_bytes - rest) + rest)

    for gpu, precision, known in (
        ("h100", "fp16", 129),
        ("h100", "fp8", 258),
        ("a100-80", "fp16", 78),
        ("l4", "fp8", 23),
        ("orin-64", "fp16", 7.9),
    ):
        assert tokens(gpu, precision) == pytest.approx(known, rel=0.015), (gpu, precision)
    for gpu, known in (("h100", 472), ("l4", 42), ("orin-64", 29)):
        assert tokens(gpu, "int4") < known < tokens(gpu, "int4-128")

    bandwidth = GPUS["h100"].bandwidth
    found = cost_of_file(path, contract, {"m": 4, "n": 4}, RECIPES["fp16"])
    projections = [n for n in found.nodes if "look_back.mmfs" in n.module and n.matrix]
    assert 10e6 * sum(n.matrix for n in projections) / bandwidth == pytest.approx(51, rel=0.02)
    looks = [node for node in found.nodes if node.operator == MMFS]
    alone = cost_of_file(path, contract, {"m": 1, "n": 1}, RECIPES["fp16"])
    one = [node for node in alone.nodes if node.operator == MMFS]
    three_more = sum(n.bytes for n in looks) - sum(n.bytes for n in one)
    assert 10e6 * 4 / 3 * three_more / bandwidth == pytest.approx(2.3, rel=0.05)


@pytest.mark.parametrize("graph", ["denoise_step", "denoise_shallow"])
def test_a_step_computes_nothing_that_stays_the_same(exported: Exported, graph: str) -> None:
    """No node with a FLOP depends on condition, image values, guidance or weights alone."""
    bundle = exported.bundle
    contract = bundle.graphs[graph]
    sizes = chosen_sizes(contract, {})
    found = sized(read_graph(bundle.graph_file(graph)), contract, sizes)
    whole = cost(found, sizes, as_in_file(found))
    same = loop_invariant(found, whole, [*CHANGING, "deep"])
    assert same.flops == 0 and whole.total.flops > 0
    assert loop_invariant(found, whole, ()).flops == whole.total.flops


def test_a_step_costs_the_same_however_much_it_was_prepared(exported: Exported) -> None:
    """Images in the pool that the picture does not see, steps of the schedule: no FLOP more."""
    bundle = exported.bundle
    path, contract = bundle.graph_file("denoise_step"), bundle.graphs["denoise_step"]
    few = cost_of_file(path, contract, {"n": 1, "m": 1, "steps": 5}).total
    many = cost_of_file(path, contract, {"n": 9, "m": 1, "steps": 50}).total
    assert few.flops == many.flops


def test_a_deployed_step_leaves_out_what_is_repeated(exported: Exported) -> None:
    """As published minus deployed is at least the values of both branches, the condition's keys and
    values and the time embedding: W_q and the 1x1 convolutions come on top."""
    bundle = exported.bundle
    config = exported.model.config
    files = {name: bundle.graph_file(name) for name in bundle.graphs}
    rows = {row.what: row for row in compare(config, bundle.limits, files)}
    step = rows["a denoising step that sees 1 image"]
    parts = Published(config).parts()
    again = sum(parts.values()) - parts[LLM_VALUES] + parts[UNET_VALUES]
    assert step.published is not None and step.published - step.deployed > again
    token, alone = rows["a token with 4 images"], rows["a token with 1 image"]
    assert token.deployed == alone.deployed
    assert rows["a picture of 20 steps that sees 4, its condition left out"].deployed == (
        20 * step.deployed
    )
    assert repeated_in_step(config, bundle.limits, files["denoise_step"]).flops == 0


def test_a_model_with_room_for_few_images_is_compared_with_few(exported: Exported) -> None:
    bundle = exported.bundle
    files = {name: bundle.graph_file(name) for name in bundle.graphs}
    rows = compare(bundle.config, replace(bundle.limits, images=1), files)
    assert not any("4 images" in row.what for row in rows)


def test_the_command_prints_both(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "flops-saved", str(exported.bundle.folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["repeated_in_a_deployed_step"] == 0
    ratios = {row["what"]: row["ratio"] for row in report["rows"]}
    assert ratios["a token with 4 images"] > ratios["a token with 1 image"] > 1
    assert report["repeated"][LLM_VALUES] > 0
