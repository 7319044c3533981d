"""From a model folder to a bundle: every graph exported, proved and written, samplers as tables."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmi_deploy.bundle.bundle import Bundle, BundleWriter, write_bundle
from mmi_deploy.documents.tokenizer import Tokenizer, read_tokenizer_file
from mmi_deploy.errors import ConfigError, WeightsError
from mmi_deploy.parity import Proof
from mmi_deploy.spec.config import ModelConfig, read_config
from mmi_deploy.spec.graphs import Graph, Limits, graphs
from mmi_deploy.spec.schedule import Schedule
from mmi_deploy.system.progress import Progress, Stage, StageTimer, silent
from mmi_export.graphs.image_decoder import (
    DenoiseShallowGraph,
    DenoiseStepGraph,
    ImageConditionGraph,
    VaeDecoderGraph,
)
from mmi_export.graphs.llm import LlmGraph
from mmi_export.graphs.vision import ImageValuesGraph, VisionEncoderGraph
from mmi_export.parity.receipts import onnx_runner, prove
from mmi_export.parity.small_model import difference, slice_of
from mmi_export.placeholder_model import Weights, write_stand_in
from mmi_export.plan import Layout, Plan, Scope, plan_export
from mmi_export.schedules import parse_schedule
from mmi_export.tracing.fake_weights_model import BlankModel
from mmi_export.tracing.onnx_from_module import onnx_from_module
from mmi_export.tracing.stored_weights import StoredWeights, link_file, load_stored, stored_weights
from mmi_export.tracing.weight_sources import ONNX_TYPES, WeightSources
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.weights.model_folder import CONFIG, TOKENIZER

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

LOOKING = "looking through the weights"

_BESIDE_A_PICTURE = 4
"""Tokens of the shortest useful document next to its visual tokens: `<s>`, the begin-of-image token
and a word on either side."""


@dataclass(frozen=True)
class Export:
    """A model folder that was looked at and can be exported: what is known before the work."""

    folder: Path
    config: ModelConfig
    limits: Limits
    schedules: tuple[Schedule, ...]
    model: BlankModel
    stored: StoredWeights
    plan: Plan
    weights: Weights


def prepare_export(
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
) -> Export:
    """Look at `model_folder` and plan its export; arguments and errors as `export_bundle`."""
    tokenizer = model_folder / TOKENIZER
    if not tokenizer.is_file():
        raise WeightsError(f"{model_folder} holds no {TOKENIZER}", fix="give a whole model folder")
    config = read_config(model_folder / CONFIG)
    Tokenizer.open(tokenizer, config.tokens)
    limits = _limits(config, context, batch, images)
    tables = _tables(config, schedules)
    model = BlankModel(config)
    stored = stored_weights(model_folder, model.weights)
    if scope is None and weights != "given":
        scope = "slice"
    plan = plan_export(config, model.weights, stored, out_folder, layout, scope)
    return Export(model_folder, config, limits, tables, model, stored, plan, weights)


def export_bundle(
    model_folder: Path,
    out_folder: Path,
    context: int | None = None,
    schedules: Sequence[str] = DEFAULT_SCHEDULES,
    *,
    force: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> Bundle:
    """Export the model in `model_folder` and prove its graphs in ONNX Runtime.

    `context`: slots of the KV cache, a constant of the `llm` graph (None: as many as the model has
    positions). `schedules`: samplers `NAME:STEPS`, the first the default. Of `options`, as
    `prepare_export` takes them: `batch`, `images`: the most rows and pool images that the bundle
    allows; `layout`, `scope`: see `plan` (None: what suits the size of the weights and the memory
    of this machine); `weights`: what the model's are, for the manifest. `out_folder` is written
    whole or not at all.

    Raises `ConfigError`, `WeightsError`, `EngineError` for what cannot be exported, `MmiError` for
    too little room, and `BundleError` for a graph that does not compute what the model does.
    """
    export = prepare_export(model_folder, out_folder, context, schedules, **options)
    return run_export(export, out_folder, force=force, progress=progress).bundle


@dataclass(frozen=True)
class Exported:
    """A new bundle, and what each stage of its making took."""

    bundle: Bundle
    stages: tuple[Stage, ...]


def run_export(
    export: Export, out_folder: Path, *, force: bool = False, progress: Progress = silent
) -> Exported:
    """Do what was planned."""
    export.plan.check_room()
    config, stored = export.config, export.stored
    # Each graph is exported and proved.
    timer = StageTimer(progress, 2 * len(graphs(config, export.limits)))
    with write_bundle(
        out_folder, config, export.limits, force=force, inputs=[export.folder]
    ) as writer:
        writer.weights = export.weights
        writer.hashes.progress = timer.within
        if export.weights == "given":
            timer.begin(LOOKING, 0)
            stored.check_finite(
                lambda done: timer.within(LOOKING, done, stored.bytes, unit="bytes")
            )
        read_tokenizer_file(export.folder / TOKENIZER).save(str(writer.tokenizer))
        for table in export.schedules:
            writer.add_schedule(_time_table(export.model, stored, table))
        _write_graphs(export, writer, timer)
        timer.begin("writing the bundle", timer.total)
    timer.end()
    bundle = Bundle.open(out_folder, unproved=export.plan.scope == "none")
    return Exported(bundle, tuple(timer.stages))


def _write_graphs(export: Export, writer: BundleWriter, timer: StageTimer) -> None:
    """The graphs with their receipts."""
    scope = export.plan.scope
    sources = _sources(export.model, export.stored, export.plan.layout)
    whole = load_stored(export.config, export.stored) if scope == "full" else None
    with tempfile.TemporaryDirectory(prefix="mmi-slice-") as scratch:
        small = _Slice(export, Path(scratch)) if scope == "slice" else None
        made = graphs(export.config, export.limits)
        for index, (name, graph) in enumerate(made.items()):
            which = f"graph {index + 1} of {len(made)}"
            timer.begin(f"exporting {name}", 2 * index, which)
            path = writer.graph_file(name)
            files = export_graph(sources, graph, path)
            writer.share(name, (f"{path.parent.name}/{file}" for file in files))
            if whole is not None or small is not None:
                timer.begin(f"proving {name}", 2 * index + 1, which)
            if whole is not None:
                proof = prove(whole, graph, export.limits, onnx_runner(path))
                writer.add_receipt(name, proof.compared_with, proof.cases)
            if small is not None:
                proof = small.prove(name)
                writer.add_receipt(name, proof.compared_with, proof.cases, "slice")


def export_graph(sources: WeightSources, graph: Graph, path: Path) -> set[str]:
    """Write one graph; returns the files of shared weights that it refers to."""
    with sources.model.building():
        module = _module(graph, sources.model.module, fused=not sources.links)
    files = onnx_from_module(module, graph, path, sources)
    gc.collect()  # traced programs refer to themselves, and the next one needs their room
    return files


def _module(graph: Graph, model: MMInterleaved, fused: bool) -> nn.Module:
    if graph.name == "llm":
        return LlmGraph(model, graph, fused)
    return MODULES[graph.name](model, graph)


def _sources(model: BlankModel, stored: StoredWeights, layout: Layout) -> WeightSources:
    return WeightSources(model, stored, link_file if layout == "linked" else None)


class _Slice:
    """A slice of an export's model, exported as the model is and proved in its place."""

    def __init__(self, export: Export, folder: Path) -> None:
        self.folder = folder
        self.config = slice_of(export.config)
        context = min(export.limits.context, self.config.llama.context)
        self.limits = Limits(context, export.limits.batch, export.limits.images)
        self.graphs = graphs(self.config, self.limits)
        dtype = export.stored.dtype if export.stored.dtype in ONNX_TYPES else torch.float32
        write_stand_in(self.config, folder, "random", dtype)
        model = BlankModel(self.config)
        stored = stored_weights(folder, model.weights)
        self.sources = _sources(model, stored, export.plan.layout)
        self.whole = load_stored(self.config, stored)
        self.difference = difference(export.config)

    def prove(self, name: str) -> Proof:
        """The proof of the slice's graph of that name."""
        graph, path = self.graphs[name], self.folder / f"{name}.onnx"
        export_graph(self.sources, graph, path)
        proof = prove(self.whole, graph, self.limits, onnx_runner(path))
        return replace(proof, compared_with=f"{proof.compared_with}, of {self.difference}")


def with_time_table(model: MMInterleaved, schedule: Schedule) -> Schedule:
    """`schedule` with what the U-Net derives from its timesteps alone."""
    with torch.no_grad():
        rows = model.image_decoder.unet.time_rows(torch.from_numpy(schedule.timesteps))
    return schedule.with_time_table(rows.numpy())


def _time_table(model: BlankModel, stored: StoredWeights, schedule: Schedule) -> Schedule:
    with model.building():
        rows = model.module.image_decoder.unet.time_rows(torch.from_numpy(schedule.timesteps))
    return schedule.with_time_table(model.compute(rows, stored.read).numpy())


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


def _tables(config: ModelConfig, schedules: Sequence[str]) -> tuple[Schedule, ...]:
    if not schedules:
        raise ConfigError(
            "a bundle needs a schedule", fix=f"give --schedule {DEFAULT_SCHEDULES[0]}"
        )
    diffusion = config.image_decoder.diffusion
    return tuple(parse_schedule(text, diffusion) for text in dict.fromkeys(schedules))
