"""`mmi export`: a model folder becomes a bundle that the runtime can trust."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmi_deploy.cli.console import print_json, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.errors import ConfigError
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
    """What stand-in weights are stored in."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


def export(
    model: Annotated[
        Path | None,
        typer.Argument(
            help="A model folder: config.json, weights, tokenizer.", show_default=str(SHIPPED)
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
    schedule: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:STEPS",
            help="A sampler, as in unipc:20 or ddim:50; several may be given, the first is the "
            "default.",
            show_default="unipc:20",
            rich_help_panel="Bundle",
        ),
    ] = None,
    layout: Annotated[
        Layout | None,
        typer.Option(
            help="How weights lie in the bundle: copied in float32, or linked to the model's own "
            "files.",
            show_default="fused up to 2 GB of weights, else linked",
            rich_help_panel="Bundle",
        ),
    ] = None,
    prove: Annotated[
        Scope | None,
        typer.Option(
            help="What is run to prove the graphs: they themselves, the same code at a smaller "
            "size, or nothing.",
            show_default="full where memory allows it, else slice",
            rich_help_panel="Bundle",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Export a preset instead of a model folder, with weights that stand in.",
            show_default=False,
            rich_help_panel="A preset instead of a model",
        ),
    ] = None,
    sparse_weights: Annotated[
        bool,
        typer.Option(
            "--sparse-weights",
            help="With --preset: zeros, which take no disk.",
            rich_help_panel="A preset instead of a model",
        ),
    ] = False,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights",
            help="With --preset: drawn numbers.",
            rich_help_panel="A preset instead of a model",
        ),
    ] = False,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --preset: layers of the language model.",
            show_default="all",
            metavar="N",
            rich_help_panel="A preset instead of a model",
        ),
    ] = None,
    storage: Annotated[
        Storage,
        typer.Option(
            help="With --preset: the type of the weights.",
            rich_help_panel="A preset instead of a model",
        ),
    ] = Storage.float16,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, and do nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a folder of mmi's that is something else.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Turn a trained model into ONNX graphs and prove each against the model.

    Every graph is run in ONNX Runtime next to the PyTorch module it came from; what they differ by
    is its receipt. A graph that differs too much is refused, and nothing is written. Large models
    are exported without being loaded: weights stay in their files, to which the bundle holds links.
    """
    _check_stand_in(model, preset, sparse_weights, random_weights, layers)
    read_from = [] if preset else [model or SHIPPED]
    check_replaceable(out, force, kind="bundle", inputs=read_from)
    with extras("export"):
        import torch

        from mmi_export.export import DEFAULT_SCHEDULES, prepare_export, run_export
        from mmi_export.placeholder_model import Weights, stand_in
    weights: Weights = "random" if random_weights else "empty" if preset else "given"
    options: dict[str, Any] = {"scope": prove and prove.value, "weights": weights}
    options["layout"] = layout.value if layout else "linked" if preset else None
    folder: AbstractContextManager[Path] = nullcontext(model or SHIPPED)
    if preset:
        made: Weights = "empty" if dry_run else weights
        dtype = getattr(torch, storage.value)
        folder = stand_in(presets.preset(preset), out, made, layers, dtype)
    with folder as read:
        with shown(remarks(), "looking at the model"):
            planned = prepare_export(read, out, context, schedule or DEFAULT_SCHEDULES, **options)
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


def _check_stand_in(
    model: Path | None,
    preset: str | None,
    sparse_weights: bool,
    random_weights: bool,
    layers: int | None,
) -> None:
    if preset is None:
        if sparse_weights or random_weights or layers is not None:
            raise ConfigError(
                "--sparse-weights, --random-weights and --layers are for a preset",
                fix="give --preset released_13b",
            )
        return
    if model is not None:
        raise ConfigError(f"give a model folder or --preset, got {model} and {preset}")
    if sparse_weights == random_weights:
        raise ConfigError(
            f"a preset has no weights of its own: say which are to stand in for those of {preset}",
            fix="give --sparse-weights or --random-weights",
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
        print_json({"bundle": str(out), "model": export.config.name, **export.plan.described()})
    else:
        results().print(_planned(export))
    export.plan.check_room()


def _print_done(export: Export, done: Exported, out: Path, as_json: bool) -> None:
    bundle = done.bundle
    if as_json:
        stages = [vars(stage) for stage in done.stages]
        told = {"bundle": str(out), "plan": export.plan.described(), "stages": stages}
        print_json(told | bundle.manifest.model_dump(mode="json"))
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
