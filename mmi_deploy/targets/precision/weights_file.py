"""Write the weights of a rewritten graph: unchanged ones as hard links, new ones as safetensors.

A file of which at least half is still in use is linked; of other files the weights in use are
copied. New weights go to one safetensors file, one weight at a time. The ONNX file refers to it as
external data, so the runtime can memory-map the weights.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mmi_deploy.system.safetensors_writer import Stored, write_safetensors_file
from mmi_deploy.targets.precision.constants import read

# Initialisers up to this size, and integer ones such as shapes, stay in the ONNX file.
INLINE_BYTES = 256

_SAFETENSORS = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
    ir.DataType.INT8: "I8",
    ir.DataType.UINT8: "U8",
}

# Two elements a byte; safetensors stores them as a row of bytes.
_PACKED = (ir.DataType.INT4, ir.DataType.UINT4)

# Copy less than this even with `link_all`: a link keeps the whole file, and some tools refuse hard
# links as a security risk.
MIN_LINK_BYTES = 2**20


def write_weights(graph: ir.Graph, file: Path, link_all: bool = False) -> None:
    """Write the weights of `graph` as `file` and links beside it; its initialisers refer to them.

    link_all: link every file of which more than `MIN_LINK_BYTES` are in use, for temporary folders.
    """
    new: list[ir.Value] = []
    kept: dict[Path, list[ir.Value]] = defaultdict(list)
    for value in graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            kept[Path(tensor.path)].append(value)
        elif tensor is not None and is_external(tensor):
            new.append(value)
        elif isinstance(tensor, ir.LazyTensor):
            value.const_value = tensor.raw()
    for number, (source, values) in enumerate(sorted(kept.items())):
        link = file.with_suffix(f".portable{number or ''}{source.suffix}")
        if not (_worth_linking(source, values, link_all) and _link(source, link)):
            new.extend(values)
            continue
        for value in values:
            tensor = value.const_value
            assert isinstance(tensor, ir.ExternalTensor)
            value.const_value = _external(value, link, tensor.offset or 0, tensor.nbytes)
    if new:
        write_values(file, new)


def is_external(tensor: ir.TensorProtocol) -> bool:
    """Return True if a weight is stored outside the ONNX file, by its size and type."""
    known = tensor.dtype in _SAFETENSORS or tensor.dtype in _PACKED
    return known and tensor.nbytes > INLINE_BYTES


def _worth_linking(source: Path, values: Iterable[ir.Value], link_all: bool) -> bool:
    needed = sum(_tensor(value).nbytes for value in values)
    return needed > MIN_LINK_BYTES if link_all else 2 * needed >= source.stat().st_size


def _link(source: Path, link: Path) -> bool:
    """Hard-link a file. Returns False where the file system cannot."""
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


def write_values(file: Path, values: Iterable[ir.Value]) -> None:
    """Write `values` to a safetensors file and make them refer to it. Each value is read or
    computed when it is written."""
    named = {str(value.name): value for value in values}
    stored = {name: _stored(_tensor(value)) for name, value in named.items()}
    positions = write_safetensors_file(file, stored)
    for name, value in named.items():
        value.const_value = _external(value, file, positions[name], stored[name].bytes)


def _stored(tensor: ir.TensorProtocol) -> Stored:
    if tensor.dtype in _PACKED:
        return Stored(
            "U8",
            [tensor.nbytes],
            tensor.nbytes,
            lambda: [np.frombuffer(tensor.tobytes(), np.uint8)],
        )
    dtype = _SAFETENSORS[tensor.dtype]
    return Stored(dtype, tensor.shape.numpy(), tensor.nbytes, lambda: [read(tensor)])


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value
