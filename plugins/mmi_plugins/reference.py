"""Reference implementation of the operator in float64 NumPy, with which every kernel is compared.

A row is one (b, q, h): the output of one query and one head. Letters as in `operator`; in shapes,
`rows` counts rows and `corners` the four corners of a bilinear sample.
"""

from __future__ import annotations

import numpy as np

from mmi_plugins.operator import Call

# Gathered float64 numbers that are in memory at a time.
_MAX_NUMBERS = 2**24


def all_rows(call: Call) -> np.ndarray:
    """Every (b, q, h), [rows, 3], h fastest: the order of the output."""
    sizes = call.sizes
    return np.stack(np.unravel_index(np.arange(call.rows), [sizes[x] for x in "bqh"]), 1)


def mmfs_reference(call: Call, rows: np.ndarray | None = None) -> np.ndarray:
    """Outputs [rows, d] of `rows` [rows, 3], by default of all rows; float64 throughout."""
    rows = all_rows(call) if rows is None else rows
    sizes = call.sizes
    numbers = 4 * sizes["m"] * sizes["l"] * sizes["p"] * sizes["d"]
    step = max(1, _MAX_NUMBERS // numbers)
    parts = [_attend(call, rows[start : start + step]) for start in range(0, len(rows), step)]
    return np.concatenate(parts)


def output_of(call: Call, rows: np.ndarray) -> np.ndarray:
    """Outputs [rows, d] of all rows in the operator's shape [b, q, h*d]."""
    sizes = call.sizes
    return rows.reshape(sizes["b"], sizes["q"], sizes["h"] * sizes["d"])


def rows_of(output: np.ndarray, call: Call, rows: np.ndarray) -> np.ndarray:
    """`rows` [rows, 3] of an output [b, q, h*d]: [rows, d]."""
    b, q, h = rows.T
    sizes = call.sizes
    picked: np.ndarray = output.reshape(sizes["b"], sizes["q"], sizes["h"], -1)[b, q, h]
    return picked


def _attend(call: Call, rows: np.ndarray) -> np.ndarray:
    b, q, h = rows.T
    wide = {
        name: array.astype(np.float64) for name, array in call.inputs.items() if name != "value"
    }
    shared_position = call["image_position"].shape[1] == 1
    position = call["image_position"][b, 0 if shared_position else q]  # [rows, m]
    slot = call["image_slot"][b]  # [rows, m]
    visible = (position > 0) & (position < call.sizes["r"])
    visible &= (slot >= 0) & (slot < call.sizes["n"])
    position, slot = np.where(visible, position, 0), np.where(visible, slot, 0)

    reference = wide["reference"][0 if call["reference"].shape[0] == 1 else q]
    moved = wide["offsets"][b, q, h][:, None] + wide["offset_table"][position, h[:, None]]
    location = reference.reshape(-1, 1, 1, 2) + moved / call.base_grid  # [rows, m, p, 2]
    score = wide["logits"][b, q, h][:, None] + wide["logit_table"][position, h[:, None]]
    score = np.where(visible[:, :, None, None], score, -np.inf)  # [rows, m, l, p]
    weight, null_weight = _softmax(score, call.null_slot)

    out = null_weight[:, None] * wide["null_value"][h]  # [rows, d]
    for level, (height, width, start) in enumerate(
        zip(call.level_heights, call.level_widths, call.level_starts, strict=True)
    ):
        cell, share = _corners(location, height, width)  # [rows, m, p, corners]
        share = share * weight[:, :, level, :, None]
        corner = call["value"][slot[:, :, None, None], start + cell, h[:, None, None, None]]
        out += np.einsum("kmpc,kmpcd->kd", share, corner.astype(np.float64))
    return out


def _softmax(score: np.ndarray, null_slot: bool) -> tuple[np.ndarray, np.ndarray]:
    """Weights like `score` [rows, m, l, p], and the null slot's [rows]. All are 0 in a row that has
    neither a visible image nor a null slot."""
    most = score.max(axis=(1, 2, 3), initial=0.0 if null_slot else -np.inf)
    most = np.where(np.isfinite(most), most, 0.0)
    power = np.exp(score - most[:, None, None, None])
    null = np.exp(-most) if null_slot else np.zeros_like(most)
    total = power.sum(axis=(1, 2, 3)) + null
    total = np.where(total > 0, total, 1.0)
    return power / total[:, None, None, None], null / total


def _corners(location: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The four cells [..., corners] around `location` [..., 2], and their shares, 0 outside."""
    pixel = location * (width, height) - 0.5
    # Clipping keeps the integers small and changes no share: far outside is outside.
    low = np.clip(np.floor(pixel), -2, (width, height))
    part = np.where(low == np.floor(pixel), pixel - low, 0.0)
    cells, shares = [], []
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        x, y = low[..., 0] + right, low[..., 1] + down
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        share = np.where(right, part[..., 0], 1 - part[..., 0])
        share = share * np.where(down, part[..., 1], 1 - part[..., 1])
        cells.append(np.where(inside, y * width + x, 0).astype(np.int64))
        shares.append(np.where(inside, share, 0.0))
    return np.stack(cells, -1), np.stack(shares, -1)
