"""The weights of a graph as one safetensors file, to which the ONNX file refers as external data.

Both formats store plain rows of bytes, so nothing is converted: a runtime that maps the file maps
the weights, and any safetensors reader can look at them. Weights are made one at a time, while they
are written; those that lie in another file already stay there.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

ALIGNMENT = 64
"""Bytes. Data starts at a multiple of it; the largest tensors come first and mostly keep to it."""

INLINE_BYTES = 256
"""Smaller initialisers, and those that are shapes or indices, stay in the ONNX file."""

_DTYPES = {ir.DataType.FLOAT: "F32", ir.DataType.FLOAT16: "F16", ir.DataType.BFLOAT16: "BF16"}


def externalise(model: ir.Model, file: Path) -> None:
    """Write the weights of `model` to `file` and let its initialisers refer to it by name."""
    weights = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
        and not isinstance(value.const_value, ir.ExternalTensor)
        and value.const_value.dtype in _DTYPES
        and value.const_value.nbytes > INLINE_BYTES
    }
    if not weights:
        return
    offsets = _write(file, weights)
    for name, tensor in weights.items():
        model.graph.initializers[name].const_value = ir.ExternalTensor(
            file.name,
            offsets[name],
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape),
            name=name,
            base_dir=file.parent,
        )


def _write(file: Path, weights: Mapping[str, ir.TensorProtocol]) -> dict[str, int]:
    """Write a safetensors file; returns the position of each tensor in it."""
    order = sorted(weights, key=lambda name: (-weights[name].nbytes, name))
    header: dict[str, dict[str, object]] = {}
    end = 0
    for name in order:
        tensor = weights[name]
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)))
        out.write(text)
        for name in order:
            out.write(weights[name].tobytes())
    first = 8 + len(text)
    return {name: first + header[name]["data_offsets"][0] for name in order}  # type: ignore[index]
