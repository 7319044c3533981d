"""Export of a model folder to a bundle: graphs with receipts, samplers as tables."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmi_deploy.bundle.bundle import Bundle, BundleWriter, write_bundle
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import ConfigError, EngineError, WeightsError
from mmi_deploy.parity import Proof
from mmi_deploy.spec.config import ModelConfig, read_config
from mmi_deploy.spec.graphs import Graph, Limits, graphs
from mmi_deploy.spec.schedule import Schedule, default_schedule
from mmi_deploy.system.memory import free_memory
from mmi_deploy.system.progress import Progress, Stage, StageTimer, silent
from mmi_deploy.targets.calibration import check_can_run
from mmi_deploy.targets.polygraphy.bundle_files import FOLDER as POLYGRAPHY
from mmi_deploy.targets.polygraphy.bundle_files import write_polygraphy
from mmi_deploy.targets.sample_inputs import record
from mmi_export.graphs.image_decoder import (
    DenoiseShallowGraph,
    DenoiseStepGraph,
    ImageConditionGraph,
    VaeDecoderGraph,
)
from mmi_export.graphs.llm import LlmGraph
from mmi_export.graphs.vision import LlmValuesGraph, UnetValuesGraph, VisionEncoderGraph
from mmi_export.parity.receipts import onnx_runner, prove
from mmi_export.parity.small_model import difference, slice_of
from mmi_export.placeholder_model import Weights, write_placeholder_model
from mmi_export.plan import Layout, Plan, Scope, plan_export
from mmi_export.preview_map import fit_preview_map
from mmi_export.schedules import parse_schedule
from mmi_export.tokenizer_files import write_tokenizer
from mmi_export.tracing.fake_weights_model import FakeWeightsModel
from mmi_export.tracing.onnx_from_module import onnx_from_module
from mmi_export.tracing.stored_weights import StoredWeights, link_file, load_stored, stored_weights
from mmi_export.tracing.weight_sources import ONNX_TYPES, WeightSources
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.weights.model_folder import CONFIG, TOKENIZER

# Module that is exported for each graph; it maps inputs by name to outputs by name.
MODULES: dict[str, Callable[[MMInterleaved, Graph], nn.Module]] = {
    "vision_encoder": VisionEncoderGraph,
    "llm_values": LlmValuesGraph,
    "llm": LlmGraph,
    "image_condition": ImageConditionGraph,
    "unet_values": UnetValuesGraph,
    "denoise_step": DenoiseStepGraph,
    "denoise_shallow": DenoiseShallowGraph,
    "vae_decoder": VaeDecoderGraph,
}

CHECKING = "checking that weights are finite"

# Tokens of the shortest useful document besides its visual tokens: `<s>`, the begin-of-image token
# and a word on either side.
_TOKENS_BESIDE_IMAGE = 4


@dataclass(frozen=True)
class Export:
    """A checked model folder with the plan, limits and samplers of its export."""

    folder: Path
    config: ModelConfig
    limits: Limits
    schedules: tuple[Schedule, ...]
    model: FakeWeightsModel
    stored: StoredWeights
    plan: Plan
    weights: Weights


def prepare_export(
    model_folder: Path,
    out_folder: Path,
    context: int | None = None,
    schedules: Sequence[str] | None = None,
    *,
    rows: int = 8,
    images: int = 49,
    layout: Layout | None = None,
    scope: Scope | None = None,
    weights: Weights = "given",
) -> Export:
    """Check `model_folder` and plan its export; arguments and errors as `export_bundle`."""
    tokenizer = model_folder / TOKENIZER
    if not tokenizer.is_file():
        raise WeightsError(
            f"{model_folder} holds no {TOKENIZER}", fix="give a complete model folder"
        )
    config = read_config(model_folder / CONFIG)
    Tokenizer.open(tokenizer, config.tokens)
    limits = _limits(config, context, rows, images)
    tables = _tables(config, schedules)
    model = FakeWeightsModel(config)
    stored = stored_weights(model_folder, model.weights)
    if scope is None and weights != "given":
        scope = "slice"
    plan = plan_export(config, model.weights, stored, out_folder, layout, scope)
    return Export(model_folder, config, limits, tables, model, stored, plan, weights)


def export_bundle(
    model_folder: Path,
    out_folder: Path,
    context: int | None = None,
    schedules: Sequence[str] | None = None,
    *,
    force: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> Bundle:
    """Export the model in `model_folder` and compare its graphs with it in ONNX Runtime.

    `context`: slots of the KV cache, a constant of the `llm` graph (None: as many as the model has
    positions). `schedules`: samplers `NAME:STEPS`, the first is the default; None: that of the
    configuration. `options` are those of `prepare_export`: `rows`, `images`: maximum batch size
    and images of a document; `layout`, `scope`: see `plan` (None: chosen by the size of the weights
    and the memory of this machine); `weights`: their origin, for the manifest. `out_folder` is
    written whole or not at all.

    Raises `ConfigError`, `WeightsError`, `EngineError` for what cannot be exported, `MmiError` for
    too little disk, and `BundleError` for a graph whose error exceeds its tolerance.
    """
    export = prepare_export(model_folder, out_folder, context, schedules, **options)
    return run_export(export, out_folder, force=force, progress=progress).bundle


@dataclass(frozen=True)
class Exported:
    """A new bundle, and time and peak memory of each stage of its export."""

    bundle: Bundle
    stages: tuple[Stage, ...]


def run_export(
    export: Export, out_folder: Path, *, force: bool = False, progress: Progress = silent
) -> Exported:
    """Export, compare and write as planned; arguments and errors as `export_bundle`."""
    export.plan.check_room()
    config, stored = export.config, export.stored
    # Two stages per graph: it is exported and proved.
    timer = StageTimer(progress, 2 * len(graphs(config, export.limits)))
    with write_bundle(
        out_folder, config, export.limits, force=force, inputs=[export.folder]
    ) as writer:
        writer.weights = export.weights
        writer.hashes.progress = timer.within
        if export.weights == "given":
            timer.begin(CHECKING, 0)
            stored.check_finite(
                lambda done: timer.within(CHECKING, done, stored.bytes, unit="bytes")
            )
        write_tokenizer(
            export.folder / TOKENIZER, writer.tokenizer, config.tokens, export.limits.context
        )
        for table in export.schedules:
            writer.add_schedule(_time_table(export.model, stored, table))
        timer.begin("fitting the map of previews", 0)
        writer.preview = fit_preview_map(config.image_decoder.vae, stored)
        _write_graphs(export, writer, timer)
        timer.begin("recording inputs", timer.total)
        _write_inputs(export, writer)
        timer.begin("writing the bundle", timer.total)
    timer.end()
    bundle = Bundle.open(out_folder, unproved=export.plan.scope == "none")
    return Exported(bundle, tuple(timer.stages))


def _write_graphs(export: Export, writer: BundleWriter, timer: StageTimer) -> None:
    """Write every graph and its receipt."""
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


def _write_inputs(export: Export, writer: BundleWriter) -> None:
    """Write the inputs for Polygraphy, recorded where the graphs themselves can be run here."""
    bundle, recorded = writer.bundle(), {}
    if export.plan.scope == "full":
        with suppress(EngineError):  # too little memory: the bundle gets random indices
            check_can_run(bundle, free_memory())
            recorded = record(bundle)
    write_polygraphy(writer.folder / POLYGRAPHY, bundle.graphs, recorded)


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


def _sources(model: FakeWeightsModel, stored: StoredWeights, layout: Layout) -> WeightSources:
    return WeightSources(model, stored, link_file if layout == "linked" else None)


class _Slice:
    """Small model with the structure of an export's model, exported and proved in its place."""

    def __init__(self, export: Export, folder: Path) -> None:
        self.folder = folder
        self.config = slice_of(export.config)
        context = min(export.limits.context, self.config.llama.context)
        self.limits = replace(export.limits, context=context)
        self.graphs = graphs(self.config, self.limits)
        dtype = export.stored.dtype if export.stored.dtype in ONNX_TYPES else torch.float32
        write_placeholder_model(self.config, folder, "random", dtype)
        model = FakeWeightsModel(self.config)
        stored = stored_weights(folder, model.weights)
        self.sources = _sources(model, stored, export.plan.layout)
        self.whole = load_stored(self.config, stored)
        self.difference = difference(export.config)

    def prove(self, name: str) -> Proof:
        """Export the slice's graph `name` and compare it with the slice."""
        graph, path = self.graphs[name], self.folder / f"{name}.onnx"
        export_graph(self.sources, graph, path)
        proof = prove(self.whole, graph, self.limits, onnx_runner(path))
        return replace(proof, compared_with=f"{proof.compared_with}, of {self.difference}")


def with_time_table(model: MMInterleaved, schedule: Schedule) -> Schedule:
    """`schedule` with the U-Net's time embedding rows, which depend on timesteps alone."""
    with torch.no_grad():
        rows = model.image_decoder.unet.time_rows(torch.from_numpy(schedule.timesteps))
    return schedule.with_time_table(rows.numpy())


def _time_table(model: FakeWeightsModel, stored: StoredWeights, schedule: Schedule) -> Schedule:
    with model.building():
        rows = model.module.image_decoder.unet.time_rows(torch.from_numpy(schedule.timesteps))
    return schedule.with_time_table(model.compute(rows, stored.read).numpy())


def _limits(config: ModelConfig, context: int | None, rows: int, images: int) -> Limits:
    most = config.llama.context
    least = config.visual_tokens + _TOKENS_BESIDE_IMAGE
    limits = Limits(context=most if context is None else context, batch=rows, images=images)
    if not least <= limits.context <= most:
        raise ConfigError(
            "the context does not fit the model",
            expected=f"{least} tokens (one image and two words) to {most} (positions of the model)",
            got=limits.context,
            fix=f"give --context {most}",
        )
    if min(rows, images) < 1:
        raise ConfigError("a bundle allows at least 1 row and 1 image", got=f"{rows} and {images}")
    return limits


def _tables(config: ModelConfig, schedules: Sequence[str] | None) -> tuple[Schedule, ...]:
    decoder = config.image_decoder
    usual = default_schedule(decoder.diffusion, decoder.distillation)
    if schedules is None:
        schedules = (usual,)
    if not schedules:
        raise ConfigError("a bundle has at least one schedule", fix=f"give --schedule {usual}")
    return tuple(
        parse_schedule(text, decoder.diffusion, decoder.distillation)
        for text in dict.fromkeys(schedules)
    )
