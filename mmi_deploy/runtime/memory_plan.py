"""What a document takes of a GPU's memory, before any of it is taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.buffers import element_type
from mmi_deploy.spec.graphs import DEEP, Graph, Limits, Tensor
from mmi_deploy.system.files import size as readable

SHALLOW = "denoise_shallow"
"""The engine that only documents with `--full-every` need."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the GPU. weights: engines at a time, by name. caches: what one document keeps.
    workspace: the scratch block that engines share, None until they are loaded. free: what the GPU
    had left. device: the GPU's name."""

    weights: Mapping[str, int]
    guests: Mapping[str, int]
    caches: Mapping[str, int]
    workspace: int | None
    free: int
    device: str = ""

    @property
    def total(self) -> int:
        """All that is there at once; of the engines that take turns, the largest group."""
        together = sum(self.weights.values()) + max(self.guests.values(), default=0)
        return together + sum(self.caches.values()) + (self.workspace or 0)

    def lines(self) -> list[str]:
        """A table for people."""
        rows = [(f"weights of {name}", size) for name, size in self.weights.items()]
        rows += [(f"weights of {name}, in turns", size) for name, size in self.guests.items()]
        rows += list(self.caches.items())
        if self.workspace is not None:
            rows.append(("workspace that engines share", self.workspace))
        rows += [("in all, at once", self.total), ("free on the GPU", self.free)]
        width = max(len(name) for name, _ in rows)
        told = [f"{name:<{width}}  {readable(size):>9}" for name, size in rows]
        if self.workspace is None:
            told.append("and the engines' workspace, which is known when they are loaded")
        return told

    def check(self) -> None:
        """Raise `EngineError` where there is not enough."""
        if self.total > self.free:
            raise EngineError(
                "the GPU has too little free memory for this bundle",
                expected=f"{readable(self.total)} and the engines' workspace",
                got=readable(self.free),
                fix="keep fewer engines in it, as with --resident llm, or build smaller ones "
                "with `mmi build --precision int8` or int4",
            )


def document_bytes(graphs: Mapping[str, Graph], limits: Limits, images: int) -> dict[str, int]:
    """What a `Session` keeps for one document, by what it is. images: rows of the U-Net's pool."""
    llm, values, step = graphs["llm"], graphs["image_values"], graphs["denoise_step"]
    cached = set(llm.in_place.values())
    sizes = {"b": 1, "t": 1, "w": 1, "v": 1}
    drawing = [
        *(step[name] for name in ("latents", "history", "next_latents", "next_history", "noise")),
        step[DEEP],
        *graphs["image_condition"].outputs,
    ]
    pools = {name: limits.images for name in values.names("llm_value")}
    pools |= {name: images for name in values.names("unet_value")}
    return {
        "KV cache": _bytes((t for t in llm.inputs if t.name in cached), sizes),
        "image values": sum(_bytes([values[name]], {"n": rows}) for name, rows in pools.items()),
        "hidden states": _bytes([llm["hidden"]], {"b": 1, "t": limits.context}),
        "one token": _bytes([llm["hidden"], llm["logits"], llm["visual_tokens"]], sizes),
        "a picture being drawn": _bytes(drawing, sizes),
    }


def _bytes(tensors: Iterable[Tensor], sizes: Mapping[str, int]) -> int:
    return sum(
        prod(tensor.resolve(**sizes)) * element_type(tensor.dtype).itemsize for tensor in tensors
    )
