"""What an export will take, known before it starts: weights, disk and memory."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from mmi_deploy.errors import ConfigError, MmiError
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.system.files import size
from mmi_deploy.system.memory import free_memory
from mmi_export.tracing.stored_weights import StoredWeights, can_link

Layout = Literal["fused", "linked"]
"""How weights lie in the bundle. `fused`: copied in float32, as the fastest graph on a CPU wants
them. `linked`: whatever folding leaves as it is stays in the model's own files and their type, to
which the bundle holds hard links."""

Scope = Literal["full", "slice", "none"]
"""What is run to prove the graphs: they themselves, the same code at a smaller size, or nothing."""

LINKED_FROM = 2 * 10**9
"""Bytes of weights above which they are linked rather than copied."""

_BASE = 1.1
"""Gigabytes that an export of a large model holds however few of its weights are in memory: Python,
torch, and the graphs that are traced, hundreds of thousands of small objects."""

_FOLDING = 32
"""Bytes per number of the language model's square matrices while one is folded in float64: the
matrix as stored, in float32 and in float64, and the products."""

_FLOAT32 = 4


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes. `linked`: weights that stay where they are. `computed`: what the bundle holds
    besides. `disk`: what must be free where the bundle is written. `memory`: the greatest that the
    export is expected to hold."""

    layout: Layout
    scope: Scope
    weights: int
    linked: int
    computed: int
    disk: int
    disk_free: int
    memory: int
    copies: bool

    def check_room(self) -> None:
        """Raise `MmiError` where the disk is too small, before any work."""
        if self.disk > self.disk_free:
            raise MmiError(
                "the bundle does not fit on the disk",
                expected=size(self.disk),
                got=f"{size(self.disk_free)} that are free",
                fix="make room"
                + (", or write it on the disk of the model, where links do" if self.copies else ""),
            )

    def described(self) -> dict[str, Any]:
        """For a program that reads it."""
        return asdict(self)


def plan_export(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    stored: StoredWeights,
    out_folder: Path,
    layout: Layout | None,
    scope: Scope | None,
) -> Plan:
    """The plan for weights in `stored`; None lets it choose."""
    numbers = sum(tensor.numel() for tensor in weights.values())
    layout = layout or ("linked" if stored.bytes > LINKED_FROM else "fused")
    linked = stored.bytes if layout == "linked" else 0
    computed = folded_bytes(config) if layout == "linked" else numbers * _FLOAT32
    place = _existing(out_folder)
    copies = layout == "linked" and not all(can_link(file, place) for file in stored.files)
    base = int(_BASE * 1e9) + _FOLDING * config.llama.width**2
    full = base + 3 * numbers * _FLOAT32
    available = free_memory(swap=False)
    if scope is None:
        scope = "full" if full <= available else "slice"
    elif scope == "full" and full > available:
        raise ConfigError(
            "the model is too large to be proved whole on this machine",
            expected=f"{full / 1e9:.0f} GB of free memory",
            got=f"{available / 1e9:.0f} GB",
            fix="leave --prove out, or give --prove slice",
        )
    return Plan(
        layout=layout,
        scope=scope,
        weights=stored.bytes,
        linked=linked,
        computed=computed,
        disk=computed + (stored.bytes if copies else 0),
        disk_free=shutil.disk_usage(place).free,
        memory=full if scope == "full" else base,
        copies=copies,
    )


def folded_bytes(config: ModelConfig) -> int:
    """What folding makes of the weights, in float32: MMFS and its values, the null condition, and
    tables of positions."""
    unet, decoder = config.image_decoder.unet, config.image_decoder
    layers = [(config.llama.width, config.llm_mmfs)] * len(config.llama.mmfs_layers)
    layers += [(channels, decoder.mmfs) for channels, _ in unet.mmfs_maps]
    numbers = 0
    for width, mmfs in layers:
        offsets = mmfs.heads * mmfs.points * 2
        logits = mmfs.heads * mmfs.points * len(mmfs.levels)
        numbers += (offsets + logits) * (width + mmfs.images)  # queries, tables
        numbers += mmfs.value_width * (width + config.vision.width)  # output, values
    numbers += sum(channels * side**2 for channels, side in unet.mmfs_maps)  # positions of cells
    numbers += 2 * decoder.resampler.queries * sum(unet.cross_attention_widths)
    numbers += config.llama.context * config.llama.width
    numbers += sum(side**2 for side in config.vision.level_sides) * config.vision.width
    return numbers * _FLOAT32


def _existing(folder: Path) -> Path:
    """`folder` or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
