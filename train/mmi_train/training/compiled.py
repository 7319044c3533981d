"""Compiled blocks of the language model (`torch.compile`), without graph breaks."""

from __future__ import annotations

import torch
from torch import nn

from mmi_deploy.errors import ConfigError
from mmi_train.model.mm_interleaved import MMInterleaved


def compile_blocks(model: MMInterleaved, device: torch.device) -> None:
    """Compile the blocks of the language model in place, before their first call. Code that cannot
    be compiled as one graph is an error. Of several ranks each compiles its own, after they have
    been sharded: a block is compiled with its gathering of weights left out. Raises `ConfigError`
    where there is no compiler."""
    check_compiler(device)
    for part in compiled_parts(model):
        part.compile(fullgraph=True)


def compiled_parts(model: MMInterleaved) -> list[nn.Module]:
    """Blocks of the language model; of blocks with MMFS, which stays as it is, attention and
    MLP."""
    return [
        part
        for block in model.llm.blocks
        for part in ([block] if block.look_back is None else [block.self_attn, block.mlp])
    ]


def check_compiler(device: torch.device) -> None:
    """Raise `ConfigError` unless there is a C++ compiler, and for a GPU Triton."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    missing = None
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        missing = "C++ compiler", "install g++, or name one in CXX"
    if device.type == "cuda" and not has_triton():
        missing = "Triton", "install it with: pip install triton"
    if missing is not None:
        what, fix = missing
        raise ConfigError(
            f"--compile needs a {what}, and there is none", fix=f"{fix}; or leave --compile out"
        )
