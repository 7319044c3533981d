"""Documents at once on a GPU, computed: roofline times of the runs, and the slots that fit.

Nothing here is measured on a GPU. The time of a run is its roofline time (`GraphCost.seconds`)
plus the measured host time of a run (`mmi_bench.batch.host_time`), which does not overlap it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmi_bench.batch.host_time import HostTime
from mmi_deploy.analysis.cost import GraphCost, cost_of_file
from mmi_deploy.analysis.gpu_specs import Gpu
from mmi_deploy.analysis.memory_estimate import Model
from mmi_deploy.batching.capacity import Capacity, capacity
from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.memory_plan import MemoryPlan, document_bytes
from mmi_deploy.spec.graphs import Limits
from mmi_deploy.targets.precision.recipes import Recipe


@dataclass(frozen=True)
class AtOnce:
    """Documents at once on a GPU. seconds: of a decode run and a denoising step of all of them,
    host time included. limit: what bounds each of the two: memory, matrix or vector."""

    rows: int
    decode: float
    denoise: float
    host: HostTime
    limits: tuple[str, str]

    @property
    def tokens_per_second(self) -> float:
        return self.rows / self.decode

    @property
    def steps_per_second(self) -> float:
        return self.rows / self.denoise


def at_once(
    model: Model, recipe: Recipe, gpu: Gpu, rows: Sequence[int], hosts: Mapping[int, HostTime]
) -> list[AtOnce]:
    """Times of the runs of `rows` documents with full caches, each of which sees the images of the
    model's limits. model: with at least as many rows as batch."""
    found = []
    for count in rows:
        decode, step = _costs(model, recipe, count)
        host = hosts[count]
        found.append(
            AtOnce(
                count,
                decode.seconds(gpu) + host.decode,
                step.seconds(gpu) + host.denoise,
                host,
                (decode.bound(gpu), step.bound(gpu)),
            )
        )
    return found


def _costs(model: Model, recipe: Recipe, rows: int) -> tuple[GraphCost, GraphCost]:
    """Costs of a decode run and of a denoising step."""
    seen = model.limits.images

    def of(name: str, **sizes: int) -> GraphCost:
        contract = model.exported_contract[name]
        wanted = {**sizes, "b": rows, "n": rows * seen, "m": seen}
        given = {
            letter: min(count, contract.ranges[letter].max)
            for letter, count in wanted.items()
            if letter in contract.ranges
        }
        return cost_of_file(model.files[name], contract, given, recipe, model.runtime)

    return of("llm", t=1, w=1), of("denoise_step")


def slots_of(model: Model, recipe: Recipe, gpu: Gpu, pool: Limits) -> Capacity:
    """Capacity that `--slots auto` would take on `gpu`, with all engines in memory and their
    workspace. model: at the limits of the bundle, as engines are built for these. pool: limits of
    the bundle."""
    memory = model.memory(recipe)
    typed = {
        name: graph.typed(recipe.activations_on(model.runtime))
        for name, graph in model.exported_contract.items()
    }
    limits = replace(model.exported, pool=pool.pool, images=pool.images)
    seen = min(model.config.image_decoder.mmfs.images_seen, limits.images)
    plan = MemoryPlan(
        {graph.graph: graph.weights for graph in memory.graphs},
        {},
        document_bytes(typed, limits, seen),
        memory.workspace,
        gpu.room,
    )
    try:
        return capacity(typed, limits, plan)
    except EngineError:
        return Capacity(0, 1)


def to_json(found: Sequence[AtOnce], slots: Capacity) -> dict[str, Any]:
    """Rows and slots as JSON."""
    return {
        "slots": slots.slots,
        "images": slots.images,
        "at_once": [
            {
                "rows": one.rows,
                "decode_seconds": one.decode,
                "step_seconds": one.denoise,
                "host_decode_seconds": one.host.decode,
                "host_step_seconds": one.host.denoise,
                "tokens_per_second": one.tokens_per_second,
                "steps_per_second": one.steps_per_second,
                "bound_by": {"decode": one.limits[0], "denoise": one.limits[1]},
            }
            for one in found
        ],
    }
