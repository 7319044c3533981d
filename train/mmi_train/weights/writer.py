"""Streaming writer: lazy tensors into one safetensors file, piece by piece."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from numpy.typing import NDArray

from mmi_deploy.errors import MmiError, WeightsError
from mmi_deploy.system.progress import Progress, silent
from mmi_deploy.system.safetensors_writer import Stored, write_safetensors_file
from mmi_train.weights.lazy_tensor import PLAIN_TYPES, StoredTensor

# The format's names of the types that are written.
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

# Progress reports per file.
_REPORTS = 20


def write_safetensors(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    dtype: torch.dtype | None = None,
    progress: Progress = silent,
) -> int:
    """Write `tensors` to `path`, in the order of the mapping; returns the file's bytes.

    dtype: of the written values; None: each tensor's own type, fp64 as fp32. No more than a few
    pieces of a tensor are in memory at any time, and `path` appears when it is whole. Raises
    `WeightsError` when a tensor holds NaN or infinity or numbers beyond `dtype`, and `MmiError`
    when the disk has no room.
    """
    stored = {name: _stored(name, tensor, dtype) for name, tensor in tensors.items()}
    total, reported = sum(tensor.bytes for tensor in stored.values()), -1

    def report(done: int) -> None:
        nonlocal reported
        if (part := done * _REPORTS // max(total, 1)) > reported:
            reported = part
            progress("writing weights", done, total, unit="bytes")

    _check_room(path, total)
    write_safetensors_file(path, stored, report)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size


def _stored(name: str, tensor: StoredTensor, wanted: torch.dtype | None) -> Stored:
    dtype = wanted or (tensor.dtype if tensor.dtype in NAMES else torch.float32)
    size = prod(tensor.shape) * dtype.itemsize
    return Stored(NAMES[dtype], tensor.shape, size, lambda: _pieces(name, tensor, dtype))


def _pieces(name: str, tensor: StoredTensor, dtype: torch.dtype) -> Iterator[NDArray]:
    for piece in tensor.pieces():
        assert piece.dtype in PLAIN_TYPES, (name, piece.dtype)
        converted = piece.to(dtype)
        if not bool(torch.isfinite(converted).all()):
            if bool(torch.isfinite(piece).all()):
                raise WeightsError(
                    f"{name} holds numbers that {str(dtype).removeprefix('torch.')} cannot",
                    got=f"{piece.abs().max().item():.4g}",
                    fix="convert with --dtype bfloat16 or float32",
                )
            raise WeightsError(f"{name} holds NaN or infinity", fix="use an intact checkpoint")
        yield converted.contiguous().view(torch.uint8).numpy()


def _check_room(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise MmiError(
            f"the disk is too full for {path.name}",
            expected=f"{needed / 1e6:,.0f} MB of room",
            got=f"{free / 1e6:,.0f} MB",
            fix="free some space, or choose another place with --out",
        )
