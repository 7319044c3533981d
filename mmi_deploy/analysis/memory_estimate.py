"""How much memory a model needs, by recipe, and which GPU holds it: computed from its graphs.

Exact: weights as a recipe stores them, and what a document keeps (caches, image values, condition).
An estimate: the workspace. It is the greatest sum of intermediate values that live at once when the
nodes run in the order of the file, each value from its making to its last use; renamed values share
their memory, and so do caches written in place. A runtime that fuses nodes needs less, one that
picks an algorithm with a workspace of its own needs more. Assumed: what the driver takes
(`gpu_specs.DRIVER_RESERVE`).

Engines share one workspace, since they run one after another; with `resident` the engines that are
not named take turns in memory, see `mmi_deploy.runtime.tensorrt.engine.GROUPS`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mmi_deploy.analysis.flop_rules import IN_PLACE, VIEWS
from mmi_deploy.analysis.gpu_specs import GB
from mmi_deploy.analysis.shapes import Sized, Value, read_graph, sized
from mmi_deploy.analysis.stored_bytes import Storage, storage_of
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.memory_plan import SHALLOW, document_bytes
from mmi_deploy.runtime.tensorrt.engine import GROUPS
from mmi_deploy.spec.backends import BACKENDS, TENSORRT
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.graphs import Limits, graphs
from mmi_deploy.system.files import size as readable
from mmi_deploy.targets.precision.recipes import RECIPES, Recipe
from mmi_deploy.targets.profiles import profiles

TURNS: tuple[tuple[str, ...] | None, ...] = (None, ("llm", "denoise"), ("llm",), ())
"""Which engines stay in memory, from all of them to none. A turn reads an engine from disk for
every image read or picture drawn, so fewer bits are tried before turns."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": GB, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@dataclass(frozen=True)
class GraphMemory:
    """Bytes of one graph: weights in the target, and the estimate of its workspace."""

    graph: str
    weights: int
    workspace: int


@dataclass(frozen=True)
class Memory:
    """Bytes of a whole deployment. documents: what each keeps, by what it is, for `batch` of them.
    resident: groups that stay, None for all."""

    recipe: str
    graphs: tuple[GraphMemory, ...]
    documents: Mapping[str, int]
    resident: tuple[str, ...] | None

    @property
    def weights(self) -> int:
        """Those that are there at once: what stays, and the largest group that takes turns."""
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
    def total(self) -> int:
        """At once, the driver's share left out."""
        return self.weights + self.workspace + sum(self.documents.values())


@dataclass(frozen=True)
class Choice:
    """The recipe for a budget. Spare: bytes that are left."""

    recipe: str
    resident: tuple[str, ...] | None
    memory: Memory
    spare: int


class Model:
    """Graph files of one model, whose memory is asked for by recipe. Each graph is sized once.

    files: graph name -> portable ONNX file, as `mmi export` writes it, weights not needed.
    context: slots of the KV cache that they were exported with. limits: what is to be allowed,
    fewer images, rows or slots need less.
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
        # As the runtime plans it: the engine of cached denoising is for --full-every alone.
        self.files = {name: path for name, path in files.items() if name != SHALLOW}
        self.contract = graphs(config, limits)

    @cached_property
    def sized(self) -> dict[str, Sized]:
        """Every graph at the greatest sizes that its engine allows, with the logits of one
        position and no more tokens than are allowed."""
        found = {}
        for name, contract in self.exported_contract.items():
            if name not in self.files:
                continue
            path, ranges = self.files[name], profiles(self.contract[name])[0].ranges
            sizes = {letter: allowed.max for letter, allowed in ranges.items()}
            if "w" in sizes:
                sizes["w"] = 1
            found[name] = sized(read_graph(path), contract, sizes)
        return found

    def memory(self, recipe: Recipe, resident: Sequence[str] | None = None) -> Memory:
        """What it all takes with `recipe`; raises `ConfigError` for a group that there is not."""
        stay = _groups(None if resident is None else tuple(resident))
        if recipe.name not in self._everything:
            self._everything[recipe.name] = self._count(recipe)
        return replace(self._everything[recipe.name], resident=stay)

    def _count(self, recipe: Recipe) -> Memory:
        needs = []
        for name, graph in self.sized.items():
            storage = storage_of(graph, self.contract[name], recipe, self.runtime)
            needs.append(GraphMemory(name, weight_bytes(graph, storage), workspace(graph, storage)))
        typed = {
            name: graph.typed(recipe.activations_on(self.runtime))
            for name, graph in self.contract.items()
        }
        seen = min(self.config.image_decoder.mmfs.images_seen, self.limits.images)
        documents = {
            what: size * self.limits.batch
            for what, size in document_bytes(typed, self.limits, seen).items()
        }
        return Memory(recipe.name, tuple(needs), documents, None)

    def recipe_for(self, budget: int) -> Choice:
        """The most faithful recipe whose `Memory.total` is within `budget` bytes, with all engines
        in memory if there is one, else with as many as possible. Raises `ConfigError` that says
        what the smallest would need."""
        least: Memory | None = None
        for resident in TURNS:
            for name in BACKENDS[self.runtime].precisions:
                memory = self.memory(RECIPES[name], resident)
                if memory.total <= budget:
                    return Choice(name, resident, memory, budget - memory.total)
                if least is None or memory.total < least.total:
                    least = memory
        assert least is not None
        raise ConfigError(
            f"no recipe fits {self.config.name} into {readable(budget)}",
            expected=f"at least {readable(least.total)} ({least.recipe}, engines in turns)",
            fix=f"allow fewer than {self.limits.context} tokens (--context) or "
            f"{self.limits.images} images (--images)",
        )


def _groups(resident: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Each once; raises `ConfigError` for a group that there is not."""
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
    """`Model.recipe_for` for those who ask once. budget: bytes that are free for us."""
    return Model(config, files, context, limits, runtime).recipe_for(budget)


def weight_bytes(graph: Sized, storage: Storage) -> int:
    """Every weight once, as `storage` keeps it."""
    return sum(storage.bytes(value) for value in graph.weights)


def workspace(graph: Sized, storage: Storage) -> int:
    """The greatest sum of values between inputs and outputs that live at once, in bytes."""
    own: dict[str, Value] = {}
    """Values by name, as the ones whose memory they use."""
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
    """`bound`: values that lie in the memory of the graph's outputs."""
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
    """`limits` with what was asked for instead; raises `ConfigError` for less than one."""
    for name, asked in (("context", context), ("batch", batch), ("images", images)):
        if asked is not None:
            if asked < 1:
                raise ConfigError(f"--{name} must be at least 1", got=asked)
            limits = replace(limits, **{name: asked})
    return limits


def parse_bytes(text: str) -> int:
    """`24GB`, `512 MB` or `8GiB` in bytes; raises `ConfigError`."""
    word = text.strip().upper().removesuffix("B")
    unit = word.lstrip("0123456789. ")
    with suppress(ValueError, OverflowError):
        found = round(float(word.removesuffix(unit)) * _UNITS.get(unit, 0))
        if found > 0:
            return found
    raise ConfigError(
        f"{text!r} is no amount of memory", fix="for example --fit 24GB, or the name of a GPU"
    )
