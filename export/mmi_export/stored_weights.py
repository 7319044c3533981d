"""Weights that stay in their files: read one at a time, or referred to by their place."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from mmi_deploy.errors import WeightsError

INDEX = "model.safetensors.index.json"
"""Names the file of every tensor where there are several, as Hugging Face writes it."""

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
ONNX_TYPES = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
}
SAFETENSORS_TYPES = {onnx: name for name, onnx in ONNX_TYPES.items()}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its file, its first byte and how many, its type and shape."""

    file: Path
    start: int
    size: int
    dtype: str
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, Place]:
    """The places of all tensors in a safetensors file; `WeightsError` if it is cut short or no such
    file."""
    try:
        length = file.stat().st_size
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            if size > length - 8:
                raise ValueError(f"it ends after {length} bytes, within its header")
            header = json.loads(stream.read(size))
        places = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, stop = entry["data_offsets"]
            start = 8 + size + first
            if start + stop - first > length:
                raise ValueError(f"it ends after {length} bytes, before the end of {name}")
            places[name] = Place(file, start, stop - first, entry["dtype"], (*entry["shape"],))
    except OSError as error:
        raise WeightsError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise WeightsError(
            f"{file} is no whole safetensors file: {error}", fix="copy it again, or convert anew"
        ) from None
    return places


class StoredWeights:
    """The tensors of a model folder, by name, where they lie on the disk."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self.places = places

    def read(self, name: str) -> Tensor:
        """One weight in float32."""
        place = self.places[name]
        data = np.fromfile(place.file, np.uint8, place.size, offset=place.start)
        if len(data) != place.size:
            raise WeightsError(f"{place.file} became shorter while it was read")
        return torch.from_numpy(data).view(_TYPES[place.dtype]).view(place.shape).float()

    @property
    def bytes(self) -> int:
        """Of all weights together."""
        return sum(place.size for place in self.places.values())

    @property
    def files(self) -> list[Path]:
        return sorted({place.file for place in self.places.values()})


def stored_weights(folder: Path, wanted: Mapping[str, Tensor]) -> StoredWeights:
    """The weights in `folder`; `WeightsError` unless they are exactly `wanted`, by name and shape.

    Only headers are read.
    """
    index = folder / INDEX
    files = [folder / "model.safetensors"]
    if index.is_file():
        try:
            names = json.loads(index.read_bytes())["weight_map"].values()
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise WeightsError(f"cannot read {index}: {error}") from None
        files = [folder / os.path.basename(name) for name in sorted({*names})]
    places: dict[str, Place] = {}
    for file in files:
        places |= read_header(file)
    _check(places, wanted, folder)
    return StoredWeights(places)


def _check(places: Mapping[str, Place], wanted: Mapping[str, Tensor], folder: Path) -> None:
    if missing := sorted(wanted.keys() - places.keys()):
        raise WeightsError(f"{folder} lacks {len(missing)} tensors: {_some(missing)}")
    if extra := sorted(places.keys() - wanted.keys()):
        raise WeightsError(f"{folder} has {len(extra)} unknown tensors: {_some(extra)}")
    for name, place in places.items():
        shape = tuple(wanted[name].shape)
        if place.shape != shape:
            raise WeightsError(
                f"{place.file}: {name} has the wrong shape",
                expected=list(shape),
                got=list(place.shape),
            )
        if place.dtype not in _TYPES:
            raise WeightsError(
                f"{place.file}: {name} holds another kind of numbers",
                expected=" or ".join(_TYPES),
                got=place.dtype,
            )


def _some(names: list[str], shown: int = 5) -> str:
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def link_file(file: Path, folder: Path) -> str:
    """Give `file` a name in `folder` too, and return it: a hard link, or a copy on another disk."""
    own = folder / file.name
    if own.exists():
        return own.name
    try:
        os.link(file.resolve(), own)
    except OSError:
        shutil.copyfile(file, own)
    return own.name
