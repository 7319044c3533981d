"""`mmi export`: export a model folder to a bundle of ONNX graphs, each with a receipt."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmi_deploy.cli.console import print_json, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.hub_folders import local_folder
from mmi_deploy.errors import ConfigError
from mmi_deploy.hub.kinds import MODEL
from mmi_deploy.spec import presets
from mmi_deploy.system.files import size
from mmi_deploy.system.output_folder import check_replaceable
from mmi_deploy.system.progress import shown

if TYPE_CHECKING:
    from mmi_deploy.bundle.bundle import Bundle
    from mmi_export.export import Export, Exported

SHIPPED = Path("assets/tiny")


class Layout(StrEnum):
    """See `mmi_export.plan.Layout`."""

    fused = "fused"
    linked = "linked"


class Scope(StrEnum):
    """See `mmi_export.plan.Scope`."""

    full = "full"
    slice = "slice"
    none = "none"


class Storage(StrEnum):
    """Data type of placeholder weights."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


def export(
    model: Annotated[
        Path | None,
        typer.Argument(
            help="A model folder: config.json, weights, tokenizer; or hf://org/name.",
            show_default=str(SHIPPED),
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the bundle.", rich_help_panel="Bundle")
    ] = Path("bundles/tiny"),
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens that a document may have.",
            show_default="all",
            metavar="N",
            rich_help_panel="Bundle",
        ),
    ] = None,
    rows: Annotated[
        int,
        typer.Option(
            min=1,
            max=64,
            help="Documents or pictures that one run may compute together.",
            metavar="N",
            rich_help_panel="Bundle",
        ),
    ] = 8,
    schedule: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:STEPS",
            help="A sampler, as in unipc:20 or ddim:50; several may be given, the first is the "
            "default.",
            show_default="unipc:20, of a consistency model lcm:4",
            rich_help_panel="Bundle",
        ),
    ] = None,
    layout: Annotated[
        Layout | None,
        typer.Option(
            help="Weights of the bundle: copied in float32, or linked to the model's own files.",
            show_default="fused up to 2 GB of weights, else linked",
            rich_help_panel="Bundle",
        ),
    ] = None,
    prove: Annotated[
        Scope | None,
        typer.Option(
            help="Graphs that are run and compared with the model: the exported ones, those of a "
            "small model with the same structure, or none.",
            show_default="full where memory allows it, else slice",
            rich_help_panel="Bundle",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Export a preset instead of a model folder, with placeholder weights.",
            show_default=False,
            rich_help_panel="A preset instead of a model",
        ),
    ] = None,
    sparse_weights: Annotated[
        bool,
        typer.Option(
            "--sparse-weights",
            help="With --preset: zeros in a sparse file, which takes no disk.",
            rich_help_panel="A preset instead of a model",
        ),
    ] = False,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights",
            help="With --preset: random weights.",
            rich_help_panel="A preset instead of a model",
        ),
    ] = False,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --preset: number of layers of the language model.",
            show_default="all",
            metavar="N",
            rich_help_panel="A preset instead of a model",
        ),
    ] = None,
    storage: Annotated[
        Storage,
        typer.Option(
            help="With --preset: data type of the weights.",
            rich_help_panel="A preset instead of a model",
        ),
    ] = Storage.float16,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print weights, disk and memory that the export takes; write nothing."
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace a folder that mmi wrote and that is not a bundle."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Export a trained model to ONNX graphs and compare each with the model.

    Every graph runs in ONNX Runtime beside the PyTorch module it was traced from; its receipt
    records the error. If a graph exceeds its tolerance, the export fails and writes nothing. Large
    models are exported without being loaded: weights stay in their files, and the bundle links
    to them.
    """
    _check_preset_options(model, preset, sparse_weights, random_weights, layers)
    model = None if model is None else local_folder(model, MODEL)
    read_from = [] if preset else [model or SHIPPED]
    if model is not None and not (model / "config.json").is_file():
        # Before PyTorch is imported, which takes seconds.
        raise ConfigError(
            f"{model} is not a model folder: it holds no config.json",
            expected="what `mmi train`, `mmi convert` or `mmi init` wrote",
        )
    check_replaceable(out, force, kind="bundle", inputs=read_from)
    with extras("export"):
        import torch

        from mmi_export.export import prepare_export, run_export
        from mmi_export.placeholder_model import Weights, placeholder_model
    weights: Weights = "random" if random_weights else "empty" if preset else "given"
    options: dict[str, Any] = {"scope": prove and prove.value, "weights": weights, "rows": rows}
    options["layout"] = layout.value if layout else "linked" if preset else None
    folder: AbstractContextManager[Path] = nullcontext(model or SHIPPED)
    if preset:
        # A dry run reads names and sizes only.
        made: Weights = "empty" if dry_run else weights
        dtype = getattr(torch, storage.value)
        folder = placeholder_model(presets.preset(preset), out, made, layers, dtype)
    with folder as read:
        with shown(remarks(), "reading the model's headers"):
            planned = prepare_export(read, out, context, schedule or None, **options)
        if dry_run:
            _print_plan(planned, out, as_json)
            return
        if planned.plan.layout == "linked":
            remarks().print(_planned(planned))
        with shown(remarks()) as progress:
            done = run_export(planned, out, force=force, progress=progress)
    if preset:
        done.bundle.cache_hashes()
    _print_done(planned, done, out, as_json)


def _check_preset_options(
    model: Path | None,
    preset: str | None,
    sparse_weights: bool,
    random_weights: bool,
    layers: int | None,
) -> None:
    if preset is None:
        if sparse_weights or random_weights or layers is not None:
            raise ConfigError(
                "--sparse-weights, --random-weights and --layers apply to a preset only",
                fix="give --preset released_13b",
            )
        return
    if model is not None:
        raise ConfigError("give a model folder or --preset, not both", got=f"{model} and {preset}")
    if sparse_weights == random_weights:
        raise ConfigError(
            f"{preset} is a preset without weights: choose placeholder weights",
            fix="give one of --sparse-weights and --random-weights",
        )


def _planned(export: Export) -> str:
    plan = export.plan
    dtype = str(export.stored.dtype).removeprefix("torch.")
    parts = [f"{export.config.name}: {size(plan.weights)} of weights in {dtype}"]
    if plan.layout == "linked":
        parts.append(f"{'copied' if plan.copies else 'linked'}, {size(plan.computed)} computed")
    parts.append(f"{size(plan.disk)} of disk, {size(plan.disk_free)} free")
    if export.weights == "random":
        parts.append(f"and {size(plan.weights)} for the random weights")
    parts.append(f"about {size(plan.memory)} of memory")
    parts.append(
        {"full": "proved whole", "slice": "proved by a slice", "none": "not proved"}[plan.scope]
    )
    return "; ".join(parts)


def _print_plan(export: Export, out: Path, as_json: bool) -> None:
    if as_json:
        print_json({"bundle": str(out), "model": export.config.name, **export.plan.to_json()})
    else:
        results().print(_planned(export))
    export.plan.check_room()


def _print_done(export: Export, done: Exported, out: Path, as_json: bool) -> None:
    bundle = done.bundle
    if as_json:
        stages = [vars(stage) for stage in done.stages]
        report = {"bundle": str(out), "plan": export.plan.to_json(), "stages": stages}
        print_json(report | bundle.manifest.model_dump(mode="json"))
        return
    if export.plan.layout == "linked":
        for stage in done.stages:
            peak = f"at most {size(stage.peak_bytes)} of memory so far"
            remarks().print(f"{stage.what}: {stage.seconds:.0f} s, {peak}")
    for remark in bundle.remarks:
        remarks().print(remark)
    results().print(
        f"{out}: {len(bundle.graphs)} graphs, {_proof(bundle)}. Look at it with `mmi inspect {out}`"
    )


def _proof(bundle: Bundle) -> str:
    cases = [case for receipt in bundle.manifest.receipts for case in receipt.cases]
    if not cases:
        return "none of them proved"
    return f"{len(cases)} comparisons, greatest error {max(case.error for case in cases):.1e}"
