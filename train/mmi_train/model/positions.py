"""Sin/cos position tables and their bicubic resizing.

Tables are computed in NumPy, and the other constants of modules within `with_values`, so they hold
values even if a module is built on the meta device. Every table is [positions, width] in fp32;
angles are position / 10000^(2i/width).
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def with_values() -> AbstractContextManager:
    """Compute a module's constants on the CPU, wherever its parameters are built: a checkpoint does
    not hold them."""
    return torch.device("cpu")


def _sin_cos(positions: np.ndarray, width: int) -> np.ndarray:
    """Sines of all frequencies, then their cosines: [positions, width]."""
    if width % 2:
        raise ValueError(f"a sin/cos table needs an even width, got {width}")
    frequency = 10000.0 ** (-np.arange(width // 2, dtype=np.float64) / (width // 2))
    angle = positions.astype(np.float64)[:, None] * frequency
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def table_1d(positions: int, width: int) -> Tensor:
    """Position table of a sequence, [positions, width]."""
    return torch.from_numpy(_sin_cos(np.arange(positions), width).astype(np.float32))


def table_2d(side: int, width: int, cells: int | None = None) -> Tensor:
    """Position table of a square grid, [side * side, width], row-major: half of the channels for
    the row, half for the column.

    `cells`: unit cells that the side spans; None: `side`. A coarser table (side < cells) holds the
    positions of its cells' centres on the finer grid, where cell i has position i.
    """
    cells = side if cells is None else cells
    position = (np.arange(side) + 0.5) * (cells / side) - 0.5
    line = _sin_cos(position, width // 2)
    grid = np.concatenate([np.repeat(line, side, axis=0), np.tile(line, (side, 1))], axis=1)
    return torch.from_numpy(grid.astype(np.float32))


def resize_table(table: Tensor, side: int, align_corners: bool = False) -> Tensor:
    """Resize the table of a square grid to [side * side, width], bicubic without antialiasing."""
    old = round(table.shape[0] ** 0.5)
    if old * old != table.shape[0]:
        raise ValueError(f"only a square table can be resized, got {table.shape[0]} positions")
    if old == side:
        return table
    grid = table.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)  # [1, width, old, old]
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=align_corners)
    return grid.permute(0, 2, 3, 1).reshape(side * side, -1).to(table.dtype)


def cell_centres(side: int) -> Tensor:
    """Centres of a square grid's cells in [0, 1], [side * side, 2], row-major, x first."""
    line = (np.arange(side, dtype=np.float32) + 0.5) / side
    return torch.from_numpy(np.stack([np.tile(line, side), np.repeat(line, side)], axis=1))
