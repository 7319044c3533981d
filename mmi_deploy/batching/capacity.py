"""Capacity of a service: slots and image rows that fit into the memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.runtime.buffers import element_type
from mmi_deploy.runtime.memory_plan import MemoryPlan, document_bytes
from mmi_deploy.spec.graphs import Graph, Limits, Tensor
from mmi_deploy.system.files import size as readable
from mmi_deploy.system.memory import free_memory

# Bytes of encoded images to keep, unless the caller says otherwise.
IMAGE_MEMORY = 4 << 30

# Most slots for each row of a run on a device: while some documents draw, others write.
SLOTS_PER_ROW = 4

# Rows that `mmi export` allows by default: as many as slots are worth building for, up to these.
COMMON_ROWS = 8

# Share of the free memory of a host that slots may take.
HOST_SHARE = 0.5


@dataclass(frozen=True)
class Capacity:
    """slots: documents at once. images: encoded images that are kept."""

    slots: int
    images: int


def capacity(
    graphs: Mapping[str, Graph],
    limits: Limits,
    plan: MemoryPlan | None,
    slots: int | None = None,
    image_memory: int | None = None,
) -> Capacity:
    """Capacity of a service.

    plan: of the device's memory; None on the host. slots: None for as many as fit beside the
    engines and the images, at most the rows of one run, on a device `most_slots` of them.
    image_memory: bytes of encoded images; None for `IMAGE_MEMORY`, or what is left of it where a
    slot does not fit beside. Raises `ConfigError` for less than one slot or image, and for more
    slots than engines of a device are built for or a host has memory for; `EngineError` if not
    even one slot fits on the device.
    """
    if slots is not None and slots < 1:
        raise ConfigError("slots is out of range", expected="1 or more", got=slots)
    size = _image_bytes(graphs)
    if image_memory is not None and image_memory < size:
        raise ConfigError(
            "the memory for images does not hold one",
            expected=f"at least {readable(size)}",
            got=readable(image_memory),
        )
    # The pool of the graphs has one row more, which stays empty.
    rows = (IMAGE_MEMORY if image_memory is None else image_memory) // size
    images = max(min(rows, limits.pool - 1), 1)
    most = limits.batch if plan is None else most_slots(limits.batch)
    each = _slot_bytes(graphs, limits)
    if slots is not None:
        if plan is not None and slots > most:
            raise _too_many(slots, limits.batch, plan)
        if plan is None and slots * each > (free := free_memory()):
            raise ConfigError(
                f"{slots} slots need more memory than there is: {readable(slots * each)}",
                expected=f"at most {max(free // each, 1)} slots in {readable(free)}",
                fix="give fewer with --slots",
            )
        return Capacity(slots, images)
    if plan is None:
        fit = int(HOST_SHARE * free_memory(swap=False)) // each
        return Capacity(max(min(fit, most), 1), images)
    left = plan.free - (plan.total - sum(plan.caches.values()))
    while image_memory is None and images > 1 and left - images * size < each:
        images //= 2
    fit = (left - images * size) // each
    if fit < 1:
        raise EngineError(
            "the GPU has too little free memory for one slot beside the engines",
            expected=readable(each + images * size),
            got=readable(max(left, 0)),
            fix="keep fewer images or fewer engines resident",
        )
    return Capacity(int(min(fit, most)), images)


def most_slots(rows: int) -> int:
    """Most slots of a service on a device whose engines compute `rows` rows in a run. With one row
    documents share no run: one document is served at a time."""
    return SLOTS_PER_ROW * rows if rows > 1 else 1


def _too_many(slots: int, rows: int, plan: MemoryPlan) -> ConfigError:
    most, wanted = most_slots(rows), max(min(slots, COMMON_ROWS), -(-slots // SLOTS_PER_ROW))
    built = f"build them for more with `{plan.build} --rows {wanted}`, or " if plan.build else ""
    return ConfigError(
        f"{slots} slots are too many for engines that compute {rows} "
        f"row{'s' if rows > 1 else ''} in a run",
        expected=f"at most {most}",
        fix=f"{built}give --slots {most}",
    )


def _slot_bytes(graphs: Mapping[str, Graph], limits: Limits) -> int:
    """Bytes of a slot: its caches, and a row of the pictures with the images that it sees."""
    seen = min(graphs["denoise_step"].ranges["m"].max, limits.images)
    document = document_bytes(graphs, limits, seen)
    # Images and their encoding have memory of their own, which all slots share.
    shared = ("image values", "images being encoded")
    caches = sum(size for kind, size in document.items() if kind not in shared)
    return caches + seen * _bytes(graphs["unet_values"].outputs, n=1)


def _image_bytes(graphs: Mapping[str, Graph]) -> int:
    """Bytes of an image in the pool."""
    encoder, values = graphs["vision_encoder"], graphs["llm_values"].outputs
    return _bytes([*values, encoder["visual_tokens"], encoder["features"]], n=1)


def _bytes(tensors: Iterable[Tensor], **sizes: int) -> int:
    return sum(
        prod(tensor.resolve(**sizes)) * element_type(tensor.dtype).itemsize for tensor in tensors
    )
