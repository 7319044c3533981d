"""Plan of an export: layout, scope of the proof, and bytes of weights, disk and memory."""

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

# Storage of weights in the bundle. `fused`: copied in float32, the fastest form on a CPU. `linked`:
# weights that folding leaves unchanged stay in the model's own files, in their type; the
# bundle holds hard links to these files.
Layout = Literal["fused", "linked"]

# Graphs that are run and compared with the model: the exported ones, those of a small model of the
# same structure, or none.
Scope = Literal["full", "slice", "none"]

# Bytes of weights above which they are linked rather than copied.
LINKED_FROM = 2 * 10**9

# Gigabytes that an export of a large model holds even if no weight is in memory: Python, torch, and
# the traced graphs, hundreds of thousands of small objects.
_BASE = 1.1

# Bytes per element of the language model's square matrices while one is folded in float64: the
# matrix as stored, in float32 and in float64, and the products.
_FOLDING = 32

_FLOAT32 = 4


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes. `linked`: weights that stay in the model's files. `computed`: all other
    weights of the bundle. `disk`: free disk that the bundle takes. `memory`: estimated peak.
    `copies`: linked files are on another disk and have to be copied."""

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
        """Raise `MmiError` if the free disk is too small."""
        if self.disk > self.disk_free:
            raise MmiError(
                "the bundle does not fit on the disk",
                expected=size(self.disk),
                got=f"{size(self.disk_free)} free",
                fix="free some disk"
                + (
                    ", or write to the disk of the model, where links suffice"
                    if self.copies
                    else ""
                ),
            )

    def to_json(self) -> dict[str, Any]:
        """Plan as JSON."""
        return asdict(self)


def plan_export(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    stored: StoredWeights,
    out_folder: Path,
    layout: Layout | None,
    scope: Scope | None,
) -> Plan:
    """Plan the export of the weights in `stored`. `layout`, `scope`: None to choose them here."""
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
            "the model is too large for a full proof on this machine",
            expected=f"{full / 1e9:.0f} GB of free memory",
            got=f"{available / 1e9:.0f} GB",
            fix="omit --prove, or give --prove slice",
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
    """Bytes of folded weights in float32: MMFS and its values, the null condition, and tables of
    positions."""
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
