"""Load the model of a run: each of several ranks reads the rows that it is to hold, no others.

The module is built, given its adapters and sharded on the meta device, and filled last.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.training.fused_mmfs import use_fused_mmfs
from mmi_train.training.lora import LoraConfig, add_adapters, stored_name
from mmi_train.training.optimiser import OptimiserConfig, frozen_matrices, parameter_groups
from mmi_train.training.ranks import Ranks, own_rows, shard_of
from mmi_train.weights.lazy_tensor import InFile
from mmi_train.weights.model_folder import WEIGHTS, check_finite, open_model, types_in_memory


def load_for_training(
    folder: Path,
    optimiser: OptimiserConfig,
    precision: Literal["bf16", "fp32"],
    device: torch.device,
    *,
    lora: LoraConfig | None = None,
    checkpoint_gradients: bool = False,
    ranks: Ranks,
) -> MMInterleaved:
    """The model in `folder` on `device`, with new adapters, sharded over `ranks`, and frozen where
    the rules of `optimiser` say so; in mixed precision its frozen matrices in bfloat16.

    Matrices that adapters want in 4 bits are read and quantised one by one, whole on every rank.
    Raises `ConfigError` and `WeightsError`.
    """
    model, stored = open_model(folder)
    lean = frozen_matrices(optimiser.rules) if precision == "bf16" else None
    types = types_in_memory(model, stored, torch.float32, lean)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(types[name])
    if lora is not None:
        add_adapters(model, lora, device, partial(_matrix, folder, stored, types))
    parameter_groups(model, optimiser)  # freezes
    model.checkpoint_gradients(checkpoint_gradients)
    use_fused_mmfs(model, device)
    ranks.shard(model)
    _fill(model, folder, stored, device)
    return model.to(device)  # FSDP takes over the new parameters here


def _matrix(
    folder: Path, stored: Mapping[str, InFile], types: Mapping[str, torch.dtype], layer: str
) -> Tensor:
    name = f"{layer}.weight"
    value = stored[name].read()
    check_finite(name, value, str(folder / WEIGHTS))
    return value.to(types[name])


def _fill(
    model: nn.Module, folder: Path, stored: Mapping[str, InFile], device: torch.device
) -> None:
    """Give each parameter on the meta device its values, this rank's rows of them."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                continue
            source = stored_name(f"{prefix}.{name}" if prefix else name)
            value = own_rows(stored[source], parameter)
            check_finite(source, value, str(folder / WEIGHTS))
            filled = shard_of(parameter, value.to(device, parameter.dtype))
            setattr(module, name, nn.Parameter(filled, parameter.requires_grad))
