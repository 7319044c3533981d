"""The weights of a rewritten graph: unchanged ones stay where they are, others are written one by
one.

A file of which at least half is still needed is linked (no bytes are copied); what is needed of
others is copied. New weights become one safetensors file, to which the ONNX file refers as external
data, so a runtime that maps the file maps the weights.
"""

from __future__ import annotations

import json
import os
import struct
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mmi_deploy.build.precision.constants import read

ALIGNMENT = 64
"""Bytes. Data starts at a multiple of it, and tensors that are no multiple of it come last."""

INLINE_BYTES = 256
"""Smaller initialisers, and those that are shapes or indices, stay in the ONNX file."""

_SAFETENSORS = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
    ir.DataType.INT8: "I8",
    ir.DataType.UINT8: "U8",
}

_PACKED = (ir.DataType.INT4, ir.DataType.UINT4)
"""Two numbers a byte: a plain row of bytes to safetensors."""

LINK_BYTES = 2**20
"""What is copied rather than linked, even for a folder that does not last: a link is there for the
whole file, and some tools take one for an attack."""

_CHUNK = 2**24


def write_weights(graph: ir.Graph, file: Path, link_all: bool = False) -> list[Path]:
    """Write the weights of `graph` as `file` and links beside it; its initialisers refer to them.

    link_all: link every file that more than a little is needed of, for a folder that does not last.
    Returns the files that there are now.
    """
    new: list[ir.Value] = []
    kept: dict[Path, list[ir.Value]] = defaultdict(list)
    for value in graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            kept[Path(tensor.path)].append(value)
        elif tensor is not None and _goes_out(tensor):
            new.append(value)
        elif isinstance(tensor, ir.LazyTensor):
            value.const_value = tensor.raw()
    written = []
    for number, (source, values) in enumerate(sorted(kept.items())):
        link = file.with_suffix(f".portable{number or ''}{source.suffix}")
        if not (_worth_a_link(source, values, link_all) and _link(source, link)):
            new.extend(values)
            continue
        written.append(link)
        for value in values:
            tensor = value.const_value
            assert isinstance(tensor, ir.ExternalTensor)
            value.const_value = _external(value, link, tensor.offset or 0, tensor.nbytes)
    if new:
        _write(file, new)
        written.append(file)
    return written


def _goes_out(tensor: ir.TensorProtocol) -> bool:
    known = tensor.dtype in _SAFETENSORS or tensor.dtype in _PACKED
    return known and tensor.nbytes > INLINE_BYTES


def _worth_a_link(source: Path, values: Iterable[ir.Value], link_all: bool) -> bool:
    needed = sum(_tensor(value).nbytes for value in values)
    return needed > LINK_BYTES if link_all else 2 * needed >= source.stat().st_size


def _link(source: Path, link: Path) -> bool:
    """False where the disk is another one, or does not do links."""
    try:
        os.link(source.resolve(), link)
    except OSError:
        return False
    return True


def _external(value: ir.Value, file: Path, offset: int, length: int) -> ir.ExternalTensor:
    assert value.const_value is not None
    return ir.ExternalTensor(
        file.name,
        offset,
        length,
        value.const_value.dtype,
        shape=value.const_value.shape,
        name=str(value.name),
        base_dir=file.parent,
    )


def _write(file: Path, values: list[ir.Value]) -> None:
    """A safetensors file of `values`, which refer to it afterwards."""
    order = sorted(values, key=lambda value: _tensor(value).nbytes % ALIGNMENT != 0)
    header: dict[str, dict[str, object]] = {}
    end = 0
    for value in order:
        tensor = _tensor(value)
        start, end = end, end + tensor.nbytes
        packed = tensor.dtype in _PACKED
        header[str(value.name)] = {
            "dtype": "U8" if packed else _SAFETENSORS[tensor.dtype],
            "shape": [tensor.nbytes] if packed else [int(side) for side in tensor.shape],
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)))
        out.write(text)
        for value in order:
            position = out.tell()
            _append(out.fileno(), position, _tensor(value))
            out.seek(position + _tensor(value).nbytes)
            value.const_value = _external(value, file, position, _tensor(value).nbytes)
        out.truncate()


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _append(handle: int, position: int, tensor: ir.TensorProtocol) -> None:
    """Bytes of a tensor; zeros are left out, so that a sparse file stays one."""
    packed = tensor.dtype in _PACKED
    contents = np.frombuffer(tensor.tobytes(), np.uint8) if packed else _bytes(tensor)
    for start in range(0, contents.size, _CHUNK):
        chunk = contents[start : start + _CHUNK]
        if chunk.any():
            os.pwrite(handle, chunk.data, position + start)


def _bytes(tensor: ir.TensorProtocol) -> np.ndarray:
    return np.ascontiguousarray(read(tensor)).reshape(-1).view(np.uint8)
