"""Devices that a run trains on."""

from __future__ import annotations

import torch

from mmi_deploy.errors import ConfigError


def device_called(name: str) -> torch.device:
    """Device `cpu`, `cuda`, or `auto`: the GPU if PyTorch sees one. Raises `ConfigError`.

    On a GPU float32 products outside autocast may use TF32, which is far faster and rounds their
    inputs to 10 bits; weights, losses and the optimiser stay in float32.
    """
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ConfigError(
            "PyTorch sees no GPU",
            got=f"torch {torch.__version__}",
            fix="train on the CPU with --device cpu, or install a build of torch for your driver",
        )
    if name == "cpu" or not found:
        return torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    return torch.device("cuda", torch.cuda.current_device())
