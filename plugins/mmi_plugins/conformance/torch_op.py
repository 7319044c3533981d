"""The PyTorch op on the CPU, as an implementation under test."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from mmi_plugins.operator import INPUT_SHAPES, NARROW_INPUTS, Call
from mmi_plugins.reference import rows_of


@dataclass(frozen=True)
class TorchOp:
    """`torch.ops.mmi.multi_image_deformable_attention`."""

    name: str = "torch"
    most_rows: int | None = None

    def missing(self) -> str | None:
        """Reason why it cannot run here, or None."""
        if find_spec("torch"):
            return None
        return "PyTorch is not installed: pip install 'mmi_deploy[train]'"

    def run(self, call: Call, rows: np.ndarray) -> np.ndarray:
        """Outputs [rows, d] of `rows` (b, q, h), [rows, 3]."""
        import torch

        from mmi_plugins.torch.op import multi_image_deformable_attention

        own = getattr(torch, call.dtype)
        tensors = {name: torch.from_numpy(np.array(call[name])) for name in INPUT_SHAPES}
        tensors |= {name: tensors[name].to(own) for name in NARROW_INPUTS}
        output = multi_image_deformable_attention(
            *tensors.values(),
            level_heights=call.level_heights,
            level_widths=call.level_widths,
            base_grid=call.base_grid,
            null_slot=call.null_slot,
        )
        return rows_of(output.float().numpy(), call, rows)


TORCH_OP = TorchOp()
