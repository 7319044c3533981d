"""One safetensors file of any size, written tensor by tensor."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch

from mmi_deploy.errors import MmiError, WeightsError
from mmi_train.stored import PLAIN_TYPES, StoredTensor

ALIGNMENT = 64
"""Bytes. Data starts at a multiple of it; the largest tensors come first and mostly keep to it."""

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

_TOLD = 20
"""How often progress is told, at most."""

Progress = Callable[[str, int, int], None]
"""Called with what is done next, how much is done and how much there is."""


def stored_type(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The type that a tensor of type `own` is written as. `wanted` None: its own, fp64 as fp32."""
    if wanted is not None:
        return wanted
    return own if own in _NAMES else torch.float32


def write_safetensors(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> int:
    """Write `tensors` to the new file `path`, read in the order of the mapping; returns its bytes.

    No more than a few pieces of a tensor are in memory at any time. Raises `WeightsError` when one
    holds NaN or infinity or numbers beyond `dtype`, and `MmiError` when the disk has no room; the
    file is then incomplete, and the caller removes it.
    """
    types = {name: stored_type(tensor.dtype, dtype) for name, tensor in tensors.items()}
    sizes = {name: prod(tensor.shape) * types[name].itemsize for name, tensor in tensors.items()}
    header: dict[str, dict[str, object]] = {}
    starts: dict[str, int] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (-sizes[name], name)):
        starts[name], end = end, end + sizes[name]
        header[name] = {
            "dtype": _NAMES[types[name]],
            "shape": list(tensors[name].shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    first = 8 + len(text)
    total = first + end
    check_room(path, total)
    with _appearing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        done, told = 0, -1
        for name, tensor in tensors.items():
            if progress is not None and (part := done * _TOLD // max(end, 1)) > told:
                told = part
                progress("writing weights, in MB", done // 10**6, end // 10**6)
            file.seek(first + starts[name])
            _write(file, name, tensor, types[name])
            done += sizes[name]
        file.truncate(total)
        file.flush()
        os.fsync(file.fileno())
    return total


@contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that has no name until it is whole, so that even a killed process leaves
    nothing behind; where the file system cannot do that, a plain new file."""
    try:
        descriptor = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o644)
    except (OSError, AttributeError):  # not Linux, or a file system over the network
        with path.open("wb") as file:
            yield file
        return
    with os.fdopen(descriptor, "wb") as file:
        yield file
        folder = os.open(path.parent, os.O_RDONLY)
        try:  # Python follows the link of /proc only if it is told a folder
            os.link(f"/proc/self/fd/{descriptor}", path.name, dst_dir_fd=folder)
        finally:
            os.close(folder)


def check_room(path: Path, needed: int) -> None:
    """Raise `MmiError` unless the disk has room for a file `path` of `needed` bytes."""
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise MmiError(
            f"the disk is too full for {path.name}",
            expected=f"{needed / 1e6:,.0f} MB of room",
            got=f"{free / 1e6:,.0f} MB",
            fix="free some space, or choose another place with --out",
        )


def _write(file: BinaryIO, name: str, tensor: StoredTensor, dtype: torch.dtype) -> None:
    count = 0
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
        file.write(converted.contiguous().view(torch.uint8).numpy().data)
        count += piece.numel()
    assert count == prod(tensor.shape), f"{name}: {count} numbers for {tuple(tensor.shape)}"
