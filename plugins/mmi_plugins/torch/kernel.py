"""The operator in plain PyTorch, forward and backward: for any device, optimised for the CPU.

Letters as in `operator`. In shapes, bq counts the queries of all batch rows (b * q), chunk those of
a chunk, and corners what a (query, head) reads (l * 2 * 2 * m * p).

The output of a query and a head is a weighted sum of rows of `value`, as of an embedding bag: no
transposition, no copy of an image, no [query, point, channel] tensor. Queries are processed in
chunks, whose intermediate results fit in the cache. The backward pass recomputes a chunk's weights
and corners instead of keeping them.

Two roundings of fp32 would be visible and are avoided: locations, whose error grows with the side
of the level, are fp64 until the cell is subtracted, and scores until their maximum is subtracted.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

# Corners of a chunk in the forward pass; each takes 16 bytes: index, share, temporaries.
MAX_CORNERS = 2**18

# Corners of a chunk in the backward pass: larger, since each chunk adds to the whole gradient of
# `value`.
MAX_CORNERS_BACKWARD = 2**20

# Of value, offsets, logits, offset_table, logit_table, reference and null_value.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class MmfsCall:
    """One call: the operator's inputs and attributes, checked against each other."""

    value: Tensor  # [n, s, h, d]
    image_slot: Tensor  # [b, m]
    offsets: Tensor  # [b, q, h, p, 2]
    logits: Tensor  # [b, q, h, l, p]
    offset_table: Tensor  # [r, h, p, 2]
    logit_table: Tensor  # [r, h, l, p]
    image_position: Tensor  # [b, q|1, m]
    reference: Tensor  # [q|1, 2]
    null_value: Tensor  # [h, d]
    level_heights: Sequence[int]
    level_widths: Sequence[int]
    base_grid: float
    null_slot: bool

    @property
    def wide(self) -> torch.dtype:
        """Type of the computation: fp32, or fp64 for fp64 inputs."""
        return torch.promote_types(self.value.dtype, torch.float32)

    def rows_of_value(self) -> Tensor:
        """`value` as [n * s * h, d] in the type of the computation; a view if that is its own."""
        return self.value.to(self.wide).reshape(-1, self.value.shape[-1])

    def chunks(self, most_corners: int) -> Iterator[tuple[slice, Queries]]:
        """All queries in chunks: the slice of bq, and the inputs of these queries."""
        b, q, h, l, p = self.logits.shape  # noqa: E741
        m, bq = self.image_slot.shape[1], b * q
        slot = self.image_slot[:, None].expand(b, q, m).reshape(bq, m)
        position = self.image_position.expand(b, q, m).reshape(bq, m)
        visible = (slot >= 0) & (slot < self.value.shape[0])
        visible &= (position > 0) & (position < self.offset_table.shape[0])
        slot, position = slot.where(visible, 0), position.where(visible, 0)
        reference = self.reference.expand(q, 2).expand(b, q, 2).reshape(bq, 2)
        offsets, logits = self.offsets.reshape(bq, h, p, 2), self.logits.reshape(bq, h, l, p)
        step = max(1, most_corners // (h * l * 4 * m * p))
        for start in range(0, bq, step):
            part = slice(start, min(start + step, bq))
            yield (
                part,
                Queries(
                    self,
                    slot[part],
                    position[part],
                    visible[part],
                    reference[part].double(),
                    offsets[part].to(self.wide),
                    logits[part].to(self.wide),
                ),
            )


@dataclass(frozen=True)
class Axis:
    """The two cells around every point along one axis of one level, each [chunk, h, m, p]."""

    cell: tuple[Tensor, Tensor]  # int, clamped to the level
    share: tuple[Tensor, Tensor]  # 0 outside the level
    inside: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Queries:
    """A chunk of queries and their inputs."""

    call: MmfsCall
    slot: Tensor  # [chunk, m], 0 where hidden
    position: Tensor  # [chunk, m], 0 where hidden
    visible: Tensor  # [chunk, m]
    reference: Tensor  # [chunk, 2], fp64
    offsets: Tensor  # [chunk, h, p, 2]
    logits: Tensor  # [chunk, h, l, p]

    def weights(self) -> tuple[Tensor, Tensor]:
        """Softmax over all visible points: [l, chunk, h, m, p], and the null slot's [chunk, h]."""
        chunk, h, l, p = self.logits.shape  # noqa: E741
        rows = self.call.logit_table[self.position]  # [chunk, m, h, l, p]
        score = self.logits.new_empty(l, chunk, h, self.slot.shape[1], p, dtype=torch.float64)
        own = self.logits.permute(2, 0, 1, 3).unsqueeze(3).double()
        torch.add(own, rows.permute(3, 0, 2, 1, 4), out=score)
        score.masked_fill_(~self.visible[None, :, None, :, None], -torch.inf)
        most = score.amax((0, 3, 4))  # [chunk, h]
        if self.call.null_slot:
            most.clamp_(min=0)  # the null slot's logit
            null = torch.exp(-most).to(self.logits.dtype)
        else:
            most.masked_fill_(most == -torch.inf, 0)
            null = torch.zeros_like(most, dtype=self.logits.dtype)
        power = score.sub_(most[None, :, :, None, None]).to(self.logits.dtype).exp_()
        total = power.sum((0, 3, 4)) + null
        total.masked_fill_(total == 0, 1)  # no image is visible: every power is 0
        return power.div_(total[None, :, :, None, None]), null.div_(total)

    def axes(self) -> list[tuple[Axis, Axis]]:
        """The cells along x and along y, for every level."""
        call = self.call
        rows = call.offset_table[self.position].transpose(1, 2)  # [chunk, h, m, p, 2]
        sides = (call.level_widths, call.level_heights)
        across, down = (
            [self._axis(location, side) for side in sides[axis]]
            for axis, location in enumerate((self._location(rows, 0), self._location(rows, 1)))
        )
        return list(zip(across, down, strict=True))

    def _location(self, rows: Tensor, axis: int) -> Tensor:
        """Location along one axis, 0 and 1 at the image's borders: [chunk, h, m, p], fp64."""
        location = rows.new_empty(rows.shape[:-1], dtype=torch.float64)
        torch.add(self.offsets[:, :, None, :, axis].double(), rows[..., axis], out=location)
        location /= self.call.base_grid
        return location.add_(self.reference[:, axis, None, None, None])

    def _axis(self, location: Tensor, side: int) -> Axis:
        part = location * side - 0.5
        low = part.floor()
        upper = part.sub_(low).to(self.offsets.dtype)
        lower_cell = low.clamp_(-2, side).int()
        cells, shares, insides = [], [], []
        for cell, share in ((lower_cell, 1 - upper), (lower_cell + 1, upper)):
            inside = (cell >= 0) & (cell < side)
            # Clamped again as integers: a NaN may have turned into any integer.
            cells.append(cell.clamp(0, side - 1))
            shares.append(share.masked_fill_(~inside, 0))
            insides.append(inside)
        return Axis((cells[0], cells[1]), (shares[0], shares[1]), (insides[0], insides[1]))

    def corners(self, weight: Tensor, axes: Sequence[tuple[Axis, Axis]]) -> tuple[Tensor, Tensor]:
        """Rows of `value` (int) and shares of every corner, both [chunk * h, corners]."""
        n, s, h, _ = self.call.value.shape
        kind = torch.int32 if n * s * h < 2**31 else torch.int64
        head = torch.arange(h, dtype=kind, device=self.slot.device).view(h, 1, 1)
        image = self.slot.to(kind)[:, None, :, None] * (s * h) + head  # [chunk, h, m, 1]
        levels = zip(self.call.level_heights, self.call.level_widths, strict=True)
        starts = accumulate((height * width for height, width in levels), initial=0)
        rows, shares = [], []
        for level, ((across, down), start) in enumerate(zip(axes, starts, strict=False)):
            width = self.call.level_widths[level]
            columns = [cell * h for cell in across.cell]
            for line, line_share in zip(down.cell, down.share, strict=True):
                first = torch.add(image + start * h, line, alpha=width * h)
                line_share = line_share * weight[level]
                for column, column_share in zip(columns, across.share, strict=True):
                    rows.append(first + column)
                    shares.append(line_share * column_share)
        bags = self.logits.shape[0] * h
        return torch.stack(rows, 2).view(bags, -1), torch.stack(shares, 2).view(bags, -1)


def forward(call: MmfsCall) -> Tensor:
    """Output [b, q, h * d] in `value`'s type."""
    b, q, h, l, _ = call.logits.shape  # noqa: E741
    value, null_value = call.rows_of_value(), call.null_value.to(call.wide)
    out = call.value.new_empty(b * q, h, call.value.shape[-1])
    for part, queries in call.chunks(MAX_CORNERS):
        weight, null = queries.weights()
        row, share = queries.corners(weight, queries.axes())
        # A bag for each level and corner, added afterwards: short fp32 sums round less.
        bags = -1, row.shape[1] // (4 * l)
        seen = F.embedding_bag(
            row.view(bags), value, per_sample_weights=share.view(bags), mode="sum"
        )
        seen = seen.view(-1, h, 4 * l, out.shape[2]).sum(2)
        out[part] = seen.addcmul_(null[..., None], null_value)
    return out.view(b, q, -1)


def backward(grad: Tensor, call: MmfsCall) -> Gradients:
    """Gradients of all floating inputs, each in its input's shape and type; grad [b, q, h * d]."""
    b, q, h, l, p = call.logits.shape  # noqa: E741
    d, wide = call.value.shape[-1], call.wide
    value, null_value = call.rows_of_value(), call.null_value.to(wide)
    grad_value, grad_null = None, torch.zeros_like(null_value)
    grad_offsets = value.new_empty(b * q, h, p, 2)
    grad_logits = value.new_empty(b * q, h, l, p)
    grad_reference = value.new_empty(b * q, 2)
    grad_offset_table = torch.zeros_like(call.offset_table, dtype=wide)
    grad_logit_table = torch.zeros_like(call.logit_table, dtype=wide)
    for part, queries in call.chunks(MAX_CORNERS_BACKWARD):
        own = grad.reshape(b * q, h, d)[part].to(wide)  # [chunk, h, d]
        weight, null = queries.weights()
        axes = queries.axes()
        row, share = queries.corners(weight, axes)
        grad_value = _add_rows(grad_value, row, share, own.flatten(0, 1), value.shape[0])
        grad_null += torch.einsum("qh,qhd->hd", null, own)

        dot = _dots(own.flatten(0, 1), value, row)
        dot = dot.view(*own.shape[:2], l, 2, 2, -1, p)  # [chunk, h, l, down, across, m, p]
        to_weight, to_moved = _through_corners(call, dot, weight, axes)
        to_null = torch.einsum("qhd,hd->qh", own, null_value)
        to_weight *= weight
        mean = to_weight.sum((0, 3, 4)) + null * to_null  # [chunk, h]
        to_score = to_weight.sub_(weight * mean[None, :, :, None, None])  # [l, chunk, h, m, p]
        grad_logits[part] = to_score.sum(3).permute(1, 2, 0, 3)
        position = queries.position.flatten().long()
        to_rows = to_score.permute(1, 3, 2, 0, 4).flatten(0, 1)  # [chunk * m, h, l, p]
        grad_logit_table.index_add_(0, position, to_rows)

        grad_reference[part] = to_moved.sum((2, 3, 4)).t() * call.base_grid
        grad_offsets[part] = to_moved.sum(3).permute(1, 2, 3, 0)
        to_rows = to_moved.permute(1, 3, 2, 4, 0).flatten(0, 1)  # [chunk * m, h, p, 2]
        grad_offset_table.index_add_(0, position, to_rows)
    assert grad_value is not None  # there is at least one chunk
    gradients = (
        grad_value,
        grad_offsets,
        grad_logits,
        grad_offset_table,
        grad_logit_table,
        grad_reference.view(b, q, 2).sum(0).sum_to_size(call.reference.shape),
        grad_null,
    )
    inputs = (
        call.value,
        call.offsets,
        call.logits,
        call.offset_table,
        call.logit_table,
        call.reference,
        call.null_value,
    )
    return tuple(  # type: ignore[return-value]
        gradient.view(given.shape).to(given.dtype)
        for gradient, given in zip(gradients, inputs, strict=True)
    )


def _through_corners(
    call: MmfsCall, dot: Tensor, weight: Tensor, axes: Sequence[tuple[Axis, Axis]]
) -> tuple[Tensor, Tensor]:
    """Gradients of the weights, [l, chunk, h, m, p], and of the distances from the reference point,
    [2, chunk, h, m, p], x first. `dot` [chunk, h, l, 2, 2, m, p]: gradients of the corners' shares.
    """
    to_weight = torch.empty_like(weight)
    to_moved = weight.new_zeros(2, *weight.shape[1:])
    for level, (across, down) in enumerate(axes):
        left_right = dot[:, :, level].unbind(3)  # each [chunk, h, down, m, p]
        left, right = (side.unbind(2) for side in left_right)
        (x0, x1), (y0, y1) = across.share, down.share
        upper = left[0] * x0 + right[0] * x1
        lower = left[1] * x0 + right[1] * x1
        torch.add(upper * y0, lower * y1, out=to_weight[level])
        to_y = lower * down.inside[1] - upper * down.inside[0]
        to_x = (right[0] * y0 + right[1] * y1) * across.inside[1]
        to_x -= (left[0] * y0 + left[1] * y1) * across.inside[0]
        sides = (call.level_widths[level], call.level_heights[level])
        for axis, slope in enumerate((to_x, to_y)):
            to_moved[axis].addcmul_(slope, weight[level], value=sides[axis] / call.base_grid)
    return to_weight, to_moved


def _add_rows(total: Tensor | None, row: Tensor, share: Tensor, grad: Tensor, rows: int) -> Tensor:
    """`total` [rows, d] plus, at row[i, j], share[i, j] * grad[i].

    PyTorch's index_add_ adds one by one. Sorted by row, the sum is an embedding bag again: for each
    row of `total`, the gradients of all bags that read it.
    """
    sorted_row, order = row.flatten().sort(stable=True)
    counts = torch.bincount(sorted_row, minlength=rows)
    added = F.embedding_bag(
        order // row.shape[1],
        grad,
        F.pad(counts.cumsum(0), (1, 0)),
        per_sample_weights=share.flatten().index_select(0, order),
        mode="sum",
        include_last_offset=True,
    )
    return added if total is None else total.add_(added)


def _dots(grad: Tensor, value: Tensor, row: Tensor) -> Tensor:
    """Dot products of grad[i] and value[row[i, j]]: [i, j]."""
    bags, corners = row.shape
    first = torch.arange(0, bags * corners + 1, corners, dtype=row.dtype, device=row.device)
    if value.device.type != "cpu" or corners > value.shape[0]:
        bag = torch.arange(bags, dtype=row.dtype, device=row.device).repeat_interleave(corners)
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad, value, row.flatten(), first[:-1], bag, 0
        )
    # A sampled matrix product, two to three times as fast as the above. PyTorch takes no more
    # samples than the matrix has elements.
    at = _sparse(first, row.flatten(), value.new_zeros(row.numel()), (bags, value.shape[0]))
    return torch.sparse.sampled_addmm(at, grad, value.t(), beta=0.0).values()


def _sparse(first: Tensor, column: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(first, column, values, size, check_invariants=False)
