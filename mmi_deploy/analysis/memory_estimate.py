"""Estimate the memory of a model by recipe, and choose the recipe that fits a GPU.

Exact: weights as a recipe stores them, and the state of a document (KV cache, image values,
condition). An estimate: the workspace, the peak of intermediate values that are live at once when
the nodes run in the order of the file. A value is live from its producer to its last use; views
share memory, as do caches written in place. A runtime with fusion takes less, one that picks
algorithms with their own workspace takes more. Assumed: the driver's share
(`gpu_specs.DRIVER_RESERVE`), and the code, contexts and recordings of TensorRT's engines.

Engines run one after another and share one workspace. With `resident` the engines that are not
named are swapped in when they run, see `mmi_deploy.runtime.tensorrt.engine.GROUPS`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mmi_deploy.analysis.flop_rules import IN_PLACE, VIEWS
from mmi_deploy.analysis.gpu_specs import GB
from mmi_deploy.analysis.shapes import SizedGraph, Value, read_graph, sized
from mmi_deploy.analysis.stored_bytes import Storage, storage_of
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.memory_plan import SHALLOW, document_bytes
from mmi_deploy.runtime.tensorrt.engine import GROUPS, contexts_bytes
from mmi_deploy.spec.backends import BACKENDS, TENSORRT
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.graphs import Limits, graphs
from mmi_deploy.system.files import size as readable
from mmi_deploy.targets.precision.recipes import RECIPES, Recipe
from mmi_deploy.targets.profiles import profiles
from mmi_deploy.targets.tensorrt_plan import KERNEL_BYTES

# Engine groups to keep in memory, from all (None) to none. Swapping reads an engine from disk for
# every image that is read or drawn, so recipes with fewer bits are tried first.
RESIDENT_CHOICES: tuple[tuple[str, ...] | None, ...] = (None, ("llm", "denoise"), ("llm",), ())

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": GB, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@dataclass(frozen=True)
class GraphMemory:
    """Memory of one graph in bytes: weights in the target, its estimated workspace, and an estimate
    of its engine's code, contexts and recordings."""

    graph: str
    weights: int
    workspace: int
    overhead: int = 0


@dataclass(frozen=True)
class Memory:
    """Memory of a deployment in bytes. documents: state of `batch` documents, by kind. resident:
    engine groups that stay in memory, None for all."""

    recipe: str
    graphs: tuple[GraphMemory, ...]
    documents: Mapping[str, int]
    resident: tuple[str, ...] | None

    @property
    def weights(self) -> int:
        """Weights in memory at once: resident groups, and the largest of the others."""
        groups = {
            name: sum(graph.weights for graph in self.graphs if graph.graph in members)
            for name, members in GROUPS.items()
        }
        stay = groups if self.resident is None else self.resident
        turns = (size for name, size in groups.items() if name not in stay)
        return sum(groups[name] for name in stay) + max(turns, default=0)

    @property
    def workspace(self) -> int:
        return max(graph.workspace for graph in self.graphs)

    @property
    def overhead(self) -> int:
        """Code, contexts and recordings of all engines."""
        return sum(graph.overhead for graph in self.graphs)

    @property
    def total(self) -> int:
        """Bytes in use at once, without the driver's share."""
        return self.weights + self.workspace + self.overhead + sum(self.documents.values())


@dataclass(frozen=True)
class Choice:
    """Recipe chosen for a memory budget. spare: bytes that are left."""

    recipe: str
    resident: tuple[str, ...] | None
    memory: Memory
    spare: int


class Model:
    """Memory model of one bundle's graphs, by recipe. Shapes are inferred once per graph.

    files: graph name -> portable ONNX file; its weights are not read. context: KV-cache slots of
    the exported graphs. limits: tokens, rows and images to allow.
    """

    def __init__(
        self,
        config: ModelConfig,
        files: Mapping[str, Path],
        context: int,
        limits: Limits,
        runtime: str = TENSORRT,
    ) -> None:
        """Raises `ConfigError` for more slots than the graphs have."""
        if limits.context > context:
            raise ConfigError(
                "the graphs have a smaller KV cache",
                expected=f"at most {context} tokens",
                got=limits.context,
                fix=f"export them again with --context {limits.context}",
            )
        self.config, self.limits, self.runtime = config, limits, runtime
        self.exported = replace(limits, context=context)
        self.exported_contract = graphs(config, self.exported)
        self._everything: dict[str, Memory] = {}
        # As in the runtime's memory plan: denoise_shallow is loaded for --full-every only.
        self.files = {name: path for name, path in files.items() if name != SHALLOW}
        self.contract = graphs(config, limits)

    @cached_property
    def sized(self) -> dict[str, SizedGraph]:
        """Every graph at the maximum sizes of its engine, with the logits of one position."""
        found = {}
        for name, contract in self.exported_contract.items():
            if name not in self.files:
                continue
            path, ranges = self.files[name], profiles(self.contract[name])[0].ranges
            sizes = {letter: allowed.max for letter, allowed in ranges.items()}
            found[name] = sized(read_graph(path), contract, sizes)
        return found

    def memory(self, recipe: Recipe, resident: Sequence[str] | None = None) -> Memory:
        """Memory with `recipe`. Raises `ConfigError` for an unknown engine group."""
        stay = _groups(None if resident is None else tuple(resident))
        if recipe.name not in self._everything:
            self._everything[recipe.name] = self._count(recipe)
        return replace(self._everything[recipe.name], resident=stay)

    def _count(self, recipe: Recipe) -> Memory:
        measured = []
        for name, graph in self.sized.items():
            storage = storage_of(graph, self.contract[name], recipe, self.runtime)
            overhead = 0
            if BACKENDS[self.runtime].plugin:  # TensorRT's engines
                contract, limits = self.contract[name], self.limits
                overhead = KERNEL_BYTES + contexts_bytes(contract, limits.images, limits.batch)
            measured.append(
                GraphMemory(name, weight_bytes(graph, storage), workspace(graph, storage), overhead)
            )
        typed = {
            name: graph.typed(recipe.activations_on(self.runtime))
            for name, graph in self.contract.items()
        }
        seen = min(self.config.image_decoder.mmfs.images_seen, self.limits.images)
        documents = {
            what: size * self.limits.batch
            for what, size in document_bytes(typed, self.limits, seen).items()
        }
        return Memory(recipe.name, tuple(measured), documents, None)

    def recipe_for(self, budget: int) -> Choice:
        """Choose the most accurate recipe within `budget` bytes, with all engines resident if one
        fits, else with as many as possible. Raises `ConfigError` with the least memory that any
        recipe takes."""
        least: Memory | None = None
        for resident in RESIDENT_CHOICES:
            for name in BACKENDS[self.runtime].precisions:
                memory = self.memory(RECIPES[name], resident)
                if memory.total <= budget:
                    return Choice(name, resident, memory, budget - memory.total)
                if least is None or memory.total < least.total:
                    least = memory
        assert least is not None
        raise ConfigError(
            f"no recipe fits {self.config.name} into {readable(budget)}",
            expected=f"at least {readable(least.total)} ({least.recipe}, engines swapped in)",
            fix=f"allow fewer than {self.limits.context} tokens (--context) or "
            f"{self.limits.images} images (--images)",
        )


def _groups(resident: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Remove duplicates. Raises `ConfigError` for an unknown engine group."""
    if unknown := sorted(set(resident or ()) - set(GROUPS)):
        raise ConfigError(f"no engines are called {unknown[0]!r}", expected=", ".join(GROUPS))
    return None if resident is None else tuple(dict.fromkeys(resident))


def recipe_for(
    budget: int,
    config: ModelConfig,
    files: Mapping[str, Path],
    context: int,
    limits: Limits,
    runtime: str = TENSORRT,
) -> Choice:
    """Choose a recipe, see `Model.recipe_for`. budget: free memory in bytes."""
    return Model(config, files, context, limits, runtime).recipe_for(budget)


def weight_bytes(graph: SizedGraph, storage: Storage) -> int:
    """Bytes of all weights in `storage`."""
    return sum(storage.bytes(value) for value in graph.weights)


def workspace(graph: SizedGraph, storage: Storage) -> int:
    """Peak bytes of intermediate values that are live at once."""
    # Value name -> value whose memory it uses (itself, or the source of a view).
    own: dict[str, Value] = {}
    last: dict[str, int] = {}
    made: list[list[Value]] = []
    outside = {value.name for value in (*graph.inputs, *graph.weights)}
    for index, step in enumerate(graph.steps):
        for value in step.inputs:
            if value is not None and value.name in own:
                last[own[value.name].name] = index
        fresh = []
        for value in step.outputs:
            place = 0 if step.operator in VIEWS else IN_PLACE.get(step.operator)
            shared = step.inputs[place] if place is not None and step.inputs else None
            if value.constant or value.data is not None:
                outside.add(value.name)
            elif shared is not None and shared.name in outside:
                outside.add(value.name)
            elif shared is not None:
                own[value.name] = own[shared.name]
            else:
                own[value.name] = value
                fresh.append(value)
        made.append(fresh)
    bound = {own[value.name].name for value in graph.outputs if value.name in own}
    return _peak(made, last, bound, storage)


def _peak(
    made: Sequence[Sequence[Value]],
    last: Mapping[str, int],
    bound: Collection[str],
    storage: Storage,
) -> int:
    """Peak of live bytes. bound: values in the memory of the graph's outputs, which do not
    count."""
    live = peak = 0
    ends: dict[int, int] = {}
    for index, fresh in enumerate(made):
        for value in fresh:
            if value.name in bound:
                continue
            size = storage.bytes(value)
            live += size
            end = last.get(value.name, index)
            ends[end] = ends.get(end, 0) + size
        peak = max(peak, live)
        live -= ends.pop(index, 0)
    return peak


def with_limits(
    limits: Limits, context: int | None, batch: int | None, images: int | None
) -> Limits:
    """Replace the limits that are given. Raises `ConfigError` for less than 1."""
    for name, asked in (("context", context), ("batch", batch), ("images", images)):
        if asked is not None:
            if asked < 1:
                raise ConfigError(f"--{name} must be at least 1", got=asked)
            limits = replace(limits, **{name: asked})
    return limits


def parse_bytes(text: str) -> int:
    """Parse `24GB`, `512 MB` or `8GiB` into bytes. Raises `ConfigError`."""
    word = text.strip().upper().removesuffix("B")
    unit = word.lstrip("0123456789. ")
    with suppress(ValueError, OverflowError):
        found = round(float(word.removesuffix(unit)) * _UNITS.get(unit, 0))
        if found > 0:
            return found
    raise ConfigError(
        f"{text!r} is not an amount of memory", fix="for example --fit 24GB, or the name of a GPU"
    )
