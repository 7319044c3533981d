"""Weights of a model folder: checked from headers before the export, read one at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers.initialization import no_init_weights

from mmi_deploy.errors import WeightsError
from mmi_deploy.spec.config import ModelConfig
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.weights.lazy_tensor import PLAIN_TYPES, InFile
from mmi_train.weights.model_folder import WEIGHTS
from mmi_train.weights.pickles import read_together, weight_map
from mmi_train.weights.safetensors_files import read_safetensors

# Index of a model in several files, in Hugging Face's format: tensor name -> file.
INDEX = f"{WEIGHTS}.index.json"


class StoredWeights:
    """Tensors of a model by name, each in a file."""

    def __init__(self, places: Mapping[str, InFile]) -> None:
        self.places = places

    def read(self, name: str) -> Tensor:
        """Read one weight as float32."""
        return self.places[name].read().float()

    def check_finite(self, on_read: Callable[[int], None]) -> None:
        """Raise `WeightsError` for the first weight that holds NaN or infinity. `on_read`: called
        with the number of bytes read so far."""
        done = 0
        for name, place in self.places.items():
            for piece in place.pieces():
                if not bool(torch.isfinite(piece).all()):
                    raise WeightsError(
                        f"{place.path}: {name} holds NaN or infinity",
                        fix="use an intact checkpoint",
                    )
                done += piece.nbytes
                on_read(done)

    @property
    def bytes(self) -> int:
        """Size of all weights together."""
        return sum(_bytes(place) for place in self.places.values())

    @property
    def dtype(self) -> torch.dtype:
        """Type of the most bytes."""
        sizes: dict[torch.dtype, int] = {}
        for place in self.places.values():
            sizes[place.dtype] = sizes.get(place.dtype, 0) + _bytes(place)
        return max(sizes, key=sizes.__getitem__)

    @property
    def files(self) -> list[Path]:
        return sorted({place.path for place in self.places.values()})


def stored_weights(folder: Path, wanted: Mapping[str, Tensor]) -> StoredWeights:
    """Find the weights in `folder`; reads headers only.

    Raises `WeightsError` unless they are exactly `wanted`, by name and shape.
    """
    index = folder / INDEX
    names = sorted({*weight_map(index).values()}) if index.is_file() else [WEIGHTS]
    places: dict[str, InFile] = {}
    paths = [folder / name for name in names]
    for key, tensor in read_together(folder, paths, read_safetensors).items():
        assert isinstance(tensor, InFile)
        places[key] = tensor
    _check(places, wanted, folder)
    return StoredWeights(places)


def load_stored(config: ModelConfig, stored: StoredWeights) -> MMInterleaved:
    """Load the model in float32 and evaluation mode."""
    with no_init_weights():
        model = MMInterleaved(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.copy_(stored.read(name))
    return model


def link_file(file: Path, folder: Path) -> str:
    """Make a hard link to `file` in `folder`, or a copy on another disk; return its name.

    The name begins with `model` or `weights.`, so that it is never that of a graph's own weights.
    """
    own = folder / (file.name if file.name.startswith("model") else f"weights.{file.name}")
    if not own.exists():
        try:
            os.link(file.resolve(), own)
        except OSError:
            shutil.copyfile(file, own)
    return own.name


def can_link(file: Path, folder: Path) -> bool:
    """Tell if `link_file` would make a hard link; False for another disk or user."""
    probe = folder / f".{file.name}.{os.getpid()}.probe"
    try:
        os.link(file.resolve(), probe)
    except OSError:
        return False
    probe.unlink()
    return True


def _check(places: Mapping[str, InFile], wanted: Mapping[str, Tensor], folder: Path) -> None:
    if missing := sorted(wanted.keys() - places.keys()):
        raise WeightsError(
            f"{folder} lacks {len(missing)} tensors: {_some(missing)}",
            fix="give the folder of the model that its config.json describes",
        )
    if extra := sorted(places.keys() - wanted.keys()):
        raise WeightsError(
            f"{folder} has {len(extra)} unknown tensors: {_some(extra)}",
            fix="give the folder of the model that its config.json describes",
        )
    for name, place in places.items():
        if place.shape != wanted[name].shape:
            raise WeightsError(
                f"{place.path}: {name} has the wrong shape",
                expected=list(wanted[name].shape),
                got=list(place.shape),
            )
        if place.dtype not in PLAIN_TYPES:
            raise WeightsError(
                f"{place.path}: {name} has the wrong data type",
                expected="floating point",
                got=str(place.dtype).removeprefix("torch."),
                fix="use an intact checkpoint of this model",
            )


def _bytes(place: InFile) -> int:
    return place.shape.numel() * place.dtype.itemsize


def _some(names: list[str], shown: int = 5) -> str:
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")
