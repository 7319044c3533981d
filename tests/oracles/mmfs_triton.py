"""Triton kernels in separate processes: Triton chooses between interpreter and compiler when it is
imported."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from mmi_plugins.operator import INPUT_SHAPES, NARROW_INPUTS, Call
from oracles.mmfs_slopes import FLOATING


def interpret() -> None:
    """Start of a process that runs kernels on the CPU."""
    os.environ["TRITON_INTERPRET"] = "1"


def compile_only(cache: str) -> None:
    """Start of a process that compiles them, and keeps what it compiled in `cache`."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache


def _mmfs_call(call: Call) -> Any:
    import torch

    from mmi_plugins.torch.kernel import MmfsCall

    torch.set_num_threads(1)
    own = getattr(torch, call.dtype)
    inputs = {name: torch.from_numpy(np.array(call[name])) for name in INPUT_SHAPES}
    inputs |= {name: inputs[name].to(own) for name in NARROW_INPUTS}
    return MmfsCall(
        **inputs,
        level_heights=call.level_heights,
        level_widths=call.level_widths,
        base_grid=call.base_grid,
        null_slot=call.null_slot,
    )


def forward(call: Call) -> np.ndarray:
    """[b, q, h*d]"""
    from mmi_plugins.torch import triton_kernels

    return triton_kernels.forward(_mmfs_call(call)).float().numpy()


def backward(call: Call, grad: np.ndarray) -> dict[str, np.ndarray]:
    """Gradients by input from `grad` [b, q, h*d]."""
    import torch

    from mmi_plugins.torch import triton_kernels

    call = _mmfs_call(call)
    found = triton_kernels.backward(torch.from_numpy(grad).to(call.value.dtype), call)
    return {name: gradient.float().numpy() for name, gradient in zip(FLOATING, found, strict=True)}


def layer() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Output and gradients of an MMFS layer, by name: with these kernels, and by the definition."""
    from unittest.mock import patch

    import torch

    from mmi_deploy.spec.presets import tiny
    from mmi_plugins.torch import op, triton_kernels
    from mmi_train.model.mmfs import Mmfs
    from mmi_train.training.fused_mmfs import fused_attention

    torch.manual_seed(0)
    config = tiny().llm_mmfs
    module = Mmfs(config, 24, 16, 24, (4, 2), base_grid=3.0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    query, features = torch.randn(1, 2, 24), torch.randn(2, 20, 16)
    slot, position = torch.tensor([[1, 0]]), torch.tensor([[[0, 1], [2, 1]]])
    grad = torch.randn(1, 2, 24)

    def run() -> dict[str, torch.Tensor]:
        module.zero_grad()
        out = module(query, module.values(features), slot, position, torch.full((1, 2), 0.4))
        out.backward(grad)
        found = {"output": out.detach()}
        return found | {n: p.grad.clone() for n, p in module.named_parameters()}

    wanted = run()
    module.operator = fused_attention
    with patch.object(op, "_implementation", lambda value: triton_kernels):
        got = run()
    return {name: (got[name].numpy(), value.numpy()) for name, value in wanted.items()}


def compiled(
    kernel: str, dtype: str, capability: int, points: int, channels: int, ones: bool = False
) -> dict[str, Any]:
    """PTX, registers, stack and local memory of a kernel at 4 levels.

    `ones`: a call with one of everything else; Triton makes constants of arguments that are 1.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mmi_plugins.torch import triton_kernels

    function = getattr(triton_kernels, kernel)
    constants: dict[str, Any] = {"NULL_SLOT": not ones, "LEVELS": 1 if ones else 4}
    constants |= {"POINTS": points, "CHANNELS": channels}
    if ones:
        constants |= dict.fromkeys(["Q", "M", "H", "L", "P", "N", "POSITIONS", "REFERENCES"], 1)
    narrow = {*NARROW_INPUTS, "output", "grad", "grad_offsets", "grad_logits"}
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[dtype]
    signature, aligned = {}, {}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "base_grid":
            signature[name] = "fp32"
        elif name.isupper():
            signature[name] = "i32"
        elif name in ("image_slot", "image_position", "levels"):
            signature[name] = "*i32"
        else:
            signature[name] = "*" + (short if name in narrow else "fp32")
        if signature[name].startswith("*") or name in ("H", "D") and name not in constants:
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, aligned)
    warps = triton_kernels.warps(constants["POINTS"], constants["CHANNELS"])
    built = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}
    )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    binary = Path(os.environ["TRITON_CACHE_DIR"]) / f"{kernel}.{dtype}.{capability}.{points}.cubin"
    binary.write_bytes(built.asm["cubin"])
    said = subprocess.run(
        [tools / "cuobjdump", "--dump-resource-usage", binary],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    figures = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return {"ptx": built.asm["ptx"], **figures}
