"""Arithmetic in float32 within mixed precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Switch autocast off for a block; shapes alone, on the meta device, know none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
