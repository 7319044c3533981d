"""Model folders: `config.json`, `model.safetensors`, `tokenizer.json`; strict loading, atomic
writing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from mmi_deploy.errors import WeightsError
from mmi_deploy.spec.config import read_config, to_json
from mmi_deploy.system.files import write_file
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.weights.lazy_tensor import InMemory
from mmi_train.weights.safetensors_files import load_tensors
from mmi_train.weights.writer import write_safetensors

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"

# Kind of a model folder in the marker of output folders.
FOLDER_KIND = "model"

# Names of tensors that one error shows.
_SHOWN = 5


def _first_names(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def kind_of(value: torch.Tensor) -> str:
    """Kind of a tensor's type: floating point, integer, bool or complex, whatever its width."""
    if value.is_floating_point():
        return "floating point"
    return "bool" if value.dtype == torch.bool else "complex" if value.is_complex() else "integer"


def load_strictly(module: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Copy `state` into `module`, converted to the module's types within the same kind.

    Raises `WeightsError` that names what is missing, unknown, misshapen, of another kind or not
    finite.
    """
    own = module.state_dict()
    if missing := sorted(own.keys() - state.keys()):
        raise WeightsError(f"{source} lacks {len(missing)} tensors: {_first_names(missing)}")
    if extra := sorted(state.keys() - own.keys()):
        raise WeightsError(f"{source} has {len(extra)} unknown tensors: {_first_names(extra)}")
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise WeightsError(
                f"{source}: {name} has the wrong shape",
                expected=list(own[name].shape),
                got=list(value.shape),
            )
        if kind_of(value) != kind_of(own[name]):
            raise WeightsError(
                f"{source}: {name} holds another kind of numbers",
                expected=kind_of(own[name]),
                got=kind_of(value),
                fix="use an intact checkpoint of this model",
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise WeightsError(
                f"{source}: {name} holds NaN or infinity", fix="use an intact checkpoint"
            )
    module.load_state_dict(state, strict=True)


def load_model(folder: Path) -> MMInterleaved:
    """Load the model in `folder`, in float32 and evaluation mode; raises `ConfigError` and
    `WeightsError`."""
    model = MMInterleaved(read_config(folder / CONFIG))
    path = folder / WEIGHTS
    load_strictly(model, load_tensors(path), str(path))
    return model.eval()


def save_model(model: MMInterleaved, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write configuration and weights of `model` into `folder`, each file atomically. Raises
    `WeightsError` when a weight is not finite in `dtype`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: InMemory(value) for name, value in model.state_dict().items()}
    write_safetensors(folder / WEIGHTS, state, dtype)
    write_file(folder / CONFIG, to_json(model.config))
