"""Checkpoints as Hugging Face stores them: safetensors files, one or several with an index."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmi_deploy.errors import WeightsError
from mmi_train.weights.lazy_tensor import InFile, StoredTensor
from mmi_train.weights.pickles import read_pickle, weight_map

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
_MOST_HEADER = 100_000_000
"""Bytes; the format's own limit."""


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file; raises `WeightsError`."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else size
            if length > min(size - 8, _MOST_HEADER):
                raise ValueError
            entries: dict[str, dict[str, Any]] = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        first = 8 + length
        found = {name: _tensor(path, first, name, entry) for name, entry in entries.items()}
        end = first + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError):
        raise WeightsError(
            f"{path} is no safetensors file, or it is damaged", fix="download it again"
        ) from None
    if end > size:
        raise WeightsError(
            f"{path} is cut off", expected=f"{end} bytes", got=size, fix="download it again"
        )
    return found


def _tensor(path: Path, first: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    start, end = entry["data_offsets"]
    shape = torch.Size(entry["shape"])
    if entry["dtype"] not in _TYPES:
        raise WeightsError(
            f"{path}: {name} is stored as {entry['dtype']}",
            expected="F32, F16 or BF16",
            fix="use the checkpoint as it was before it was quantised",
        )
    dtype = _TYPES[entry["dtype"]]
    if end - start != shape.numel() * dtype.itemsize or start < 0:
        raise ValueError
    return InFile(path, first + start, dtype, shape)


def read_folder(folder: Path, stems: Sequence[str]) -> dict[str, StoredTensor]:
    """The tensors of a Hugging Face folder whose weights are called by one of `stems`: as
    safetensors, one file or several with an index, else as pickles. Raises `WeightsError`."""
    for stem in stems:
        for suffix, read in ((".safetensors", read_safetensors), (".bin", read_pickle)):
            index, single = folder / f"{stem}{suffix}.index.json", folder / (stem + suffix)
            if index.is_file():
                found: dict[str, StoredTensor] = {}
                for name in sorted(set(weight_map(index).values())):
                    found.update(read(folder / name))
                return found
            if single.is_file():
                return read(single)
    raise WeightsError(
        f"{folder} holds no weights",
        expected=" or ".join(f"{stem}.safetensors" for stem in stems),
        fix="download the folder whole",
    )
