"""From a model folder to a bundle: every graph exported, proved and written, samplers as tables."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from mmi_deploy.bundle import Bundle, BundleWriter, write_bundle
from mmi_deploy.config import ModelConfig, read_config
from mmi_deploy.errors import ConfigError, WeightsError
from mmi_deploy.graphs import Graph, Limits, graphs
from mmi_deploy.schedule import Schedule
from mmi_deploy.tokenizer import Tokenizer
from mmi_export.blank_model import BlankModel
from mmi_export.image_decoder import (
    DenoiseShallowGraph,
    DenoiseStepGraph,
    ImageConditionGraph,
    VaeDecoderGraph,
)
from mmi_export.llm import LlmGraph
from mmi_export.onnx_from_module import onnx_from_module
from mmi_export.receipts import onnx_runner, prove
from mmi_export.schedules import parse_schedule
from mmi_export.stored_weights import StoredWeights, link_file, stored_weights
from mmi_export.vision import ImageValuesGraph, VisionEncoderGraph
from mmi_export.weight_sources import WeightSources
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.weights import CONFIG, TOKENIZER, load_model

MODULES: dict[str, Callable[[MMInterleaved, Graph], nn.Module]] = {
    "vision_encoder": VisionEncoderGraph,
    "image_values": ImageValuesGraph,
    "llm": LlmGraph,
    "image_condition": ImageConditionGraph,
    "denoise_step": DenoiseStepGraph,
    "denoise_shallow": DenoiseShallowGraph,
    "vae_decoder": VaeDecoderGraph,
}
"""What is exported for each graph: modules that map inputs by name to outputs by name."""

DEFAULT_SCHEDULES = ("unipc:20",)

_BESIDE_A_PICTURE = 4
"""Tokens of the shortest useful document next to its visual tokens: `<s>`, the begin-of-image token
and a word on either side."""

Layout = Literal["fused", "linked"]
"""How weights lie in the bundle. `fused`: copied in float32, as the fastest graph on a CPU wants
them. `linked`: whatever folding leaves as it is stays in the model's own files and their type, to
which the bundle holds hard links."""

Scope = Literal["full", "slice", "none"]
"""What is run to prove the graphs: they themselves, the same code at a smaller size, or nothing."""

Weights = Literal["given", "empty", "random"]

LINKED_FROM = 2 * 10**9
"""Bytes of weights above which they are linked rather than copied."""

Progress = Callable[[str, int, int], None]
"""Called with what is done next, how much is done and how much there is."""


def export_bundle(
    model_folder: Path,
    out_folder: Path,
    context: int | None = None,
    schedules: Sequence[str] = DEFAULT_SCHEDULES,
    *,
    batch: int = 4,
    images: int = 49,
    layout: Layout | None = None,
    scope: Scope | None = None,
    weights: Weights = "given",
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export the model in `model_folder` and prove each graph against it in ONNX Runtime.

    `context`: slots of the KV cache, a constant of the `llm` graph (None: as many as the model has
    positions). `schedules`: samplers `NAME:STEPS`, the first the default. `batch`, `images`: the
    most rows and pool images that the bundle allows. `layout`, `scope`: see `Layout` and `Scope`
    (None: what suits the size of the weights). `weights`: what the model's are, for the manifest.
    `out_folder` is written whole or not at all.

    Raises `ConfigError`, `WeightsError`, `EngineError` for what cannot be exported, and
    `BundleError` for a graph that does not compute what the model does.
    """
    progress = progress or _silent
    tokenizer = model_folder / TOKENIZER
    if not tokenizer.is_file():
        raise WeightsError(f"{model_folder} holds no {TOKENIZER}", fix="give a whole model folder")
    config = read_config(model_folder / CONFIG)
    Tokenizer.open(tokenizer, config.tokens)  # refused before minutes of work
    limits = _limits(config, context, batch, images)
    tables = _tables(config, schedules)
    blank = BlankModel(config)
    stored = stored_weights(model_folder, blank.weights)
    layout = layout or ("linked" if stored.bytes > LINKED_FROM else "fused")
    scope = scope or ("slice" if stored.bytes > LINKED_FROM else "full")
    with write_bundle(out_folder, config, limits, force=force, inputs=[model_folder]) as writer:
        writer.weights = weights
        shutil.copyfile(tokenizer, writer.tokenizer)
        for table in tables:
            writer.add_schedule(_with_time_table(blank, stored, table))
        model = load_model(model_folder) if scope == "full" else None
        sources = WeightSources(blank, stored, link_file if layout == "linked" else None)
        _export_graphs(sources, writer, model, progress)
    return Bundle.open(out_folder, unproved=scope != "full")


def _export_graphs(
    sources: WeightSources,
    writer: BundleWriter,
    model: MMInterleaved | None,
    progress: Progress,
) -> None:
    """Write the graphs with their receipts."""
    blank = sources.model
    contract = graphs(blank.module.config, writer.limits)
    total = 2 * len(contract)
    for index, (name, graph) in enumerate(contract.items()):
        path = writer.graph_file(name)
        progress(f"exporting {name}", 2 * index, total)
        with blank.building():
            module = _module(name, blank.module, graph, fused=not sources.links)
        shared = onnx_from_module(module, graph, path, sources)
        writer.share(name, (f"{path.parent.name}/{file}" for file in shared))
        if model is not None:
            progress(f"proving {name}", 2 * index + 1, total)
            proof = prove(model, graph, writer.limits, onnx_runner(path))
            writer.add_receipt(name, proof.compared_with, proof.cases)
    progress("writing the bundle", total, total)


def _module(name: str, model: MMInterleaved, graph: Graph, fused: bool) -> nn.Module:
    if name == "llm":
        return LlmGraph(model, graph, fused)
    return MODULES[name](model, graph)


def _with_time_table(model: BlankModel, stored: StoredWeights, schedule: Schedule) -> Schedule:
    with model.building():
        rows = model.module.image_decoder.unet.time_rows(torch.from_numpy(schedule.timesteps))
    return schedule.with_time_table(model.compute(rows, stored.read).numpy())


def with_time_table(model: MMInterleaved, schedule: Schedule) -> Schedule:
    """`schedule` with what the U-Net derives from its timesteps alone."""
    with torch.no_grad():
        rows = model.image_decoder.unet.time_rows(torch.from_numpy(schedule.timesteps))
    return schedule.with_time_table(rows.numpy())


def _limits(config: ModelConfig, context: int | None, batch: int, images: int) -> Limits:
    most = config.llama.context
    least = config.visual_tokens + _BESIDE_A_PICTURE
    limits = Limits(context=most if context is None else context, batch=batch, images=images)
    if not least <= limits.context <= most:
        raise ConfigError(
            "the context does not fit the model",
            expected=f"{least} to {most} tokens: from a picture and two words to as far as its "
            "positions reach",
            got=limits.context,
            fix=f"give --context {most}",
        )
    if min(batch, images) < 1:
        raise ConfigError("a bundle needs room for one row and one image", got=f"{batch}, {images}")
    return limits


def _tables(config: ModelConfig, schedules: Sequence[str]) -> list[Schedule]:
    if not schedules:
        raise ConfigError(
            "a bundle needs a schedule", fix=f"give --schedule {DEFAULT_SCHEDULES[0]}"
        )
    diffusion = config.image_decoder.diffusion
    return [parse_schedule(text, diffusion) for text in dict.fromkeys(schedules)]


def _silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
