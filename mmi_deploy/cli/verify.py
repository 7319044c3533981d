"""`mmi verify`: verify checksums and receipts of a bundle, or the engines of a target."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from mmi_deploy.cli.console import counted, print_json, print_table, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.hub_folders import local_folder, local_only, spelled
from mmi_deploy.cli.target_options import Device, Kernels, Resident, resident_groups
from mmi_deploy.errors import ConfigError
from mmi_deploy.hub.kinds import BUNDLE
from mmi_deploy.hub.reference import is_reference
from mmi_deploy.spec.backends import AUTO, NONE
from mmi_deploy.system.files import prepare_file
from mmi_deploy.system.progress import shown

if TYPE_CHECKING:
    from mmi_deploy.bundle.bundle import Bundle
    from mmi_deploy.parity import Proof

# Seconds before hashing is logged; most bundles take less.
PATIENCE = 5.0


def verify(
    bundle: Annotated[
        Path, typer.Argument(help="Bundle of `mmi export`, or hf://org/name.")
    ] = Path("bundles/tiny"),
    run: Annotated[
        bool, typer.Option("--run", help="Also run every graph once; takes seconds.")
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Compare the engines of this target with the portable graphs on this machine, and "
            "write their receipts.",
            show_default=False,
        ),
    ] = None,
    save_outputs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Save the outputs of the portable graphs on the bundle's inputs, to compare "
            "engines with on a machine of less memory.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --target: compare with outputs that --save-outputs wrote; does not run "
            "the portable graphs.",
            show_default=False,
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --target: write a receipt of its answers on a benchmark, from a file that "
            "`mmi evaluate --predictions ... --against ... -o FILE` wrote; runs nothing.",
            show_default=False,
        ),
    ] = None,
    device: Device = 0,
    resident: Resident = None,
    kernels: Kernels = AUTO,
    force: Annotated[bool, typer.Option("--force", help="Skip the check of free memory.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Hash every file of a bundle and check that every graph has a receipt.

    A receipt records what a graph was compared with, and the error. With --run every graph also
    runs once; values that are not finite are an error.

    With --target the engines of that target run instead, on recorded and random inputs, and are
    compared with the portable graphs in ONNX Runtime. Receipts are written into the target, which
    then runs without --unproved. The portable graphs take the memory of the float32 model: where
    that is more than this machine has, save their outputs on a larger one with --save-outputs and
    give the file with --against.

    With --answers the target gets a receipt of whole answers: how its scores on a benchmark differ
    from those of another target, with 95 % intervals.
    """
    if save_outputs is not None:
        if run or target is not None:
            raise ConfigError(
                "--save-outputs runs the portable graphs alone",
                fix=f"leave out {'--run' if run else '--target'}",
            )
        _check_unused(device, resident, kernels, against, answers=answers)
        _save_outputs(bundle, save_outputs, force, as_json)
        return
    if target is not None:
        if run:
            raise ConfigError(
                "--run draws a picture with the portable graphs, --target runs engines",
                fix="leave out one of them",
            )
        local_only(bundle, "receipts are written into the bundle")
        if answers is not None:
            _check_unused(device, resident, kernels, against, force, why="runs engines")
            _write_answers(bundle, target, answers, as_json)
            return
        groups = resident_groups(resident)
        _verify_target(bundle, target, device, groups, kernels, force, as_json, against)
        return
    _check_unused(device, resident, kernels, against, force, answers)
    _verify_bundle(bundle, run, as_json)


def _check_unused(
    device: int,
    resident: str | None,
    kernels: str,
    against: Path | None,
    force: bool = False,
    answers: Path | None = None,
    why: str = "goes with --target NAME",
) -> None:
    """Raise `ConfigError` for an option that has no use, and say why."""
    for option, given in {
        "--device": device != 0,
        "--resident": resident is not None,
        "--kernels": kernels != AUTO,
        "--against": against is not None,
        "--force": force,
        "--answers": answers is not None,
    }.items():
        if given:
            raise ConfigError(f"{option} {why}", fix=f"leave out {option}")


def _save_outputs(given: Path, out: Path, force: bool, as_json: bool) -> None:
    """Save the outputs of the portable graphs for `--against` on another machine."""
    path, name = local_folder(given, BUNDLE), spelled(given)
    with extras("verify --save-outputs", "build"):
        from mmi_deploy.bundle.bundle import Bundle
        from mmi_deploy.targets.polygraphy.saved_outputs import save_outputs
    prepare_file(out, ".json")
    bundle = Bundle.open(path)
    if not force:
        _check_memory(bundle)
    with shown(remarks(), "running graphs") as progress:
        cases = save_outputs(bundle, out, progress)
    if as_json:
        print_json({"ok": True, "bundle": name, "outputs": str(out), "cases": cases})
        return
    results().print(f"{out}: outputs of {counted(cases, 'run')}")
    where = "FOLDER" if is_reference(given) else name  # receipts are written into it
    remarks().print(f"compare engines with it: `mmi verify {where} --target NAME --against {out}`")


def _verify_bundle(given: Path, run: bool, as_json: bool) -> None:
    bundle, name = local_folder(given, BUNDLE, targets=None), spelled(given)
    from mmi_deploy.bundle.bundle import Bundle
    from mmi_deploy.bundle.manifest import Hashes

    with shown(remarks(), "hashing", patience=PATIENCE) as progress:
        hashes = Hashes(progress)
        opened = Bundle.open(bundle, hash_file=hashes)
        unproved = opened.verify(hashes)
    manifest = opened.manifest
    found: dict[str, Any] = {
        "bundle": name,
        "files": len(manifest.files),
        "receipts": len(manifest.receipts),
        "targets": list(opened.targets),
        "targets_without_receipts": list(unproved),
    }
    if run:
        with extras("verify --run", "cpu"):
            from mmi_deploy.runtime.runtime import Runtime
        if not as_json:
            remarks().print("running every graph ...")
        found["tokens"], found["pictures"] = _smoke(Runtime.open(opened, kernels=NONE))
    if as_json:
        print_json({"ok": True, **found})
        return
    line = f"{name} is whole: {counted(found['files'], 'file')} unchanged, "
    line += counted(found["receipts"], "receipt")
    if opened.targets:
        line += f", {counted(len(opened.targets), 'target')}"
    if run:
        wrote = counted(found["tokens"], "token"), counted(found["pictures"], "picture")
        line += f"; wrote {wrote[0]} and drew {wrote[1]}"
    results().print(line)
    for remark in opened.remarks:
        remarks().print(remark)
    if unproved:
        names = ", ".join(unproved)
        command = opened.verify_command(unproved[0] if len(unproved) == 1 else "NAME")
        remarks().print(
            f"targets without receipts: {names}. Write them with `{command}`, on their hardware"
        )


def _verify_target(
    path: Path,
    target: str,
    device: int,
    resident: tuple[str, ...] | None,
    kernels: str,
    force: bool,
    as_json: bool,
    against: Path | None,
) -> None:
    """Compare the engines of one target and write their receipts. Raises `BundleError` for the
    first graph that fails; its receipt is written too."""
    with extras("verify --target", "build"):
        from mmi_deploy.bundle.bundle import Bundle
        from mmi_deploy.runtime.runtime import Runtime
        from mmi_deploy.targets.polygraphy.saved_outputs import compare_saved, read_outputs
        from mmi_deploy.targets.verify_target import check_proof, compare_target, write_receipts
    bundle = Bundle.open(path, unproved=True)
    _check_target(bundle, path, target)
    saved = None if against is None else read_outputs(against, bundle)
    if saved is None and not force:
        _check_memory(bundle)
    manifest = bundle.target(target)
    runtime = Runtime.open(bundle, target=target, kernels=kernels, device=device, resident=resident)
    try:
        with shown(remarks(), "recording inputs") as progress:
            if saved is None:
                proofs = compare_target(bundle, manifest, runtime, progress)
            else:
                proofs = compare_saved(bundle, manifest, runtime, saved, progress)
    finally:
        runtime.close()
    write_receipts(bundle, manifest, proofs)
    failed = [proof for proof in proofs if not proof.passed]
    if as_json:
        graphs = [_to_json(proof) for proof in proofs]
        print_json({"ok": not failed, "bundle": str(path), "target": target, "graphs": graphs})
    else:
        print_table(results(), _table(proofs))
        word = "with an error that is too large" if failed else "all within tolerance"
        remarks().print(
            f"{counted(len(proofs), 'receipt')} written into {bundle.target_folder(target)}, {word}"
        )
    for proof in failed:
        check_proof(proof, manifest.recipe["precision"])


def _write_answers(path: Path, target: str, comparison: Path, as_json: bool) -> None:
    """Write the receipt of a target's answers, which a comparison gives."""
    from mmi_deploy.bundle.bundle import Bundle
    from mmi_deploy.targets.answer_receipts import read_comparison, write_answers

    bundle = Bundle.open(path, unproved=True)
    _check_target(bundle, path, target)
    manifest = bundle.target(target, unproved=True)
    receipt = read_comparison(comparison, bundle, manifest)
    write_answers(bundle, manifest, receipt)
    if as_json:
        answers = receipt.model_dump(mode="json")
        print_json({"ok": True, "bundle": str(path), "target": target, "answers": answers})
        return
    results().print(receipt.in_words())
    remarks().print(f"receipt written into {bundle.target_folder(target)}")


def _check_target(bundle: Bundle, path: Path, target: str) -> None:
    """Raise `ConfigError`, which lists the targets, unless the bundle has this one."""
    if target not in bundle.targets:
        raise ConfigError(
            f"{path} has no target {target!r}",
            expected=" or ".join(bundle.targets) or "one that `mmi build` made",
            fix=f"build it with `{bundle.build_command(target)}`",
        )


def _check_memory(bundle: Bundle) -> None:
    from mmi_deploy.system.memory import free_memory
    from mmi_deploy.targets.calibration import check_can_run

    fix = "Verify on a larger machine, or give --force to try all the same"
    check_can_run(bundle, free_memory(), fix)


def _table(proofs: list[Proof]) -> Table:
    """One row per graph: its worst case, and the tolerance at which that would have passed."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("graph", no_wrap=True)
    for heading in ("cases", "max error", "relative rms", "tolerance", "would pass at"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for proof in proofs:
        _, worst = proof.worst
        table.add_row(
            proof.graph,
            str(len(proof.comparisons)),
            f"{worst.error.max_abs:.1e}" if worst.error else "",
            f"{worst.relative:.1e}",
            f"{worst.tolerance.relative:.1e}",
            f"{worst.relative:.3g}",
            worst.verdict,
        )
    return table


def _to_json(proof: Proof) -> dict[str, Any]:
    """Result of one graph. Values that are not finite become null, as JSON has none."""
    sizes, worst = proof.worst
    error = worst.error
    return {
        "graph": proof.graph,
        "compared_with": proof.compared_with,
        "cases": len(proof.comparisons),
        "verdict": worst.verdict,
        "sizes": sizes,
        "tensor": worst.name,
        "index": list(error.worst or ()) if error else None,
        "got": _finite(worst.got),
        "expected": _finite(worst.expected),
        "max_error": _finite(error.max_abs) if error else None,
        "mean_error": _finite(error.mean_abs) if error else None,
        "relative_rms": _finite(worst.relative),
        "tolerance": worst.tolerance.relative,
        "flaw": worst.flaw,
    }


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def _smoke(runtime: Any) -> tuple[int, int]:
    """Smoke test: draw a picture, read it, and generate four tokens, so that every graph runs."""
    from mmi_deploy.documents.document import Draw, document_of
    from mmi_deploy.runtime.events import Finished
    from mmi_deploy.runtime.generation import GenerationOptions, generate

    options = GenerationOptions(max_images=0, max_tokens=4, min_tokens=4)
    *_, last = generate(runtime, document_of(Draw()), options)
    assert isinstance(last, Finished), "generate ends with Finished"
    return last.tokens, last.images
