"""Constants of a graph in the type that a node computes in, converted lazily.

The portable graphs may store a weight in 16 bits, followed by a Cast to float32. Here the constant
is the stored tensor and the Cast is ignored: a node that computes in the stored type reads the
stored bytes, any other a converted copy. A copy is computed when it is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mmi_deploy.errors import WeightsError
from mmi_deploy.targets.precision.recipes import MAX_FINITE

Array = NDArray[Any]

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

NUMPY = {
    ir.DataType.FLOAT: np.dtype(np.float32),
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}

# Name of the NumPy type -> ONNX type, such as `float16` -> ir.DataType.FLOAT16.
ONNX = {str(dtype): name for name, dtype in NUMPY.items()}

# Elements that are processed at once, to bound memory.
CHUNK = 2**18

# Larger magnitudes count as infinity, such as a mask's -3.4e38.
INFINITE = 1e30


def read(tensor: ir.TensorProtocol) -> Array:
    """Contents of a constant. External data is memory-mapped until the array is freed."""
    if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype not in NUMPY:
        return np.asarray(tensor.numpy())
    shape = tuple(int(side) for side in tensor.shape)
    if math.prod(shape) == 0:
        return np.zeros(shape, NUMPY[tensor.dtype])
    return np.memmap(
        tensor.path, NUMPY[tensor.dtype], mode="r", offset=tensor.offset or 0, shape=shape
    )


def converted(values: Array, dtype: ir.DataType, name: str) -> Array:
    """Round `values` to `dtype`. Values beyond `INFINITE` become the largest finite value.

    Raises `WeightsError` for values that are not finite or overflow.
    """
    wanted = NUMPY[dtype]
    found = np.empty(values.shape, wanted)
    for part in chunks(values.shape):
        found[part] = _converted(values[part], wanted, name)
    return found


def _converted(values: Array, wanted: np.dtype, name: str) -> Array:
    check_finite(values, name)
    greatest = MAX_FINITE[str(wanted)]
    peak = float(np.abs(values).max(initial=0.0)) if wanted == np.float16 else 0.0
    if greatest < peak < INFINITE:
        raise WeightsError(
            f"{name} does not fit into {wanted}",
            expected=f"at most {greatest:g}",
            got=f"{peak:g}",
            fix="choose --precision bf16",
        )
    if peak >= INFINITE or wanted != np.float16:
        values = np.clip(values, np.float32(-greatest), np.float32(greatest))
    return values.astype(wanted)


def chunks(shape: Sequence[int], axis: int = 0) -> Iterator[tuple[slice, ...]]:
    """Slices of an array along one axis, each of about `CHUNK` elements, to bound memory."""
    if not shape:
        yield ()
        return
    rows = max(1, CHUNK // max(1, math.prod(shape) // max(1, shape[axis])))
    for start in range(0, shape[axis], rows):
        yield (*[slice(None)] * axis, slice(start, start + rows))


def check_finite(values: Array, name: str) -> None:
    """Raise `WeightsError` when `values` holds NaN or infinity."""
    if not all(np.isfinite(values[part]).all() for part in chunks(values.shape)):
        raise WeightsError(
            f"{name} holds numbers that are not finite", fix="train or convert the model again"
        )


class Constants:
    """Constants of `graph` in any float type, converted once per type."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._stored = {value: value for value in graph.initializers.values()}
        self._made: dict[tuple[ir.Value, str], ir.Value] = {}
        for node in graph:
            source = self._stored.get(node.inputs[0]) if node.op_type == "Cast" else None
            if source is not None and source.dtype in FLOATS and node.outputs[0].dtype in FLOATS:
                self._stored[node.outputs[0]] = source

    def __contains__(self, value: ir.Value) -> bool:
        return value in self._stored

    def name(self, value: ir.Value) -> str:
        """The name under which a constant is stored."""
        return str(self._stored[value].name)

    def tensor(self, value: ir.Value) -> ir.TensorProtocol:
        """Stored tensor of a constant."""
        found = self._stored[value].const_value
        assert found is not None, f"{value.name} has no value"
        return found

    def as_type(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The constant `value` as an initialiser of type `dtype`."""
        stored = self._stored[value]
        if stored.dtype == dtype:
            return stored
        tensor, name = self.tensor(value), f"{stored.name}.{dtype.name.lower()}"
        return self.make(
            stored,
            name,
            dtype,
            tensor.shape,
            lambda: converted(read(tensor), dtype, str(stored.name)),
        )

    def add(
        self, name: str, dtype: ir.DataType, shape: object, contents: Callable[[], Array]
    ) -> ir.Value:
        """Add a constant that is stored as it is. `contents` is called when it is written."""
        value = self._initializer(name, dtype, shape, contents)
        self._stored[value] = value
        return value

    def make(
        self,
        source: ir.Value,
        name: str,
        dtype: ir.DataType,
        shape: object,
        contents: Callable[[], Array],
    ) -> ir.Value:
        """Add an initialiser derived from `source`. `contents` is called when it is written."""
        key = (source, name)
        if key not in self._made:
            value = self._initializer(name, dtype, shape, contents)
            self._made[key] = value
            self._stored.setdefault(value, self._stored[source])
        return self._made[key]

    def _initializer(
        self, name: str, dtype: ir.DataType, sides: object, contents: Callable[[], Array]
    ) -> ir.Value:
        shape = ir.Shape([int(side) for side in sides])  # type: ignore[attr-defined]

        def tensor() -> ir.TensorProtocol:
            return ir.Tensor(contents(), dtype=dtype, shape=shape, name=name)

        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)
        value.const_value = ir.LazyTensor(tensor, dtype=dtype, shape=shape, name=name)
        self._graph.register_initializer(value)
        return value
