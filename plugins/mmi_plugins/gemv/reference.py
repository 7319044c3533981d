"""Reference of `mmi::WeightOnlyMatMul` in float64, with which kernels are compared."""

from __future__ import annotations

import numpy as np

from mmi_plugins.gemv.operator import GemvCall


def gemv_reference(call: GemvCall) -> np.ndarray:
    """Output [rows, out], float64."""
    scales = call.scales.astype(np.float64)
    per_row = np.repeat(scales, call.block, 0) if call.block else scales
    product: np.ndarray = call.input.astype(np.float64) @ (
        call.numbers.astype(np.float64) * per_row
    )
    return product
