"""Derivatives of the MMFS operator by float64 finite differences of its float64 reference.

Letters as in `mmi_plugins.operator`. Bilinear samples have kinks where a point crosses from
cell to cell, so the calls drawn here keep every point away from there. Their numbers are multiples
of a power of two, so that float32 holds a step exactly.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mmi_plugins.operator import INDEX_INPUTS, INPUT_SHAPES, Call
from mmi_plugins.reference import mmfs_reference

FLOATING = tuple(name for name in INPUT_SHAPES if name not in INDEX_INPUTS)
STEP = 2.0**-10


def smooth_call(seed: int, *, null_slot: bool, shared: bool) -> Call:
    """A call without a point within 1/32 cell of a kink; `shared`: one position and one reference
    for all queries. Hidden images, slots out of the pool, points outside the map, and one query
    that sees nothing."""
    rng = np.random.default_rng(seed)
    b, q, m, h, p, d, n, r = 2, 2, 3, 2, 3, 8, 3, 5
    heights, widths = (8, 4), (4, 2)
    rows = 1 if shared else q

    def plain(*shape: int) -> np.ndarray:
        return (np.round(rng.normal(size=shape) * 2**12) / 2**12).astype(np.float32)

    def quarters(*shape: int) -> np.ndarray:
        return (rng.integers(-12, 13, shape) / 4).astype(np.float32)

    position = rng.integers(0, r, (b, rows, m))
    position[0, 0], position[1, -1] = (1, 0, r), 0
    inputs = {
        "value": plain(n, 8 * 4 + 4 * 2, h, d),
        "image_slot": np.array([[2, 0, 2], [1, n, -1]], np.int32),
        "offsets": quarters(b, q, h, p, 2),
        "logits": plain(b, q, h, 2, p),
        "offset_table": quarters(r, h, p, 2),
        "logit_table": plain(r, h, 2, p),
        "image_position": position.astype(np.int32),
        # Odd 64ths: with quarters of a base cell, 1/8 cell of the finest axis, odd 32nds of the
        # coarsest.
        "reference": ((2 * rng.integers(0, 32, (rows, 2)) + 1) / 64).astype(np.float32),
        "null_value": plain(h, d),
    }
    return Call(inputs, heights, widths, base_grid=8.0, null_slot=null_slot)


def slope(call: Call, name: str, direction: np.ndarray, grad: np.ndarray) -> float:
    """Derivative of sum(grad * output) when the input `name` moves along `direction` (entries -1,
    0 and 1), grad [b, q, h*d]; exact to about STEP**4."""
    weights = grad.reshape(-1, call.sizes["d"])

    def at(steps: int) -> float:
        moved = (call[name] + steps * STEP * direction).astype(np.float32)
        return float(
            (mmfs_reference(replace(call, inputs={**call.inputs, name: moved})) * weights).sum()
        )

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * STEP)
