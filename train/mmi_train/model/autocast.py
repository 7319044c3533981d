"""Mixed precision, and arithmetic in float32 within it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch


@contextmanager
def mixed_precision(precision: Literal["bf16", "fp32"], device: torch.device) -> Iterator[None]:
    """Autocast to bfloat16 for a block, if that is the precision."""
    if precision == "fp32":
        yield
        return
    with warnings.catch_warnings(), torch.autocast(device.type, torch.bfloat16):
        # PyTorch says so of every norm whose weights are float32.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        yield


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Switch autocast off for a block; shapes alone, on the meta device, know none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
