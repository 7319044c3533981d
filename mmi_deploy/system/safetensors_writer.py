"""Write a safetensors file of any size, tensor by tensor.

The format is a header of types, shapes and offsets, then the raw bytes. ONNX refers to the same
bytes as external data, so a runtime that maps the file maps the weights. Contents are requested
while they are written; runs of zeros become holes of a sparse file.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from mmi_deploy.system.files import temporary_name

# Alignment in bytes of the data section, and of every tensor whose size is a multiple of it.
ALIGNMENT = 64

# Bytes per write; a chunk of zeros is skipped instead.
_CHUNK = 2**24


@dataclass(frozen=True)
class Stored:
    """A tensor to be written. dtype: name in the format. bytes: size of the whole tensor. pieces:
    yields the contents in row-major order, as arrays of any type and shape; None: all zeros."""

    dtype: str
    shape: Sequence[int]
    bytes: int
    pieces: Callable[[], Iterable[NDArray]] | None = None


def write_safetensors_file(
    path: Path, tensors: Mapping[str, Stored], on_tensor: Callable[[int], None] = lambda done: None
) -> dict[str, int]:
    """Write `tensors` to `path` atomically; returns the byte offset of each in the file.

    Contents are requested in the order of the mapping. on_tensor: called before each tensor with
    the number of bytes done. Raises `OSError`, and whatever `pieces` raise.
    """
    header: dict[str, dict[str, object]] = {}
    starts: dict[str, int] = {}
    end = 0
    # Sorted by the power of two that divides its size, every tensor starts at a multiple of that
    # power, without padding in between.
    for name in sorted(tensors, key=lambda name: -math.gcd(tensors[name].bytes, ALIGNMENT)):
        tensor = tensors[name]
        starts[name], end = end, end + tensor.bytes
        shape, place = list(tensor.shape), [starts[name], end]
        header[name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": place}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    first, done = 8 + len(text), 0
    with _appearing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            on_tensor(done)
            done += tensor.bytes
            if tensor.pieces is not None:
                file.seek(first + starts[name])
                _write(file, tensor.pieces())
                written = file.tell() - first - starts[name]
                assert written == tensor.bytes, f"{name}: {written} bytes for {tensor.bytes}"
        file.truncate(first + end)
    return {name: first + start for name, start in starts.items()}


def _write(file: BinaryIO, pieces: Iterable[NDArray]) -> None:
    for piece in pieces:
        contents = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
        for start in range(0, contents.size, _CHUNK):
            chunk = contents[start : start + _CHUNK]
            if chunk.any():
                file.write(chunk.data)
            else:
                file.seek(chunk.size, os.SEEK_CUR)


@contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that replaces `path` when it is complete.

    On Linux the file has no name before that, so that a killed process leaves nothing behind.
    """
    temporary = temporary_name(path)
    try:
        descriptor = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
        named = False
    except (OSError, AttributeError):  # another system, or a file system over the network
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        named = True
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            if not named:
                _name(descriptor, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _name(descriptor: int, path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    try:  # Python follows the link in /proc only if dst_dir_fd is given
        os.link(f"/proc/self/fd/{descriptor}", path.name, dst_dir_fd=folder)
    finally:
        os.close(folder)
