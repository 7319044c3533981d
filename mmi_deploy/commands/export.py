"""`mmi export`: a model folder becomes a bundle that the runtime can trust."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmi_deploy import presets
from mmi_deploy.commands.needs import extras
from mmi_deploy.commands.screen import print_json, results, staged
from mmi_deploy.files import check_replaceable


def export(
    model: Annotated[
        Path, typer.Argument(help="A model folder: config.json, weights, tokenizer.")
    ] = Path("assets/tiny"),
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the bundle.")] = Path(
        "bundles/tiny"
    ),
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that a document may have.", show_default="all"),
    ] = None,
    schedule: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:STEPS",
            help="A sampler, as in unipc:20 or ddim:50; several may be given, the first is the "
            "default.",
            show_default="unipc:20",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Export a preset with stand-in weights instead of a model folder.",
            show_default=False,
        ),
    ] = None,
    sparse_weights: Annotated[
        bool, typer.Option("--sparse-weights", help="With --preset: zeros that take no disk.")
    ] = False,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="With --preset: drawn numbers.")
    ] = False,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --preset: cut the language model to so many layers.",
            show_default="all",
        ),
    ] = None,
    prove: Annotated[
        str | None,
        typer.Option(
            metavar="full|slice|none",
            help="What is run to prove the graphs: they themselves, the same code at a smaller "
            "size, or nothing.",
            show_default="full up to 2 GB of weights, else slice",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace any folder --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Turn a trained model into ONNX graphs and prove each against the model.

    Every graph is run in ONNX Runtime next to the PyTorch module it came from; what they differ by
    is its receipt. A graph that differs too much is refused, and nothing is written.
    """
    check_replaceable(out, force)
    with extras("export"):
        from mmi_export.bundle_export import DEFAULT_SCHEDULES, export_bundle
        from mmi_export.stand_in import export_stand_in
    options: dict[str, Any] = {"context": context, "schedules": schedule or DEFAULT_SCHEDULES}
    options |= {"scope": prove, "force": force}
    with staged("loading") as stage:
        if preset is None:
            bundle = export_bundle(model, out, **options, progress=stage)
        else:
            bundle = export_stand_in(
                presets.preset(preset),
                out,
                weights="random" if random_weights else "empty",
                layers=layers,
                **options,
                progress=stage,
            )
    if as_json:
        print_json({"bundle": str(out), **bundle.manifest.model_dump(mode="json")})
        return
    cases = [case for receipt in bundle.manifest.receipts for case in receipt.cases]
    if not cases:
        results().print(f"{out}: {len(bundle.graphs)} graphs, none of them proved")
        return
    results().print(
        f"{out}: {len(bundle.graphs)} graphs, {len(cases)} comparisons, greatest error "
        f"{max(case.error for case in cases):.1e}. Look at it with `mmi inspect {out}`"
    )
