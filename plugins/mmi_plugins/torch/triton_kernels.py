"""Triton kernels of the operator, forward and backward, for training and evaluation on CUDA.

Letters as in `operator`. One program computes one row (b, q, h). It first reads the logits for the
softmax's maximum and sum, then the visible images, level by level: the points of a level and the
channels make one tile, with four gathers from `value`. Hidden images are not read.

The backward pass starts from the inputs alone. Gradients that several rows share (value, both
tables, reference, null value) are added with fp32 atomics, in no fixed order.

Roundings of fp32 that grow with the numbers are compensated: a location is a cell near the
reference point plus a distance, and the distance, as each score, is a sum with its rounding error
beside it. The backward pass leaves this out: gradients are used to a few digits.

`TRITON_INTERPRET=1`, set before triton is imported, runs the same kernels on the CPU.
"""

# Triton reads the annotations of a kernel's arguments, so they cannot be those that mypy wants.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from mmi_plugins.torch.kernel import Gradients, MmfsCall

# Of a level: height, width, first cell; cells that an offset of 1 moves down and across, each as
# the bits of two floats: the upper 12 bits of the number, and the rest.
_WORDS = tl.constexpr(7)

# Sizes of a call, for every kernel and the functions that it calls.
_SIZES = ("Q", "M", "H", "L", "P", "D", "N", "S", "R")


@triton.jit
def _row(Q, M, H, POSITIONS, REFERENCES):
    """This program's row: its index, its head, and its rows of image_slot, image_position and
    reference."""
    row = tl.program_id(0).to(tl.int64)
    head = row % H
    query = (row // H) % Q
    sample = row // H // Q
    own_position = sample * POSITIONS + tl.minimum(query, POSITIONS - 1)
    return row, head, sample * M, own_position * M, tl.minimum(query, REFERENCES - 1)


@triton.jit
def _image(image_slot, image_position, N, R):
    """Slot, position and visibility of the image at the pointers."""
    slot = tl.load(image_slot).to(tl.int64)
    position = tl.load(image_position).to(tl.int64)
    visible = (slot >= 0) & (slot < N) & (position > 0) & (position < R)
    return slot, position, visible


@triton.jit
def _sum(a, b):
    """a + b as two numbers: the fp32 sum and its rounding error (Knuth)."""
    whole = a + b
    part = whole - a
    return whole, (a - (whole - part)) + (b - part)


@triton.jit
def _score(logit, rows, place, live):
    """logit + rows[place], and its rounding error."""
    score, rest = _sum(logit, tl.load(rows + place, mask=live, other=0.0))
    return tl.where(live, score, float("-inf")), rest


@triton.jit
def _softmax(
    image_slot, image_position, logits, logit_table, M, H, L, P, N, R,
    NULL_SLOT: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """Softmax maximum and sum over the visible images of this row; (0, 1) where there are none."""
    level = tl.arange(0, LEVELS)[:, None]
    point = tl.arange(0, POINTS)[None, :]
    live = (level < L) & (point < P)
    logit = tl.load(logits + level * P + point, mask=live, other=0.0).to(tl.float32)
    # The null slot's logit is 0.
    most = tl.zeros((), tl.float32) + (0.0 if NULL_SLOT else float("-inf"))
    total = tl.zeros((), tl.float32) + (1.0 if NULL_SLOT else 0.0)
    for image in range(M):
        slot, position, visible = _image(image_slot + image, image_position + image, N, R)
        if visible:
            place = (position * H * L + level) * P + point
            score, rest = _score(logit, logit_table, place, live)
            higher = tl.maximum(most, tl.max(tl.max(score, 1), 0))
            power = tl.exp((score - higher) + rest)
            total = total * tl.exp(most - higher) + tl.sum(tl.sum(power, 1), 0)
            most = higher
    return tl.where(total > 0, most, 0.0), tl.where(total > 0, total, 1.0)


@triton.jit
def _offsets(offsets, point, live):
    """A row's own offsets along x and along y."""
    x = tl.load(offsets + point * 2, mask=live, other=0.0).to(tl.float32)
    y = tl.load(offsets + point * 2 + 1, mask=live, other=0.0).to(tl.float32)
    return x, y


@triton.jit
def _level(level, number, position, logits, logit_table, point, live, most, total, H, L, P):
    """Level `number` of an image: height, width, first cell, index of its logits in the table, and
    the weights of its points."""
    height = tl.load(level)
    width = tl.load(level + 1)
    start = tl.load(level + 2)
    logit = tl.load(logits + number * P + point, mask=live, other=0.0).to(tl.float32)
    place = (position * H * L + number) * P + point
    score, rest = _score(logit, logit_table, place, live)
    return height, width, start, place, tl.exp((score - most) + rest) / total


@triton.jit
def _upper_bits(x):
    """`x` without the lower half of its 24 bits: a product of two such numbers is exact."""
    return (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)


@triton.jit
def _step(bits):
    """The upper and lower part of the number at `bits`."""
    upper = tl.load(bits).to(tl.float32, bitcast=True)
    return upper, tl.load(bits + 1).to(tl.float32, bitcast=True)


@triton.jit
def _axis(reference, offset, table, side, step, EXACT: tl.constexpr):
    """Along one axis of a level: the lower cell, the share of the upper one, and whether each is
    inside. `EXACT`: compensate the roundings of fp32, at the cost of some registers."""
    near = tl.load(reference).to(tl.float64) * side - 0.5  # fp64 for a few numbers of a row
    whole = tl.floor(near)
    part = (near - whole).to(tl.float32)
    step_upper, step_lower = _step(step)
    if EXACT:
        moved, rest = _sum(offset, table)
        upper = _upper_bits(moved)
        lower = (moved - upper) + rest
        cells, lost = _sum(upper * step_upper, lower * step_upper + moved * step_lower)
        place, rest = _sum(part, cells)
        low = tl.floor(place)
        share = (place - low) + (rest + lost)  # just below 0 or above 1 is right to first order
    else:
        place = part + (offset + table) * (step_upper + step_lower)
        low = tl.floor(place)
        share = place - low
    low += whole.to(tl.float32)
    inside_low = (low >= 0) & (low < side)
    inside_high = (low >= -1) & (low < side - 1)
    low = tl.minimum(tl.maximum(low, -1.0), side)  # small integers also for what is far outside
    return low.to(tl.int32), share, inside_low, inside_high


@triton.jit
def _forward(
    value, image_slot, offsets, logits, offset_table, logit_table, image_position, reference,
    null_value, levels, output, Q, M, H, L, P, D, N, S, R, POSITIONS, REFERENCES,
    NULL_SLOT: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row, head, slots, positions, own_reference = _row(Q, M, H, POSITIONS, REFERENCES)
    image_slot += slots
    image_position += positions
    reference += own_reference * 2
    offsets += row * P * 2
    logits += row * L * P
    offset_table += head * P * 2
    logit_table += head * L * P
    most, total = _softmax(
        image_slot, image_position, logits, logit_table, M, H, L, P, N, R,
        NULL_SLOT, LEVELS, POINTS,
    )  # fmt: skip

    point = tl.arange(0, POINTS)
    live = point < P
    channel = tl.arange(0, CHANNELS)
    in_head = channel < D
    offset_x, offset_y = _offsets(offsets, point, live)
    looked = tl.zeros([POINTS, CHANNELS], tl.float32)
    for image in range(M):
        slot, position, visible = _image(image_slot + image, image_position + image, N, R)
        if visible:
            place = (position * H * P + point) * 2
            table_x = tl.load(offset_table + place, mask=live, other=0.0)
            table_y = tl.load(offset_table + place + 1, mask=live, other=0.0)
            picture = value + (slot * S * H + head) * D
            for level in range(L):
                own = levels + level * _WORDS
                height, width, start, place, weight = _level(
                    own, level, position, logits, logit_table, point, live, most, total, H, L, P
                )
                x, right, in_left, in_right = _axis(
                    reference, offset_x, table_x, width, own + 5, EXACT=True
                )
                y, lower, in_upper, in_lower = _axis(
                    reference + 1, offset_y, table_y, height, own + 3, EXACT=True
                )
                for down in tl.static_range(2):
                    for across in tl.static_range(2):
                        inside = live & (in_lower if down else in_upper)
                        inside = inside & (in_right if across else in_left)
                        share = weight * (lower if down else 1 - lower)
                        share = share * (right if across else 1 - right)
                        share = tl.where(inside, share, 0.0)
                        cell = start + (y + down) * width + (x + across)
                        found = tl.load(
                            picture + (cell * (H * D))[:, None] + channel[None, :],
                            mask=inside[:, None] & in_head[None, :],
                            other=0.0,
                        )
                        looked += share[:, None] * found.to(tl.float32)
    answer = tl.sum(looked, 0)  # [d]
    if NULL_SLOT:
        null = tl.load(null_value + head * D + channel, mask=in_head, other=0.0)
        answer += tl.exp(-most) / total * null
    tl.store(output + row * D + channel, answer.to(output.dtype.element_ty), mask=in_head)


@triton.jit
def _backward(
    grad, value, image_slot, offsets, logits, offset_table, logit_table, image_position, reference,
    null_value, levels, grad_value, grad_offsets, grad_logits, grad_offset_table, grad_logit_table,
    grad_reference, grad_null_value, base_grid, Q, M, H, L, P, D, N, S, R, POSITIONS, REFERENCES,
    NULL_SLOT: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row, head, slots, positions, own_reference = _row(Q, M, H, POSITIONS, REFERENCES)
    image_slot += slots
    image_position += positions
    reference += own_reference * 2
    offsets += row * P * 2
    logits += row * L * P
    offset_table += head * P * 2
    logit_table += head * L * P
    most, total = _softmax(
        image_slot, image_position, logits, logit_table, M, H, L, P, N, R,
        NULL_SLOT, LEVELS, POINTS,
    )  # fmt: skip

    point = tl.arange(0, POINTS)
    live = point < P
    channel = tl.arange(0, CHANNELS)
    in_head = channel < D
    own_grad = tl.load(grad + row * D + channel, mask=in_head, other=0.0).to(tl.float32)
    worth = tl.zeros((), tl.float32)  # sum of weight * (gradient of the sample)
    if NULL_SLOT:
        null = tl.load(null_value + head * D + channel, mask=in_head, other=0.0)
        null_share = tl.exp(-most) / total
        worth += null_share * tl.sum(null * own_grad, 0)
        grad_null_value += head * D + channel
        tl.atomic_add(grad_null_value, null_share * own_grad, mask=in_head, sem="relaxed")

    grad_offset_table += head * P * 2
    grad_logit_table += head * L * P
    offset_x, offset_y = _offsets(offsets, point, live)
    to_offset_x = tl.zeros([POINTS], tl.float32)
    to_offset_y = tl.zeros([POINTS], tl.float32)
    every_level = tl.arange(0, LEVELS)[:, None]
    to_logits = tl.zeros([LEVELS, POINTS], tl.float32)  # sum over images of weight * worth
    for image in range(M):
        slot, position, visible = _image(image_slot + image, image_position + image, N, R)
        if visible:
            own_row = (position * H * P + point) * 2
            table_x = tl.load(offset_table + own_row, mask=live, other=0.0)
            table_y = tl.load(offset_table + own_row + 1, mask=live, other=0.0)
            to_moved_x = tl.zeros([POINTS], tl.float32)
            to_moved_y = tl.zeros([POINTS], tl.float32)
            picture = (slot * S * H + head) * D
            for level in range(L):
                own = levels + level * _WORDS
                height, width, start, place, weight = _level(
                    own, level, position, logits, logit_table, point, live, most, total, H, L, P
                )
                x, right, in_left, in_right = _axis(
                    reference, offset_x, table_x, width, own + 5, EXACT=False
                )
                y, lower, in_upper, in_lower = _axis(
                    reference + 1, offset_y, table_y, height, own + 3, EXACT=False
                )
                to_weight = tl.zeros([POINTS], tl.float32)
                to_x = tl.zeros([POINTS], tl.float32)
                to_y = tl.zeros([POINTS], tl.float32)
                for down in tl.static_range(2):
                    for across in tl.static_range(2):
                        inside = live & (in_lower if down else in_upper)
                        inside = inside & (in_right if across else in_left)
                        share_y = lower if down else 1 - lower
                        share_x = right if across else 1 - right
                        share = tl.where(inside, weight * share_y * share_x, 0.0)
                        cell = start + (y + down) * width + (x + across)
                        at = (cell * (H * D))[:, None] + channel[None, :]
                        mask = inside[:, None] & in_head[None, :]
                        found = tl.load(value + picture + at, mask=mask, other=0.0)
                        dot = tl.sum(found.to(tl.float32) * own_grad[None, :], 1)  # 0 outside
                        tl.atomic_add(
                            grad_value + picture + at,
                            share[:, None] * own_grad[None, :],
                            mask=mask,
                            sem="relaxed",
                        )
                        to_weight += share_y * share_x * dot
                        to_x += share_y * dot if across else -share_y * dot
                        to_y += share_x * dot if down else -share_x * dot
                to_weight = weight * to_weight
                worth += tl.sum(to_weight, 0)
                to_logits += tl.where(every_level == level, to_weight[None, :], 0.0)
                tl.atomic_add(grad_logit_table + place, to_weight, mask=live, sem="relaxed")
                step_x, rest_x = _step(own + 5)
                step_y, rest_y = _step(own + 3)
                to_moved_x += weight * to_x * (step_x + rest_x)
                to_moved_y += weight * to_y * (step_y + rest_y)
            to_offset_x += to_moved_x
            to_offset_y += to_moved_y
            to_row = grad_offset_table + own_row
            tl.atomic_add(to_row, to_moved_x, mask=live, sem="relaxed")
            tl.atomic_add(to_row + 1, to_moved_y, mask=live, sem="relaxed")

    # An offset moves its point on all levels, the reference moves all points.
    grad_offsets += row * P * 2
    own_type = grad_offsets.dtype.element_ty
    tl.store(grad_offsets + point * 2, to_offset_x.to(own_type), mask=live)
    tl.store(grad_offsets + point * 2 + 1, to_offset_y.to(own_type), mask=live)
    grad_reference += own_reference * 2
    tl.atomic_add(grad_reference, tl.sum(to_offset_x, 0) * base_grid, sem="relaxed")
    tl.atomic_add(grad_reference + 1, tl.sum(to_offset_y, 0) * base_grid, sem="relaxed")

    # A logit's gradient is weight * (that of its sample - their weighted mean), now known.
    in_row = every_level * P + point[None, :]
    all_live = (every_level < L) & live[None, :]
    logit = tl.load(logits + in_row, mask=all_live, other=0.0).to(tl.float32)
    for image in range(M):
        slot, position, visible = _image(image_slot + image, image_position + image, N, R)
        if visible:
            place = position * H * L * P + in_row
            score, rest = _score(logit, logit_table, place, all_live)
            mean = tl.exp((score - most) + rest) / total * worth
            to_logits -= mean
            tl.atomic_add(grad_logit_table + place, -mean, mask=all_live, sem="relaxed")
    grad_logits += row * L * P
    tl.store(grad_logits + in_row, to_logits.to(own_type), mask=all_live)


def forward(call: MmfsCall) -> Tensor:
    """Output [b, q, h * d] in `value`'s type."""
    b, q, h = call.logits.shape[:3]
    output = call.value.new_empty(b, q, h * call.value.shape[3])
    with torch.cuda.device_of(output):  # Triton launches on the current device
        _forward[b * q * h,](*_inputs(call), _levels(call), output, **_settings(call))
    return output


def backward(grad: Tensor, call: MmfsCall) -> Gradients:
    """Gradients of all floating inputs, each in its input's shape and type; grad [b, q, h * d]."""
    b, q, h = call.logits.shape[:3]
    shared = {
        name: torch.zeros_like(
            getattr(call, name), dtype=torch.float32, memory_format=torch.contiguous_format
        )
        for name in ("value", "offset_table", "logit_table", "reference", "null_value")
    }
    own = {
        name: getattr(call, name).new_empty(getattr(call, name).shape)
        for name in ("offsets", "logits")
    }
    gradients = (
        shared["value"],
        own["offsets"],
        own["logits"],
        shared["offset_table"],
        shared["logit_table"],
        shared["reference"],
        shared["null_value"],
    )
    with torch.cuda.device_of(grad):
        _backward[b * q * h,](
            grad.contiguous(),
            *_inputs(call),
            _levels(call),
            *gradients,
            float(call.base_grid),
            **_settings(call),
        )
    return (shared["value"].to(call.value.dtype), *gradients[1:])


def warps(points: int, channels: int) -> int:
    """Warps of a tile: eight numbers for each thread, so that the backward pass never spills."""
    return max(1, min(8, points * channels // 256))


def _inputs(call: MmfsCall) -> tuple[Tensor, ...]:
    """The nine inputs in order, contiguous."""
    inputs = (
        call.value,
        call.image_slot,
        call.offsets,
        call.logits,
        call.offset_table,
        call.logit_table,
        call.image_position,
        call.reference,
        call.null_value,
    )
    return tuple(tensor.contiguous() for tensor in inputs)


def _levels(call: MmfsCall) -> Tensor:
    return _levels_on(
        tuple(call.level_heights),
        tuple(call.level_widths),
        float(call.base_grid),
        call.value.device,
    )


@lru_cache(maxsize=64)
def _levels_on(
    heights: tuple[int, ...], widths: tuple[int, ...], base_grid: float, device: torch.device
) -> Tensor:
    """The `_WORDS` of every level, [l, 7], int32."""
    sides = np.stack([heights, widths], 1)  # [l, 2]
    steps = sides / base_grid
    parts = np.empty((*sides.shape, 2), np.float32)
    parts[..., 0] = (steps.astype(np.float32).view(np.int32) & -4096).view(np.float32)
    parts[..., 1] = steps - parts[..., 0]
    cells = sides.prod(1)
    rows = [sides, (cells.cumsum() - cells)[:, None], parts.reshape(-1, 4).view(np.int32)]
    return torch.from_numpy(np.concatenate(rows, 1).astype(np.int32)).to(device)


def _settings(call: MmfsCall) -> dict[str, object]:
    """The kernels' sizes by name, and the number of warps."""
    _, q, h, l, p = call.logits.shape  # noqa: E741
    n, s, _, d = call.value.shape
    levels, points, channels = (triton.next_power_of_2(size) for size in (l, p, d))
    sizes = (q, call.image_slot.shape[1], h, l, p, d, n, s, call.offset_table.shape[0])
    return {
        **dict(zip(_SIZES, sizes, strict=True)),
        "POSITIONS": call.image_position.shape[1],
        "REFERENCES": call.reference.shape[0],
        "NULL_SLOT": call.null_slot,
        "LEVELS": levels,
        "POINTS": points,
        "CHANNELS": channels,
        "num_warps": warps(points, channels),
    }
