"""MMFS in loops over float64 numbers: slow, and as close to the paper's text as possible.

`equation_4` is the paper's Eq. 4 with the projections around it; `operator` is the deployment
operator `mmi::MultiImageDeformableAttention`, version 1. The two share the bilinear sample and the
softmax, and no line with the model.

Letters: b batch, q queries, m image slots, l levels, h heads, p points, d channels per head,
n encoded images, s feature cells, r table rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np


def bilinear(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """image [height,width,d] at x, y in [0,1]: cell (i,j) has its centre at ((j+.5)/w, (i+.5)/h);
    outside the image everything is 0."""
    height, width = image.shape[:2]
    column, row = x * width - 0.5, y * height - 0.5
    left, top = int(np.floor(column)), int(np.floor(row))
    total = np.zeros(image.shape[2])
    for i, j in product((top, top + 1), (left, left + 1)):
        if 0 <= i < height and 0 <= j < width:
            total += (1 - abs(row - i)) * (1 - abs(column - j)) * image[i, j]
    return total


def softmax(logits: Sequence[float]) -> np.ndarray:
    powers = np.exp(np.array(logits) - max(logits))
    return powers / powers.sum()


def split_levels(rows: np.ndarray, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """rows [s,...] of one image -> one [height,width,...] per level."""
    maps, start = [], 0
    for height, width in shapes:
        end = start + height * width
        maps.append(rows[start:end].reshape(height, width, *rows.shape[1:]))
        start = end
    return maps


def equation_4(
    weights: Mapping[str, np.ndarray],
    f_q: np.ndarray,
    images: Sequence[np.ndarray],
    reference: np.ndarray,
    *,
    shapes: Sequence[tuple[int, int]],
    heads: int,
    points: int,
    base_grid: float,
) -> np.ndarray:
    """Output features f_o of one query f_q that sees `images`, the nearest first.

    images: each [s,c] before the value projection. Softmax over images, levels and points; the
    sampling points of an image are the same on all of its levels. Names of `weights`: W_q, b_q,
    W_p, b_p, W_A, b_A, W_value, b_value, W_output, b_output, PosEmbed (row m: the m-th nearest).
    """
    levels = len(shapes)
    samples: list[list[np.ndarray]] = [[] for _ in range(heads)]
    logits: list[list[float]] = [[] for _ in range(heads)]
    for m, features in enumerate(images, start=1):
        q_m = weights["W_q"] @ f_q + weights["b_q"] + weights["PosEmbed"][m]
        p_m = (weights["W_p"] @ q_m + weights["b_p"]).reshape(heads, points, 2)
        a_m = (weights["W_A"] @ q_m + weights["b_A"]).reshape(heads, levels, points)
        value = features @ weights["W_value"].T + weights["b_value"]
        maps = split_levels(value.reshape(len(value), heads, -1), shapes)
        for head, level, point in product(range(heads), range(levels), range(points)):
            x, y = reference + p_m[head, point] / base_grid
            samples[head].append(bilinear(maps[level][:, :, head], x, y))
            logits[head].append(a_m[head, level, point])
    width = weights["W_value"].shape[0] // heads
    looked = np.zeros((heads, width))
    for head in range(heads):
        if logits[head]:
            looked[head] = softmax(logits[head]) @ np.stack(samples[head])
    return weights["W_output"] @ looked.reshape(-1) + weights["b_output"]


def operator(
    value: np.ndarray,
    image_slot: np.ndarray,
    offsets: np.ndarray,
    logits: np.ndarray,
    offset_table: np.ndarray,
    logit_table: np.ndarray,
    image_position: np.ndarray,
    reference: np.ndarray,
    null_value: np.ndarray,
    *,
    level_heights: Sequence[int],
    level_widths: Sequence[int],
    base_grid: float,
    null_slot: bool,
) -> np.ndarray:
    """The operator as it is specified, [b,q,h*d]; inputs and attributes by its names."""
    value, offsets, logits = (x.astype(np.float64) for x in (value, offsets, logits))
    offset_table, logit_table = offset_table.astype(np.float64), logit_table.astype(np.float64)
    shapes = list(zip(level_heights, level_widths, strict=True))
    batch, queries, heads, levels, points = logits.shape
    pool, width, rows = value.shape[0], value.shape[3], offset_table.shape[0]
    out = np.zeros((batch, queries, heads, width))
    for b, q, h in np.ndindex(batch, queries, heads):
        scores = [0.0] if null_slot else []
        samples = [null_value[h].astype(np.float64)] if null_slot else []
        for m in range(image_slot.shape[1]):
            slot = image_slot[b, m]
            r = image_position[b, q if image_position.shape[1] > 1 else 0, m]
            if not (0 <= slot < pool and 0 < r < rows):
                continue
            maps = split_levels(value[slot, :, h], shapes)
            start = reference[q if reference.shape[0] > 1 else 0].astype(np.float64)
            for level, p in product(range(levels), range(points)):
                x, y = start + (offsets[b, q, h, p] + offset_table[r, h, p]) / base_grid
                samples.append(bilinear(maps[level], x, y))
                scores.append(logits[b, q, h, level, p] + logit_table[r, h, level, p])
        if scores:
            out[b, q, h] = softmax(scores) @ np.stack(samples)
    return out.reshape(batch, queries, heads * width)
