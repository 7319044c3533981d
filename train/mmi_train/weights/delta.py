"""Deltas: the weights in which a model folder differs from its base, in a folder of their own.

`delta.safetensors` holds them as they are in the model, so that applying a delta restores the
model's values exactly. With 8 bits a value, `differences.safetensors` holds the difference of each
matrix and convolution from the base, as integers with a scale for each row, and
`delta.safetensors` the rest. `config.json` is the model's, and `delta.json` names the base by a
checksum of all its weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from mmi_deploy.errors import WeightsError
from mmi_deploy.spec.config import ModelConfig, read_config, to_json
from mmi_deploy.system.files import write_file
from mmi_deploy.system.progress import Progress, silent
from mmi_train.weights.lazy_tensor import Computed, InFile, StoredTensor
from mmi_train.weights.model_folder import (
    CONFIG,
    TOKENIZER,
    WEIGHTS,
    base_of,
    check_base,
    check_fits,
    fingerprint,
    read_about,
)
from mmi_train.weights.safetensors_files import load_tensors, read_safetensors
from mmi_train.weights.writer import NAMES, write_safetensors

DELTA = "delta.safetensors"
DIFFERENCES = "differences.safetensors"
ABOUT = "delta.json"

# Kind of a folder of a delta in the marker of output folders.
DELTA_KIND = "delta"

# Ending of the name of a difference's scales.
_SCALE = ".scale"

# Largest integer of a difference.
_MOST = 127


@dataclass(frozen=True)
class Difference:
    """Difference of a tensor from that of the base: integers [rows, ...] in 8 bits, times the scale
    [rows] of their row."""

    integers: Tensor
    scale: Tensor

    def added_to(self, base: StoredTensor) -> Tensor:
        """The tensor of the model, in fp32, nearly."""
        rows = self.scale.reshape(-1, *[1] * (self.integers.dim() - 1))
        return base.read().float() + rows * self.integers.float()


@dataclass(frozen=True)
class Delta:
    """Weights of a model that are not those of its base, as they are or as differences, and its
    configuration. `base`: fingerprint of the whole base."""

    base: str
    config: ModelConfig
    weights: Mapping[str, StoredTensor] = field(repr=False)
    differences: Mapping[str, Difference] = field(default_factory=dict, repr=False)

    def save(self, folder: Path) -> None:
        """Write the files of a delta folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / DELTA, self.weights)
        if self.differences:
            stored = {name: one.integers for name, one in self.differences.items()}
            stored |= {name + _SCALE: one.scale for name, one in self.differences.items()}
            write_file(folder / DIFFERENCES, save(stored))
        write_file(folder / CONFIG, to_json(self.config))
        write_file(folder / ABOUT, json.dumps({"base": self.base}, indent=2) + "\n")

    def changed(self, base: Path) -> Mapping[str, StoredTensor]:
        """The weights to put in the place of those of the model folder `base`. Raises
        `WeightsError` for another base."""
        check_base(base, self.base, "weights of the delta", whole=True)
        stored = read_safetensors(base / WEIGHTS)
        found = dict(self.weights)
        for name, one in self.differences.items():
            if name not in stored or stored[name].shape != one.integers.shape:
                raise WeightsError(f"{base} has no tensor for the difference {name}")
            whole = partial(one.added_to, stored[name])
            found[name] = Computed(one.integers.shape, torch.float32, whole)
        return found


def make_delta(
    base: Path, model: Path, progress: Progress = silent, *, int8: bool = False
) -> Delta:
    """Compare two model folders, a tensor at a time. int8: keep matrices and convolutions as
    differences in 8 bits, which are rounded. Raises `WeightsError` if the models differ in more
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
    changed: dict[str, StoredTensor] = {}
    differences: dict[str, Difference] = {}
    for index, (name, tensor) in enumerate(new.items()):
        progress("comparing weights", index, len(new))
        if torch.equal(_bits(tensor), _bits(old[name])):
            continue
        if int8 and len(tensor.shape) > 1:
            differences[name] = _rounded(tensor.read().float() - old[name].read().float())
        else:
            changed[name] = tensor
    progress("comparing weights", len(new), len(new))
    return Delta(fingerprint(base, whole=True), config, changed, differences)


def _rounded(difference: Tensor) -> Difference:
    scale = difference.flatten(1).abs().amax(1) / _MOST
    rows = scale.clamp(min=torch.finfo(torch.float32).tiny)
    integers = (difference / rows.reshape(-1, *[1] * (difference.dim() - 1))).round()
    return Difference(integers.to(torch.int8), scale)


def read_delta(folder: Path) -> Delta:
    """Read what `Delta.save` wrote; raises `WeightsError` and `ConfigError`."""
    base = base_of(read_about(folder / ABOUT, "delta"), folder / ABOUT, "delta")
    config, weights = read_config(folder / CONFIG), read_safetensors(folder / DELTA)
    return Delta(base, config, dict(weights), _read_differences(folder / DIFFERENCES))


def _read_differences(path: Path) -> dict[str, Difference]:
    if not path.is_file():
        return {}
    stored = load_tensors(path)
    found = {}
    for name, integers in stored.items():
        if name.endswith(_SCALE):
            continue
        scale = stored.get(name + _SCALE)
        if (
            scale is None
            or (integers.dtype, scale.dtype) != (torch.int8, torch.float32)
            or scale.shape != integers.shape[:1]
        ):
            raise WeightsError(
                f"{path}: the difference {name} is damaged",
                expected="int8 values with a float32 scale for each row",
            )
        found[name] = Difference(integers, scale)
    return found


def _kind(tensor: InFile | None) -> str:
    if tensor is None:
        return "no such weight"
    return f"{list(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}"


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _bits(tensor: InFile) -> Tensor:
    """Bytes of the values: 0 is not -0."""
    return tensor.read().contiguous().flatten().view(torch.uint8)
