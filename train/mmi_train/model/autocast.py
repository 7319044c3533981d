"""Mixed precision, and arithmetic in float32 within it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch


def mixed_precision(
    precision: Literal["bf16", "fp32"], device: torch.device
) -> AbstractContextManager:
    """Autocast to bfloat16 for a block, if that is the precision."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


@contextmanager
def without_norm_warnings() -> Iterator[None]:
    """Leave out what PyTorch says of every norm whose weights are float32 in mixed precision."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        yield


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Switch autocast off for a block; shapes alone, on the meta device, know none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
