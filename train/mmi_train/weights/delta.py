"""Deltas: the weights in which a model folder differs from its base, in a folder of their own.

`delta.safetensors` holds them as they are in the model, not as differences, so that applying a
delta restores the model's values exactly; `config.json` is the model's, and `delta.json` names the
base by its fingerprint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from mmi_deploy.errors import WeightsError
from mmi_deploy.spec.config import ModelConfig, first_flaw, read_config, to_json
from mmi_deploy.system.files import write_file
from mmi_deploy.system.progress import Progress, silent
from mmi_train.weights.lazy_tensor import InFile, StoredTensor
from mmi_train.weights.model_folder import CONFIG, TOKENIZER, WEIGHTS, check_base, fingerprint
from mmi_train.weights.safetensors_files import read_safetensors
from mmi_train.weights.writer import write_safetensors

DELTA = "delta.safetensors"
ABOUT = "delta.json"

# Kind of a folder of a delta in the marker of output folders.
DELTA_KIND = "delta"


@dataclass(frozen=True)
class Delta:
    """Weights of a model that are not those of its base, and its configuration. `base`: fingerprint
    of the base."""

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
        check_base(base, self.base, "weights of the delta")
        return self.weights


def make_delta(base: Path, model: Path, progress: Progress = silent) -> Delta:
    """Compare two model folders, a tensor at a time. Raises `WeightsError` if they differ in more
    than values: in names, shapes or types of weights, or in the tokenizer."""
    old, new = read_safetensors(base / WEIGHTS), read_safetensors(model / WEIGHTS)
    for name in sorted(old.keys() | new.keys()):
        kinds = [_kind(weights.get(name)) for weights in (old, new)]
        if kinds[0] != kinds[1]:
            raise WeightsError(
                f"{model} differs from {base} in more than values",
                expected=f"{name}: {kinds[0]}",
                got=kinds[1],
                fix="give the model folder that the training started from",
            )
    if _text(base / TOKENIZER) != _text(model / TOKENIZER):
        raise WeightsError(
            f"{model} has another tokenizer than {base}",
            fix="give the model folder that the training started from",
        )
    changed = {}
    for index, (name, tensor) in enumerate(new.items()):
        progress("comparing weights", index, len(new))
        if not torch.equal(tensor.read(), old[name].read()):
            changed[name] = tensor
    progress("comparing weights", len(new), len(new))
    return Delta(fingerprint(base), read_config(model / CONFIG), changed)


def read_delta(folder: Path) -> Delta:
    """Read what `Delta.save` wrote; raises `WeightsError` and `ConfigError`."""
    try:
        about = TypeAdapter(dict[str, str]).validate_json((folder / ABOUT).read_bytes())
    except OSError as error:
        raise WeightsError(f"cannot read {folder / ABOUT}: {error.strerror}") from None
    except ValidationError as error:
        raise WeightsError(f"{folder / ABOUT} describes no delta: {first_flaw(error)}") from None
    config = read_config(folder / CONFIG)
    return Delta(about.get("base", "none"), config, dict(read_safetensors(folder / DELTA)))


def _kind(tensor: InFile | None) -> str:
    if tensor is None:
        return "no such weight"
    return f"{list(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}"


def _text(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None
