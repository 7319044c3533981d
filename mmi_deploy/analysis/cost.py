"""Cost of a graph: FLOPs, bytes and roofline time, node by node and in total.

Two counts of bytes:

* *node by node*: every node reads its inputs from memory and writes its outputs there. The traffic
  of a runtime without fusion.
* *floor*: weights and the graph's inputs are read once (of tables, pools and caches only the part
  in use), its outputs are written once (of a cache only the new rows), and intermediate values
  never leave the chip. No implementation of the graph moves less.

The roofline time is the maximum of bytes / bandwidth, matrix FLOPs / rate of the tensor cores, and
vector FLOPs / rate of the fp32 units. It is a lower bound, computed and not measured.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mmi_deploy.analysis.flop_rules import IN_PLACE, VIEWS, Work, work
from mmi_deploy.analysis.gpu_specs import Gpu
from mmi_deploy.analysis.shapes import INPUT, WEIGHT, SizedGraph, Step, Value, read_graph, sized
from mmi_deploy.analysis.stored_bytes import Storage, as_in_file, storage_of
from mmi_deploy.spec.backends import TENSORRT
from mmi_deploy.spec.graphs import Graph, chosen_sizes
from mmi_deploy.targets.precision.recipes import Recipe


@dataclass(frozen=True)
class NodeCost:
    """Cost of one node. matrix, vector: FLOPs. module: of its weights, or else of its inputs.
    bytes: node by node."""

    name: str
    operator: str
    module: str
    matrix: int
    vector: int
    bytes: int


@dataclass(frozen=True)
class Total:
    """Sum over several nodes."""

    nodes: int
    matrix: int
    vector: int
    bytes: int

    @property
    def flops(self) -> int:
        return self.matrix + self.vector


@dataclass(frozen=True)
class GraphCost:
    """Cost of a graph at given sizes. weight_bytes, input_bytes, output_bytes: parts of the
    floor."""

    graph: str
    sizes: Mapping[str, int]
    storage: str
    compute: str
    nodes: tuple[NodeCost, ...]
    weight_bytes: int
    input_bytes: int
    output_bytes: int

    @property
    def total(self) -> Total:
        return _total(self.nodes)

    @property
    def floor_bytes(self) -> int:
        return self.weight_bytes + self.input_bytes + self.output_bytes

    @property
    def intensity(self) -> float:
        """FLOPs per byte of the floor."""
        return self.total.flops / max(self.floor_bytes, 1)

    def by_operator(self) -> dict[str, Total]:
        """Totals by operator, most FLOPs first."""
        return self._by(lambda node: node.operator)

    def by_module(self) -> dict[str, Total]:
        """Totals by module, layers of one kind together, most FLOPs first."""
        return self._by(lambda node: node.module)

    def _by(self, key: Callable[[NodeCost], str]) -> dict[str, Total]:
        groups: dict[str, list[NodeCost]] = defaultdict(list)
        for node in self.nodes:
            groups[key(node)].append(node)
        totals = {name: _total(nodes) for name, nodes in groups.items()}
        return dict(sorted(totals.items(), key=lambda item: (-item[1].flops, -item[1].bytes)))

    def seconds(self, gpu: Gpu) -> float:
        """Roofline time of the whole graph, by its floor and FLOPs."""
        return max(self._times(gpu).values())

    def bound(self, gpu: Gpu) -> str:
        """Limiting resource of the roofline: `memory`, `matrix` or `vector`."""
        times = self._times(gpu)
        return max(times, key=times.__getitem__)

    def _times(self, gpu: Gpu) -> dict[str, float]:
        total = self.total
        return {
            "memory": self.floor_bytes / gpu.bandwidth,
            "matrix": total.matrix / gpu.peak(self.compute),
            "vector": total.vector / gpu.vector,
        }

    def seconds_unfused(self, gpu: Gpu) -> float:
        """Sum of the roofline times of all nodes: the lower bound without fusion."""
        peak = gpu.peak(self.compute)
        return sum(
            max(node.bytes / gpu.bandwidth, node.matrix / peak, node.vector / gpu.vector)
            for node in self.nodes
        )


def _total(nodes: Iterable[NodeCost]) -> Total:
    nodes = tuple(nodes)
    return Total(
        len(nodes),
        sum(node.matrix for node in nodes),
        sum(node.vector for node in nodes),
        sum(node.bytes for node in nodes),
    )


def cost_of_file(
    path: Path,
    contract: Graph,
    given: Mapping[str, int],
    recipe: Recipe | None = None,
    runtime: str = TENSORRT,
) -> GraphCost:
    """Cost of the graph in `path` at `chosen_sizes`, in the file's own types, or as `recipe` stores
    it on `runtime`."""
    sizes = chosen_sizes(contract, given)
    graph = sized(read_graph(path), contract, sizes)
    if recipe is None:
        storage = as_in_file(graph)
    else:
        storage = storage_of(graph, contract, recipe, runtime)
    return cost(graph, sizes, storage)


def loop_invariant(graph: SizedGraph, costs: GraphCost, changing: Collection[str]) -> Total:
    """Total of the nodes that depend on none of the inputs `changing`: recomputed needlessly in a
    loop that changes only these."""
    depends = set(changing)
    for step in graph.steps:
        if any(value is not None and value.name in depends for value in step.inputs):
            depends |= {value.name for value in step.outputs}
    made_by = {step.node.name: step for step in graph.steps}
    return _total(
        node
        for node in costs.nodes
        if not any(value.name in depends for value in made_by[node.name].outputs)
    )


def cost(graph: SizedGraph, sizes: Mapping[str, int], storage: Storage) -> GraphCost:
    """Cost of `graph` with its values stored as in `storage`."""
    return _CostWalk(graph, storage).result(sizes)


class _CostWalk:
    """One walk over the nodes. sources: value -> weights and inputs that it only renames or
    unpacks; reading the value reads these."""

    def __init__(self, graph: SizedGraph, storage: Storage) -> None:
        self.graph, self.storage = graph, storage
        self.sources: dict[str, tuple[Value, ...]] = {
            value.name: (value,) for value in (*graph.inputs, *graph.weights)
        }
        self.modules = {value.name: _module(value.name) for value in graph.weights}
        # Weight or input -> most bytes of it that one of its readers reads.
        self.touched: dict[str, int] = defaultdict(int)
        self.nodes: list[NodeCost] = []

    def result(self, sizes: Mapping[str, int]) -> GraphCost:
        for step in self.graph.steps:
            self._count(step)
        floor = {
            origin: sum(self.touched[value.name] for value in values)
            for origin, values in ((WEIGHT, self.graph.weights), (INPUT, self.graph.inputs))
        }
        return GraphCost(
            self.graph.name,
            dict(sizes),
            self.storage.name,
            self.storage.compute,
            tuple(self.nodes),
            floor[WEIGHT],
            floor[INPUT],
            self._written(),
        )

    def _count(self, step: Step) -> None:
        module = self._module_of(step)
        for output in step.outputs:
            self.modules[output.name] = module
        if _is_free(step):
            kept = [value for value in step.inputs if value is not None]
            renamed = kept if step.outputs and step.outputs[0].constant else kept[:1]
            for output in step.outputs:
                self.sources[output.name] = tuple(
                    source for value in renamed for source in self._sources(value)
                )
            return
        found = work(step)
        moved = self._bytes_read(step, found) + self._bytes_written(step, found)
        place = IN_PLACE.get(step.operator)
        if place is not None:
            self.sources[step.outputs[0].name] = self._sources(step.input(place))
        node = NodeCost(step.node.name, step.operator, module, found.matrix, found.vector, moved)
        self.nodes.append(node)

    def _sources(self, value: Value) -> tuple[Value, ...]:
        return self.sources.get(value.name, (value,))

    def _bytes_read(self, step: Step, found: Work) -> int:
        read = 0
        for index, value in enumerate(step.inputs):
            if value is None or not value.elements:
                continue
            part = min(found.touched.get(index, value.elements) / value.elements, 1.0)
            for source in self._sources(value):
                share = round(self.storage.bytes(source) * part)
                self.touched[source.name] = max(self.touched[source.name], share)
                read += share
        return read

    def _bytes_written(self, step: Step, found: Work) -> int:
        whole = sum(self.storage.bytes(value) for value in step.outputs)
        if found.written is None:
            return whole
        elements = sum(value.elements for value in step.outputs)
        return round(whole * found.written / max(elements, 1))

    def _written(self) -> int:
        """Bytes of the graph's outputs; of one written in place only the new rows."""
        makers = {value.name: step for step in self.graph.steps for value in step.outputs}
        written = 0
        for value in self.graph.outputs:
            step = makers.get(value.name)
            if step is not None and step.operator in IN_PLACE:
                written += self._bytes_written(step, work(step))
            else:
                written += self.storage.bytes(value)
        return written

    def _module_of(self, step: Step) -> str:
        """Module of the first weight that a node reads, else of its first input with a module."""
        names = [value.name for value in step.inputs if value is not None]
        for value in step.inputs:
            if value is not None and value.constant:
                for source in self._sources(value):
                    if source.origin == WEIGHT and _module(source.name):
                        return _module(source.name)
        return next((self.modules[name] for name in names if self.modules.get(name)), "")


def _is_free(step: Step) -> bool:
    """Return True if a node computes nothing at run time: a view, shape arithmetic, or a function
    of weights alone, which is folded or computed while the weight is read."""
    known = all(value.data is not None or value.constant for value in step.outputs)
    return step.operator in VIEWS or known


def _module(weight: str) -> str:
    """`llm.layers.7.mlp.down_proj.weight` -> `llm.layers.*.mlp.down_proj`."""
    parts = weight.removesuffix(".transposed").split(".")
    return ".".join(re.sub(r"^\d+$", "*", part) for part in parts[:-1])
