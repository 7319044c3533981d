"""GPU memory of engines and one document, computed before any of it is allocated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.buffers import element_type
from mmi_deploy.spec.graphs import DEEP, Graph, Limits, Tensor
from mmi_deploy.system.files import size as readable

# Engine that only `--full-every` uses, so no plan counts it.
SHALLOW = "denoise_shallow"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the GPU.

    weights: resident engines, by name. swapped: groups of engines of which one is loaded at a time.
    caches: buffers of one document. workspace: scratch block that engines share, at their largest
    shapes; None before they are loaded. free: free memory when the plan was made. device: name of
    the GPU. capacity: its whole memory, 0 where that is not known. contexts: an estimate of what
    contexts and recordings of all engines take. build: command that builds the engines, for those
    whose rows are limited.
    """

    weights: Mapping[str, int]
    swapped: Mapping[str, int]
    caches: Mapping[str, int]
    workspace: int | None
    free: int
    device: str = ""
    capacity: int = 0
    contexts: int = 0
    build: str = ""

    @property
    def total(self) -> int:
        """Peak: everything at once, with the largest of the groups that are swapped."""
        together = sum(self.weights.values()) + max(self.swapped.values(), default=0)
        return together + sum(self.caches.values()) + (self.workspace or 0) + self.contexts

    def lines(self) -> list[str]:
        """Lines of a table for the console."""
        rows = [(f"weights of {name}", size) for name, size in self.weights.items()]
        rows += [(f"weights of {name}, in turns", size) for name, size in self.swapped.items()]
        rows += list(self.caches.items())
        if self.workspace is not None:
            rows.append(("workspace that engines share", self.workspace))
        if self.contexts:
            rows.append(("contexts and recordings, an estimate", self.contexts))
        rows += [("total, at the peak", self.total), ("free on the GPU", self.free)]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {readable(size):>9}" for name, size in rows]
        if self.workspace is None:
            lines.append("plus the engines' workspace, which is known once they are loaded")
        return lines

    def check(self) -> None:
        """Raise `EngineError` if the total exceeds the free memory."""
        if self.total <= self.free:
            return
        fix = (
            "keep fewer engines resident, as with --resident llm, or build smaller ones "
            "with `mmi build --precision int8` or int4"
        )
        if self.total <= self.capacity:  # it is occupied, not too small
            taken = readable(self.capacity - self.free)
            fix = (
                f"other programs hold {taken} of it: stop them (nvidia-smi lists them), choose "
                f"another GPU with --device, or {fix}"
            )
        raise EngineError(
            "the GPU has too little free memory for this bundle",
            expected=f"{readable(self.total)} and the engines' workspace",
            got=readable(self.free),
            fix=fix,
        )


def document_bytes(
    graphs: Mapping[str, Graph], limits: Limits, images: int, rows: int = 1
) -> dict[str, int]:
    """Bytes of a `Session`'s buffers for one document, by kind. images: images that the U-Net
    may see. rows: of the KV cache, for as many beams."""
    llm, step = graphs["llm"], graphs["denoise_step"]
    cached = set(llm.in_place.values())
    sizes = {"b": 1, "t": 1, "w": 1, "v": 1}
    decoded = sizes | {"b": rows}
    drawing = [
        *(step[name] for name in ("latents", "history", "next_latents", "next_history", "noise")),
        step[DEEP],
        step[DEEP],  # as an output, before it is copied into the row
        *graphs["image_condition"].outputs,
        graphs["vae_decoder"]["pixels"],
    ]
    seen = [graphs["vision_encoder"]["features"], *graphs["unet_values"].outputs]
    values = _bytes(graphs["llm_values"].outputs, {"n": limits.images})
    return {
        "KV cache": _bytes((t for t in llm.inputs if t.name in cached), decoded),
        "image values": values + _bytes(seen, {"n": images}),
        "hidden states": _bytes([llm["hidden"]], {"b": 1, "t": limits.context}),
        "one token": _bytes([llm["hidden"], llm["logits"]], decoded),
        "images being encoded": _bytes(
            [llm["visual_tokens"], graphs["vision_encoder"]["features"]],
            {"v": limits.context, "n": limits.batch},
        ),
        "a picture being drawn": _bytes(drawing, sizes),
    }


def _bytes(tensors: Iterable[Tensor], sizes: Mapping[str, int]) -> int:
    return sum(
        prod(tensor.resolve(**sizes)) * element_type(tensor.dtype).itemsize for tensor in tensors
    )
