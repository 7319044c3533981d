"""Golden files: recorded runs of the published code, a safetensors file with a JSON side-car each.

The tensors are `state.<published name>` (weights), `in.<name>` and `out.<name>`; `config` of the
side-car holds the configuration of the published modules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mmi_deploy.errors import MmiError, WeightsError
from mmi_train.weights.safetensors_files import load_tensors

KINDS = (
    "mmfs_llm",
    "mmfs_unet",
    "visual_tokenizer",
    "llama_mmfs",
    "sd_unet_mmfs",
    "full_forward",
    "full_generate_texts",
    "full_generate_scores",
    "full_generate_images",
)

_PARTS = ("state", "in", "out")


class UnitError(MmiError):
    """A golden file that is corrupt, incomplete or of a kind that this checker cannot run."""

    exit_code = 1


def kind_of(name: str) -> str | None:
    """The longest known kind that `name` starts with."""
    return max((kind for kind in KINDS if name.startswith(kind)), key=len, default=None)


@dataclass(frozen=True)
class Unit:
    """One golden run: configuration and weights of the published module, inputs and outputs."""

    name: str
    kind: str
    config: Mapping[str, Any]
    state: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]

    def input(self, name: str) -> Tensor:
        """The tensor `in.<name>`; raises `UnitError` if the file lacks it."""
        if name not in self.inputs:
            raise UnitError(f"lacks the tensor in.{name}")
        return self.inputs[name]

    def inputs_of(self, prefix: str) -> list[Tensor]:
        """The tensors `in.<prefix>.0`, `in.<prefix>.1`, ... in the order of their numbers."""
        found = {
            int(number): tensor
            for name, tensor in self.inputs.items()
            for head, _, number in [name.rpartition(".")]
            if head == prefix and number.isdecimal()
        }
        for number in range(len(found)):
            if number not in found:
                raise UnitError(f"lacks the tensor in.{prefix}.{number}")
        return [found[number] for number in range(len(found))]


@dataclass(frozen=True)
class Folder:
    """Contents of a folder: paths of its units by name, and ignored files with the reason."""

    path: Path
    units: Mapping[str, Path]
    ignored: Mapping[str, str]


def scan(path: Path) -> Folder:
    """List the units of `path`. A name of a known kind with one of its two files missing counts as
    a unit, so that it is reported as incomplete. Raises `UnitError` if `path` is not a folder."""
    if not path.is_dir():
        raise UnitError(f"{path} is not a folder", fix="give a folder of golden files")
    units: dict[str, Path] = {}
    ignored: dict[str, str] = {}
    for file in sorted(path.iterdir()):
        name = file.stem
        if file.suffix not in (".safetensors", ".json") or not file.is_file():
            ignored[file.name] = "neither .safetensors nor .json"
        elif kind_of(name) is not None or _is_pair(path / name):
            units[name] = path / name
        elif file.suffix == ".json":
            ignored[file.name] = "not the side-car of a unit"
        else:
            ignored[file.name] = "without a side-car that has `config`"
    return Folder(path, units, ignored)


def _beside(base: Path, suffix: str) -> Path:
    return base.parent / (base.name + suffix)


def _is_pair(base: Path) -> bool:
    """True if `base` (a path without suffix) has tensors and a side-car with `config`."""
    if not _beside(base, ".safetensors").is_file():
        return False
    try:
        about = json.loads(_beside(base, ".json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(about, dict) and "config" in about


def read_config(base: Path) -> Mapping[str, Any]:
    """The side-car's `config`; raises `UnitError`."""
    path = _beside(base, ".json")
    try:
        about = json.loads(path.read_bytes())
    except OSError as error:
        raise UnitError(f"cannot read its side-car {path.name}: {error.strerror}") from None
    except ValueError as error:
        raise UnitError(f"its side-car {path.name} is not JSON: {error}") from None
    config = about.get("config") if isinstance(about, dict) else None
    if not isinstance(config, dict):
        raise UnitError(f"its side-car {path.name} has no object `config`")
    return config


def read_unit(base: Path) -> Unit:
    """Read the unit at `base` (its path without suffix); raises `UnitError` in one line."""
    kind = kind_of(base.name)
    if kind is None:
        raise UnitError(
            "its name does not start with a known kind", expected="one of " + ", ".join(KINDS)
        )
    config = read_config(base)
    path = _beside(base, ".safetensors")
    try:
        tensors = load_tensors(path)
    except WeightsError as error:
        raise UnitError(str(error)) from None
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part not in parts or not rest:
            raise UnitError(f"has a tensor {name!r}", expected="state.*, in.* or out.*")
        parts[part][rest] = tensor
    if not parts["out"]:
        raise UnitError("holds no out.* tensor, so nothing can be compared")
    return Unit(base.name, kind, config, parts["state"], parts["in"], parts["out"])
