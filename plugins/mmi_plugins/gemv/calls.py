"""Random calls of `mmi::WeightOnlyMatMul` for tests."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from mmi_plugins.gemv.operator import GemvCall, numpy_type


def draw(
    rng: np.random.Generator,
    format_: str,
    dtype: str = "float16",
    *,
    rows: int = 1,
    inputs: int = 256,
    outputs: int = 32,
    block: int = 0,
) -> GemvCall:
    """A call with every number of the format, inputs of about 1 and outputs of about 1."""
    kind = numpy_type(dtype)
    if format_ == "float8_e4m3fn":
        bits = rng.integers(0, 256, (inputs, outputs), np.uint8)
        bits[(bits & 0x7F) == 0x7F] = 0x38  # NaN becomes 1
        numbers = bits.view(ml_dtypes.float8_e4m3fn)
    else:
        most = 8 if format_ == "int4" else 128
        numbers = rng.integers(-most, most, (inputs, outputs)).astype(np.int8)
    size = float(np.sqrt((numbers.astype(np.float64) ** 2).mean() * inputs))
    shape = (inputs // block, outputs) if block else (outputs,)
    scales = rng.uniform(0.5, 2.0, shape) / size
    given = rng.normal(size=(rows, inputs))
    return GemvCall(format_, given.astype(kind), numbers, scales.astype(kind))
