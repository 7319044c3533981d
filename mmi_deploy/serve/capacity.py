"""Capacity of a service: slots and image rows that fit into the memory."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.runtime.buffers import element_type
from mmi_deploy.runtime.memory_plan import document_bytes
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.graphs import Tensor
from mmi_deploy.system.files import size as readable
from mmi_deploy.system.memory import free_memory

# Bytes of encoded images to keep, unless the caller says otherwise.
IMAGE_MEMORY = 4 << 30

# Share of the free memory of a host that slots may take.
HOST_SHARE = 0.5


def image_rows(runtime: Runtime, image_memory: int | None) -> int:
    """Number of images to keep encoded: as many as `image_memory` bytes hold, at most the pool of
    the graphs, of which one row stays empty. Raises `ConfigError` if not even one fits."""
    size = _image_bytes(runtime)
    rows = (IMAGE_MEMORY if image_memory is None else image_memory) // size
    if rows < 1 and image_memory is not None:
        raise ConfigError(
            "the memory for images does not hold one",
            expected=f"at least {readable(size)}",
            got=readable(image_memory),
        )
    return max(min(rows, runtime.limits.pool - 1), 1)


def slot_count(runtime: Runtime, slots: int | None, images: int) -> int:
    """Number of slots: `slots`, or as many as fit beside the engines and `images` encoded images,
    at most the rows of one run. Raises `ConfigError` for less than one, `EngineError` if not even
    one fits on the device."""
    if slots is not None:
        if slots < 1:
            raise ConfigError("slots is out of range", expected="1 or more", got=slots)
        return slots
    most = runtime.limits.batch
    graphs = runtime.graphs
    seen = min(graphs["denoise_step"].ranges["m"].max, runtime.limits.images)
    document = document_bytes(graphs, runtime.limits, seen)
    # A slot has its caches and a row of the pictures; images are pooled.
    each = sum(size for kind, size in document.items() if kind != "image values")
    each += seen * _bytes(graphs["unet_values"].outputs, n=1)
    plan = runtime.backend.plan()
    if plan is None:
        return max(min(int(HOST_SHARE * free_memory(swap=False)) // each, most), 1)
    engines = plan.total - sum(plan.caches.values())
    left = plan.free - engines - images * _image_bytes(runtime)
    fit = left // each
    if fit < 1:
        raise EngineError(
            "the GPU has too little free memory for one slot beside the encoded images",
            expected=readable(each),
            got=readable(max(left, 0)),
            fix="keep fewer images or fewer engines resident",
        )
    return int(min(fit, 4 * most))


def _image_bytes(runtime: Runtime) -> int:
    """Bytes of an image in the pool."""
    encoder = runtime.graphs["vision_encoder"]
    values = runtime.graphs["llm_values"].outputs
    return _bytes([*values, encoder["visual_tokens"], encoder["features"]], n=1)


def _bytes(tensors: Iterable[Tensor], **sizes: int) -> int:
    return sum(
        prod(tensor.resolve(**sizes)) * element_type(tensor.dtype).itemsize for tensor in tensors
    )
