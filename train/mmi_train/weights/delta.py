"""Deltas: the weights in which a model folder differs from its base, in a folder of their own.

`delta.safetensors` holds them as they are in the model, not as differences, so that applying a
delta restores the model's values exactly; `config.json` is the model's, and `delta.json` names the
base by a checksum of all its weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from mmi_deploy.errors import WeightsError
from mmi_deploy.spec.config import ModelConfig, first_flaw, read_config, to_json
from mmi_deploy.system.files import write_file
from mmi_deploy.system.progress import Progress, silent
from mmi_train.weights.lazy_tensor import InFile, StoredTensor
from mmi_train.weights.model_folder import (
    CONFIG,
    TOKENIZER,
    WEIGHTS,
    check_base,
    check_fits,
    fingerprint,
    is_fingerprint,
)
from mmi_train.weights.safetensors_files import read_safetensors
from mmi_train.weights.writer import NAMES, write_safetensors

DELTA = "delta.safetensors"
ABOUT = "delta.json"

# Kind of a folder of a delta in the marker of output folders.
DELTA_KIND = "delta"


@dataclass(frozen=True)
class Delta:
    """Weights of a model that are not those of its base, and its configuration. `base`: fingerprint
    of the whole base."""

    base: str
    config: ModelConfig
    weights: Mapping[str, StoredTensor] = field(repr=False)

    def save(self, folder: Path) -> None:
        """Write the three files of a delta folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / DELTA, self.weights)
        write_file(folder / CONFIG, to_json(self.config))
        write_file(folder / ABOUT, json.dumps({"base": self.base}, indent=2) + "\n")

    def changed(self, base: Path) -> Mapping[str, StoredTensor]:
        """The weights to put in the place of those of the model folder `base`. Raises
        `WeightsError` for another base."""
        check_base(base, self.base, "weights of the delta", whole=True)
        return self.weights


def make_delta(base: Path, model: Path, progress: Progress = silent) -> Delta:
    """Compare two model folders, a tensor at a time. Raises `WeightsError` if they differ in more
    than values: in names, shapes or types of weights, or in the tokenizer."""
    old, new = read_safetensors(base / WEIGHTS), read_safetensors(model / WEIGHTS)
    fix = "give the model folder that the training started from"
    for name in sorted(old.keys() | new.keys()):
        kinds = [_kind(weights.get(name)) for weights in (old, new)]
        if kinds[0] != kinds[1]:
            raise WeightsError(
                f"{model} differs from {base} in more than values",
                expected=f"{name}: {kinds[0]}",
                got=kinds[1],
                fix=fix,
            )
        if new[name].dtype not in NAMES:
            raise WeightsError(f"{name} is {kinds[1]}", expected="float32, float16 or bfloat16")
    if _bytes(base / TOKENIZER) != _bytes(model / TOKENIZER):
        raise WeightsError(f"{model} has another tokenizer than {base}", fix=fix)
    config = read_config(model / CONFIG)
    check_fits(config, new, str(model))
    changed = {}
    for index, (name, tensor) in enumerate(new.items()):
        progress("comparing weights", index, len(new))
        if not torch.equal(_bits(tensor), _bits(old[name])):
            changed[name] = tensor
    progress("comparing weights", len(new), len(new))
    return Delta(fingerprint(base, whole=True), config, changed)


def read_delta(folder: Path) -> Delta:
    """Read what `Delta.save` wrote; raises `WeightsError` and `ConfigError`."""
    try:
        about = TypeAdapter(dict[str, Any]).validate_json((folder / ABOUT).read_bytes())
    except OSError as error:
        raise WeightsError(f"cannot read {folder / ABOUT}: {error.strerror}") from None
    except ValidationError as error:
        raise WeightsError(f"{folder / ABOUT} describes no delta: {first_flaw(error)}") from None
    if not is_fingerprint(base := about.get("base")):
        raise WeightsError(f"{folder / ABOUT} describes no delta: base is no checksum")
    return Delta(base, read_config(folder / CONFIG), dict(read_safetensors(folder / DELTA)))


def _kind(tensor: InFile | None) -> str:
    if tensor is None:
        return "no such weight"
    return f"{list(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}"


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _bits(tensor: InFile) -> Tensor:
    """Bytes of the values: 0 is not -0."""
    return tensor.read().contiguous().flatten().view(torch.uint8)
