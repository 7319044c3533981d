"""`mmi inspect parts`: the parts of a preset, a model folder or a bundle."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmi_deploy.cli.console import print_json, results
from mmi_deploy.cli.hub_folders import local_folder, spelled
from mmi_deploy.cli.inspect.source import AsJson
from mmi_deploy.documents.tokenizer import FILE_NAME, Tokenizer, Vocabulary
from mmi_deploy.errors import BundleError, ConfigError
from mmi_deploy.hub.kinds import BUNDLE_OR_MODEL
from mmi_deploy.spec.config import TokenConfig
from mmi_deploy.system.files import size
from mmi_deploy.system.safetensors_reader import read_header

if TYPE_CHECKING:
    from mmi_deploy.bundle.bundle import Bundle
    from mmi_deploy.spec.graphs import Graph


def parts(
    folder: Annotated[
        Path | None,
        typer.Argument(help="A bundle or a model folder, or hf://org/name.", show_default=False),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Print the configuration of this preset instead.", show_default=False),
    ] = None,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="Also list inputs and outputs of every graph.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the parts of a bundle, a model folder or a preset; without an argument, the presets."""
    from mmi_deploy.spec.config import to_json
    from mmi_deploy.spec.presets import preset as preset_called

    if folder and preset:
        raise ConfigError("a folder and --preset were given", expected="one of them")
    name = "" if folder is None else spelled(folder)
    if folder is not None:
        folder = local_folder(folder, BUNDLE_OR_MODEL, targets=None)
    is_bundle = folder is not None and (folder / "bundle.json").exists()
    if tensors and not is_bundle:
        raise ConfigError("--tensors does not apply here", expected="it with a bundle")
    if preset:
        results().print(to_json(preset_called(preset)), end="")
    elif folder is None:
        show_presets(as_json)
    elif is_bundle:
        show_bundle(folder, name, tensors, as_json)
    elif (folder / "config.json").exists():
        show_model(folder, name, as_json)
    else:
        raise ConfigError(
            f"{name} is neither a bundle nor a model folder",
            expected="a folder that holds bundle.json or config.json",
        )


def show_presets(as_json: bool) -> None:
    """Print name and first line of every preset."""
    from mmi_deploy.spec.presets import PRESETS

    presets = {name: (make.__doc__ or "").strip() for name, make in PRESETS.items()}
    first_lines = {name: text.partition("\n")[0] for name, text in presets.items()}
    if as_json:
        print_json(first_lines)
        return
    table = _table("preset", "what it is")
    for name, text in first_lines.items():
        table.add_row(name, text)
    results().print(table)


def parameter_counts(path: Path) -> dict[str, int]:
    """Number of parameters by part, read from the header of a safetensors file."""
    counts: Counter[str] = Counter()
    for name, entry in read_header(path).items():
        counts[name.partition(".")[0]] += prod(entry.shape)
    return dict(counts)


def show_model(folder: Path, name: str, as_json: bool) -> None:
    """Print the parameters of each part of a model folder. name: as it was given."""
    from mmi_deploy.spec.config import read_config

    config = read_config(folder / "config.json")
    path = folder / "model.safetensors"
    counts = parameter_counts(path)
    total, file_size = sum(counts.values()), path.stat().st_size
    vocabulary = _vocabulary(folder / FILE_NAME, config.tokens)
    if as_json:
        print_json(
            {
                "model": config.name,
                "parameters": counts,
                "bytes": file_size,
                "vocabulary": vocabulary and asdict(vocabulary),
            }
        )
        return
    table = _table("part", ">parameters", ">share", title=f"{name}: {config.name}")
    for part, count in sorted(counts.items(), key=lambda item: -item[1]):
        table.add_row(part, f"{count:,}", f"{count / max(total, 1):.1%}")
    table.add_section()
    table.add_row("all", f"{total:,}", size(file_size))
    results().print(table)
    if vocabulary is not None:
        _print_vocabulary(results(), vocabulary)


def show_bundle(folder: Path, name: str, tensors: bool, as_json: bool) -> None:
    """Print the graphs of a bundle, their receipts and its targets. name: as it was given."""
    from mmi_deploy.bundle.bundle import Bundle

    bundle = Bundle.open(folder, unproved=True)
    from mmi_deploy.bundle.build_report import describe_targets

    targets = describe_targets(bundle)
    vocabulary = _vocabulary(bundle.tokenizer, bundle.config.tokens)
    if as_json:
        report = [target.model_dump(mode="json") for target in targets]
        shown = {"targets": report, "vocabulary": vocabulary and asdict(vocabulary)}
        print_json({**bundle.manifest.model_dump(mode="json"), **shown})
        return
    out, limits = results(), bundle.limits
    about = (
        f": {bundle.config.name}, context {limits.context}, batch {limits.batch}, "
        f"{limits.images} images; samplers {', '.join(bundle.schedules)}; "
        f"engines for {', '.join(bundle.targets) or 'no target beyond the portable graphs'}"
    )
    out.print(Text.assemble((name, "bold"), about))
    for remark in bundle.remarks:
        out.print(remark, style="yellow")
    out.print(_graph_table(bundle))
    for line in _shared_files(bundle):
        out.print(line)
    if targets:
        from mmi_deploy.cli.console import print_table
        from mmi_deploy.cli.inspect.target import target_table

        print_table(out, target_table(targets))
        out.print(f"Details of one: `mmi inspect target {name} NAME`")
    for receipt in bundle.manifest.receipts:
        proof = f" was compared with: {receipt.compared_with}"
        out.print(Text.assemble((receipt.graph, "bold"), proof))
    out.print(
        f"Files were checked by size and time, and hashed if these are new; `mmi verify "
        f"{name}` hashes every byte"
    )
    if vocabulary is not None:
        _print_vocabulary(out, vocabulary)
    if tensors:
        for graph in bundle.graphs.values():
            out.print(_tensor_table(graph))


def _vocabulary(path: Path, tokens: TokenConfig) -> Vocabulary | None:
    """Vocabulary of a tokenizer, or None where it cannot be read, so that the rest is shown."""
    with suppress(BundleError):
        return Tokenizer.open(path, tokens).vocabulary
    return None


def _print_vocabulary(out: Console, vocabulary: Vocabulary) -> None:
    """Print the size of a vocabulary, and its words if it lists them."""
    out.print(f"\nvocabulary: {vocabulary.size:,} words or parts of words")
    if vocabulary.words:
        words = " ".join(vocabulary.words)
        out.print(
            textwrap.fill(
                words, min(out.width, 100), break_long_words=False, break_on_hyphens=False
            )
        )


def _graph_table(bundle: Bundle) -> Table:
    table = _table("graph", ">in", ">out", ">size", ">cases", ">worst error", ">allowed")
    for name, graph in bundle.graphs.items():
        shared = bundle.manifest.shared.get(name, ())
        files = bundle.manifest.graph_files(name).items()
        own = [entry for file, entry in files if file not in shared]
        receipt = bundle.manifest.receipt(name)
        proof: tuple[str | Text, ...] = ("none", Text("no receipt", style="red"), "")
        if receipt and receipt.cases:
            worst = max(receipt.cases, key=lambda case: case.error / case.tolerance)
            proof = (str(len(receipt.cases)), f"{worst.error:.1e}", f"{worst.tolerance:.0e}")
        counts = (str(len(graph.inputs)), str(len(graph.outputs)))
        table.add_row(name, *counts, size(sum(entry.size for entry in own)), *proof)
    return table


def _shared_files(bundle: Bundle) -> Iterator[str]:
    users: dict[str, list[str]] = {}
    for graph, files in bundle.manifest.shared.items():
        for file in files:
            users.setdefault(file, []).append(graph)
    for file, graphs in users.items():
        yield f"{file}, {size(bundle.manifest.files[file].size)}, is shared by {', '.join(graphs)}"


def _tensor_table(graph: Graph) -> Table:
    ranges = ", ".join(f"{letter} {r.min}-{r.max}" for letter, r in sorted(graph.ranges.items()))
    table = _table("", "tensor", "type", "shape", title=f"{graph.name} ({ranges})")
    for side, listed in (("in", graph.inputs), ("out", graph.outputs)):
        for tensor in listed:
            shared = graph.in_place.get(tensor.name)
            place = f" in place of {shared}" if shared else ""
            shape = " × ".join(map(str, tensor.shape)) or "scalar"
            table.add_row(side, f"{tensor.name}{place}", tensor.dtype, shape)
    return table


def _table(*columns: str, title: str | None = None) -> Table:
    """Make a table; columns whose heading starts with `>` are right-aligned."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left")
    return table
