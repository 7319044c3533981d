"""Model folders: `config.json`, `model.safetensors`, `tokenizer.json`; strict loading, atomic
writing."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from mmi_deploy.errors import WeightsError
from mmi_deploy.spec.config import ModelConfig, first_flaw, read_config, to_json
from mmi_deploy.system.files import write_file
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.weights.lazy_tensor import (
    PIECE_BYTES,
    PLAIN_TYPES,
    Computed,
    InFile,
    InMemory,
    StoredTensor,
)
from mmi_train.weights.safetensors_files import read_safetensors
from mmi_train.weights.writer import write_safetensors

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"

# Kind of a model folder in the marker of output folders.
FOLDER_KIND = "model"

# Names of tensors that one error shows.
_SHOWN = 5

# Bytes of each tensor that identify a file of weights.
_SAMPLE = 4096


def _first_names(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


# The type of a matrix in memory, from its name and its type in the file; None: as all others.
TypeOfMatrix = Callable[[str, torch.dtype], torch.dtype | None]


class Typed(Protocol):
    """Shape and type of a tensor, in memory or in a file."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...


def kind_of(value: Typed) -> str:
    """Kind of a tensor's type: floating point, integer, bool or complex, whatever its width."""
    if value.dtype.is_floating_point:
        return "floating point"
    return (
        "bool" if value.dtype == torch.bool else "complex" if value.dtype.is_complex else "integer"
    )


def load_strictly(module: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Copy `state` into `module`, converted to the module's types within the same kind.

    Raises `WeightsError` that names what is missing, unknown, misshapen, of another kind or not
    finite.
    """
    check_fit(module, state, source)
    for name, value in state.items():
        check_finite(name, value, source)
    module.load_state_dict(state, strict=True)


def check_fit(module: nn.Module, state: Mapping[str, Typed], source: str) -> None:
    """Raise `WeightsError`, which names what is missing, unknown, misshapen or of another kind,
    unless `state` holds the tensors of `module`, which may be on the meta device."""
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


def check_fits(config: ModelConfig, state: Mapping[str, Typed], source: str) -> None:
    """Raise `WeightsError` unless `state` holds the tensors of a model of `config`."""
    with torch.device("meta"):
        model = MMInterleaved(config)
    check_fit(model, state, source)


def check_finite(name: str, value: torch.Tensor, source: str) -> None:
    """Raise `WeightsError` if a tensor of the file `source` holds NaN or infinity."""
    # Piece by piece: the comparison takes as much memory as its values.
    pieces = InMemory(value).pieces()
    if value.is_floating_point() and not all(bool(torch.isfinite(one).all()) for one in pieces):
        raise WeightsError(
            f"{source}: {name} holds NaN or infinity", fix="use an intact checkpoint"
        )


def open_model(folder: Path) -> tuple[MMInterleaved, dict[str, InFile]]:
    """The model in `folder` on the meta device, and the tensors of its file, which fit it. Raises
    `ConfigError` and `WeightsError`."""
    with torch.device("meta"):
        model = MMInterleaved(read_config(folder / CONFIG))
    stored = read_safetensors(folder / WEIGHTS)
    check_fit(model, stored, str(folder / WEIGHTS))
    return model, stored


def types_in_memory(
    model: nn.Module,
    stored: Mapping[str, Typed],
    dtype: torch.dtype | None,
    matrices: TypeOfMatrix | None,
) -> dict[str, torch.dtype]:
    """Types that `load_model` gives the tensors `stored`, by name."""
    known = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    found = {}
    for name, tensor in stored.items():
        wanted = matrices(name, tensor.dtype) if matrices is not None and name in known else None
        floating = tensor.dtype.is_floating_point
        found[name] = wanted or dtype or tensor.dtype if floating else tensor.dtype
    return found


def load_model(
    folder: Path,
    dtype: torch.dtype | None = torch.float32,
    *,
    matrices: TypeOfMatrix | None = None,
) -> MMInterleaved:
    """Load the model in `folder` in evaluation mode; raises `ConfigError` and `WeightsError`.

    dtype: of floating-point weights; None: that of each in the file. matrices: the type of the
    weight of a linear layer or an embedding, None as `dtype` says. The weights are in memory once:
    the module is built on the meta device, and takes over each tensor as it is read.
    """
    model, stored = open_model(folder)
    types = types_in_memory(model, stored, dtype, matrices)
    state = {}
    for name, tensor in stored.items():
        value = tensor.read()
        check_finite(name, value, str(folder / WEIGHTS))
        state[name] = value.to(types[name])
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def fingerprint(folder: Path, *, whole: bool = False) -> str:
    """Checksum of a model folder's weights, 16 hexadecimal digits: of names, types, shapes and the
    first bytes of each, so that it takes no time for any size; `whole`: of all bytes."""
    found = hashlib.sha256()
    with (folder / WEIGHTS).open("rb") as file:
        for name, tensor in read_safetensors(folder / WEIGHTS).items():
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            left = tensor.shape.numel() * tensor.dtype.itemsize
            left = left if whole else min(left, _SAMPLE)
            file.seek(tensor.offset)
            while left > 0 and (piece := file.read(min(left, PIECE_BYTES))):
                found.update(piece)
                left -= len(piece)
    return found.hexdigest()[:16]


def read_about(path: Path, what: str) -> dict[str, Any]:
    """JSON object in `path` about `what`, adapters or a delta. Raises `WeightsError`."""
    try:
        return TypeAdapter(dict[str, Any]).validate_json(path.read_bytes())
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        raise WeightsError(f"{path} describes no {what}: {first_flaw(error)}") from None


def base_of(about: Mapping[str, Any], path: Path, what: str) -> str:
    """Fingerprint of the base in what `read_about` read. Raises `WeightsError`."""
    base = about.get("base")
    if not isinstance(base, str) or re.fullmatch("[0-9a-f]{16}", base) is None:
        raise WeightsError(f"{path} describes no {what}: base is no checksum")
    return base


def check_base(base: Path, wanted: str, what: str, *, whole: bool = False) -> None:
    """Raise `WeightsError` unless the model folder `base` has the fingerprint `wanted`, that of the
    model to which `what` belong."""
    if (own := fingerprint(base, whole=whole)) != wanted:
        raise WeightsError(
            f"the {what} do not belong to {base}",
            expected=f"weights {wanted}",
            got=own,
            fix="give the model folder that they were made from",
        )


def write_changed(
    folder: Path,
    base: Path,
    changed: Mapping[str, StoredTensor],
    config: ModelConfig | None = None,
) -> None:
    """Write into `folder` the model of the folder `base` with some weights replaced, and with
    `config` in place of its own, if it is given.

    Weights keep the types that they have in `base`, those that are not replaced their values, and
    no more than a piece of them is in memory. Raises `WeightsError` for a replacement of a tensor
    that `base` does not have, of another shape or kind, not finite, or beyond its type there.
    """
    own = read_config(base / CONFIG)
    folder.mkdir(parents=True, exist_ok=True)
    stored = read_safetensors(base / WEIGHTS)
    for name, value in changed.items():
        if value.dtype not in PLAIN_TYPES:
            raise WeightsError(f"{name} is in {_named(value.dtype)}, which is no type of weights")
        if name not in stored or stored[name].shape != value.shape:
            raise WeightsError(
                f"{base / WEIGHTS} has no tensor {name} of the shape {list(value.shape)}",
                fix="give the model folder that the training started from",
            )
    state = {
        name: Computed(
            tensor.shape, tensor.dtype, partial(_within, name, changed[name], tensor.dtype, base)
        )
        if name in changed
        else tensor
        for name, tensor in stored.items()
    }
    write_safetensors(folder / WEIGHTS, state)
    for name in (CONFIG, TOKENIZER):
        if (base / name).is_file():
            write_file(folder / name, (base / name).read_bytes())
    if config is not None and config != own:
        write_file(folder / CONFIG, to_json(config))


def _within(name: str, value: StoredTensor, dtype: torch.dtype, base: Path) -> torch.Tensor:
    """The values of `value`, which must not be beyond `dtype`."""
    found = value.read().detach().cpu()
    if float(found.abs().max()) > torch.finfo(dtype).max:
        raise WeightsError(
            f"{name} has grown beyond {_named(dtype)}, its type in {base}",
            fix="start from that model in float32 or bfloat16, or lower the rate",
        )
    return found


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def save_model(model: MMInterleaved, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write configuration and weights of `model` into `folder`, each file atomically. Raises
    `WeightsError` when a weight is not finite in `dtype`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: InMemory(value) for name, value in model.state_dict().items()}
    write_safetensors(folder / WEIGHTS, state, dtype)
    write_file(folder / CONFIG, to_json(model.config))
