"""`python -m mmi_bench.plan_lint`: kernel plans of graphs for several architectures, and the rules
that they break. No GPU: TensorRT-RTX builds each engine, which is not kept.

Graphs are those of a bundle, or of a preset whose language model is cut to a few layers: shapes,
and so kernels, are those of the whole model.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import onnx
import torch
import typer

from mmi_deploy.analysis.memory_estimate import workspace
from mmi_deploy.analysis.shapes import read_graph, sized
from mmi_deploy.analysis.stored_bytes import storage_of
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.bundle.kernel_plan import Finding, ProfilePlan
from mmi_deploy.cli import program
from mmi_deploy.cli.console import print_json, results
from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.backends import TENSORRT_RTX
from mmi_deploy.spec.graphs import Graph, Limits, graphs
from mmi_deploy.spec.presets import preset
from mmi_deploy.system.files import size
from mmi_deploy.system.progress import silent
from mmi_deploy.targets.plan_rules import check_plans, facts_of
from mmi_deploy.targets.precision import recipe, rewrite
from mmi_deploy.targets.profiles import profiles
from mmi_deploy.targets.tensorrt_build import Job, build_engine, open_tensorrt
from mmi_deploy.targets.tensorrt_rewrites import rewrite_for_tensorrt
from mmi_export.export import export_graph
from mmi_export.placeholder_model import cut, write_placeholder_model
from mmi_export.tracing.fake_weights_model import FakeWeightsModel
from mmi_export.tracing.stored_weights import link_file, stored_weights
from mmi_export.tracing.weight_sources import WeightSources
from mmi_plugins.tensorrt.plugin import plugin_for
from mmi_plugins.tensorrt.weight_only import weight_only_products

ARCHITECTURES = ("sm80", "sm89", "sm120")
PRECISIONS = ("fp16", "bf16", "int8", "int4")

# Tokens of a document of the released model.
CONTEXT = 2048


@dataclass(frozen=True)
class Source:
    """A portable graph to build: its contract, its file, and the limits of its bundle."""

    graph: Graph
    file: Path
    limits: Limits


@dataclass(frozen=True)
class Linted:
    """Plans of one engine, and the rules that they break. scratch: bytes of values that are live at
    once at the largest sizes of the profiles, nothing fused."""

    graph: str
    precision: str
    architecture: str
    plans: tuple[ProfilePlan, ...]
    findings: tuple[Finding, ...]
    scratch: int
    seconds: float

    @property
    def fatal(self) -> bool:
        """True if `mmi build` refuses the engine."""
        return any(finding.fatal for finding in self.findings)

    def lines(self) -> Iterator[str]:
        """A line for each profile."""
        for plan in self.plans:
            rules = Counter(one.rule for one in self.findings if one.profile == plan.profile)
            broken = ", ".join(f"{rule} ({count})" for rule, count in rules.items()) or "none"
            yield (
                f"{self.graph} {plan.profile} {self.precision} {self.architecture}: "
                f"{len(plan.launched)} kernels, scratch at most {size(self.scratch)}, "
                f"rules broken: {broken}"
            )


def lint(
    source: Source,
    precision: str,
    architecture: str,
    rows: int,
    folder: Path,
    *,
    own_products: bool = True,
) -> Linted:
    """Build the engine of `source` as `mmi build --unproved --rows ROWS` does, in `folder`.
    own_products: as by `--products plugin`, else `tensorrt`."""
    start, name = time.perf_counter(), source.graph.name
    plugin, chosen = plugin_for(TENSORRT_RTX, architecture), recipe(precision)
    path = folder / f"{name}.onnx"
    rewrite(chosen, source.graph, source.file, path, runtime=TENSORRT_RTX)
    model, least = onnx.load(path, load_external_data=False), 1
    if name in chosen.weights:
        if own_products:
            model = weight_only_products(model, path)
        else:
            least = chosen.min_batch
    onnx.save(rewrite_for_tensorrt(plugin.copy(model), path), path)
    shapes = profiles(source.graph, replace(source.limits, batch=max(rows, least)))
    job = Job(name, TENSORRT_RTX, architecture, path, folder / f"{name}.engine", shapes, plugin)
    built = build_engine(open_tensorrt(plugin, TENSORRT_RTX, architecture), job, silent)
    facts = facts_of(onnx.load(path, load_external_data=False))
    half = chosen.activations_on(TENSORRT_RTX) != "float32"
    findings = check_plans(built.plans, facts, half)
    most = {letter: allowed.max for letter, allowed in shapes[0].ranges.items()}
    counted = sized(read_graph(source.file), source.graph, most)
    scratch = workspace(counted, storage_of(counted, source.graph, chosen, TENSORRT_RTX))
    seconds = time.perf_counter() - start
    return Linted(name, precision, architecture, built.plans, findings, scratch, seconds)


def bundle_sources(folder: Path) -> dict[str, Source]:
    """Graphs of a bundle."""
    bundle = Bundle.open(folder, unproved=True)
    return {
        name: Source(graph, bundle.graph_file(name), bundle.limits)
        for name, graph in bundle.graphs.items()
    }


@contextmanager
def preset_sources(
    name: str, layers: int, names: Sequence[str] = (), context: int = CONTEXT
) -> Iterator[dict[str, Source]]:
    """Graphs of a preset with `layers` layers of its language model and no weights, exported
    into a temporary folder. names: those to export, all by default."""
    config, limits = cut(preset(name), layers), Limits(context)
    made = graphs(config, limits)
    _check_names(names, list(made))
    with tempfile.TemporaryDirectory(prefix="mmi-plan-lint-") as folder:
        model_folder = Path(folder) / "model"
        write_placeholder_model(config, model_folder, "empty", torch.float16)
        model = FakeWeightsModel(config)
        sources = WeightSources(model, stored_weights(model_folder, model.weights), link_file)
        found = {}
        for one in names or made:
            file = Path(folder) / "graphs" / f"{one}.onnx"
            file.parent.mkdir(exist_ok=True)
            export_graph(sources, made[one], file)
            found[one] = Source(made[one], file, limits)
        yield found


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no graph {name!r}", expected=", ".join(known))


def lint_all(
    sources: dict[str, Source],
    precisions: Sequence[str],
    architectures: Sequence[str],
    rows: int = 1,
    *,
    own_products: bool = True,
) -> Iterator[Linted]:
    """Lint every graph in every precision that changes it, for every architecture, one engine at a
    time."""
    for name, source in sources.items():
        for precision in precisions:
            weights_only = recipe(precision).weights
            if weights_only and name not in weights_only:
                continue  # as in float16
            for architecture in architectures:
                with tempfile.TemporaryDirectory(prefix="mmi-plan-lint-") as folder:
                    yield lint(
                        source,
                        precision,
                        architecture,
                        rows,
                        Path(folder),
                        own_products=own_products,
                    )


def main(
    bundle: Annotated[
        Path | None, typer.Argument(help="Bundle.", show_default="the preset")
    ] = None,
    preset_name: Annotated[
        str, typer.Option("--preset", help="Preset to export without weights.")
    ] = "released_13b",
    layers: Annotated[int, typer.Option(min=1, help="Layers of its language model.")] = 1,
    graph: Annotated[
        list[str] | None, typer.Option(help="Only this graph; may be repeated.", show_default="all")
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="Recipe; may be repeated.", show_default=", ".join(PRECISIONS)),
    ] = None,
    arch: Annotated[
        list[str] | None,
        typer.Option(help="Architecture; may be repeated.", show_default=", ".join(ARCHITECTURES)),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows that the engines compute together.")] = 1,
    products: Annotated[
        Literal["plugin", "tensorrt"],
        typer.Option(help="Who multiplies with quantised weights, as for `mmi build`."),
    ] = "plugin",
    as_json: Annotated[bool, typer.Option("--json", help="Print findings as JSON.")] = False,
) -> int:
    """Print the kernels of every engine and the rules that its plan breaks. Exit code 1: `mmi
    build` would refuse one of them."""
    precisions, architectures = precision or PRECISIONS, arch or ARCHITECTURES
    own = products == "plugin"
    for one in precisions:
        recipe(one)
    if bundle is not None:
        sources = bundle_sources(bundle)
        _check_names(graph or (), list(sources))
        chosen = {name: sources[name] for name in graph or sources}
        return _report(lint_all(chosen, precisions, architectures, rows, own_products=own), as_json)
    with preset_sources(preset_name, layers, graph or ()) as chosen:
        return _report(lint_all(chosen, precisions, architectures, rows, own_products=own), as_json)


def _report(found: Iterator[Linted], as_json: bool) -> int:
    fatal, rows = False, []
    for one in found:
        fatal |= one.fatal
        rows.append(_row(one))
        for line in one.lines():
            if not as_json:
                results().print(line, markup=False)
    if as_json:
        print_json({"engines": rows})
    return int(fatal)


def _row(one: Linted) -> dict[str, Any]:
    return {
        "graph": one.graph,
        "precision": one.precision,
        "architecture": one.architecture,
        "seconds": round(one.seconds, 1),
        "scratch_bytes": one.scratch,
        "kernels": {plan.profile: len(plan.launched) for plan in one.plans},
        "findings": [json.loads(finding.model_dump_json()) for finding in one.findings],
    }


run = program.program("python -m mmi_bench.plan_lint", main)

if __name__ == "__main__":
    program.main(run)
