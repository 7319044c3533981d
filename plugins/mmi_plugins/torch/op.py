"""PyTorch op of the operator: `torch.ops.mmi.multi_image_deformable_attention`.

One opaque node for autograd, `torch.compile` and `torch.export`. On CUDA, where Triton is
installed, it runs the fused kernels of `triton_kernels`; elsewhere, and in fp64, `kernel`. The
backward pass saves only the inputs. There is no second derivative.

The model has its own definition (`mmi_train.model.deformable`), in tensor algebra that autograd and
the exporter trace. Kernels and exported graphs are compared with it, and with float64; so the two
share no code.

Letters as in `operator`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmi_deploy.errors import EngineError
from mmi_plugins.operator import INDEX_INPUTS, INPUT_SHAPES, NAME, NARROW_INPUTS, Call
from mmi_plugins.torch import kernel
from mmi_plugins.torch.kernel import Gradients, MmfsCall

# Types T of value, offsets and logits. With fp64, for gradient checks, all floats are fp64.
TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_DIFFERENTIABLE = tuple(name for name in INPUT_SHAPES if name not in INDEX_INPUTS)


@torch.library.custom_op("mmi::multi_image_deformable_attention", mutates_args=())
def multi_image_deformable_attention(
    value: Tensor,
    image_slot: Tensor,
    offsets: Tensor,
    logits: Tensor,
    offset_table: Tensor,
    logit_table: Tensor,
    image_position: Tensor,
    reference: Tensor,
    null_value: Tensor,
    level_heights: Sequence[int],
    level_widths: Sequence[int],
    base_grid: float,
    null_slot: bool,
) -> Tensor:
    """Multi-image deformable attention (paper Eq. 4), [b,q,h*d] in `value`'s type.

    value [n,s,h,d] (T); image_slot [b,m] (int32), image of the pool; offsets [b,q,h,p,2] (T), x
    first, in cells of a grid of `base_grid` cells along a side; logits [b,q,h,l,p] (T);
    offset_table [r,h,p,2] and logit_table [r,h,l,p] by image position; image_position [b,q|1,m]
    (int32; 0 hidden, 1 nearest); reference [q|1,2] in [0,1]; null_value [h,d]. Tables, reference
    and null value are fp32. Differentiable, once, in every floating input; gradients come in their
    inputs' types. Raises `EngineError` for inputs that contradict each other or are on different
    devices.
    """
    call = MmfsCall(
        value,
        image_slot,
        offsets,
        logits,
        offset_table,
        logit_table,
        image_position,
        reference,
        null_value,
        tuple(level_heights),
        tuple(level_widths),
        base_grid,
        null_slot,
    )
    _check(call)
    return _implementation(value).forward(call)


@multi_image_deformable_attention.register_fake
def _(*inputs: Any) -> Tensor:
    tensors = dict(zip(INPUT_SHAPES, inputs, strict=False))
    _check_kinds(tensors)
    b, q, h = tensors["offsets"].shape[:3]
    return tensors["value"].new_empty(b, q, h * tensors["value"].shape[3])


_BACKWARD = (
    f"(Tensor grad, {', '.join(f'Tensor {name}' for name in INPUT_SHAPES)}, int[] level_heights, "
    f"int[] level_widths, float base_grid, bool null_slot) -> ({', '.join(['Tensor'] * 7)})"
)


@torch.library.custom_op(
    "mmi::multi_image_deformable_attention_backward", mutates_args=(), schema=_BACKWARD
)
def multi_image_deformable_attention_backward(grad: Tensor, *arguments: Any) -> Gradients:
    """Gradients of the floating inputs, in their order, from `grad` [b,q,h*d]. The other arguments
    are those of the forward call, which has checked them."""
    call = MmfsCall(*arguments)
    return _implementation(call.value).backward(grad, call)


@multi_image_deformable_attention_backward.register_fake
def _(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    given = zip(INPUT_SHAPES, inputs, strict=False)
    return tuple(x.new_empty(x.shape) for name, x in given if name in _DIFFERENTIABLE)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors = len(INPUT_SHAPES)
    ctx.save_for_backward(*inputs[:tensors])
    ctx.attributes = inputs[tensors:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = iter(
        multi_image_deformable_attention_backward(grad, *ctx.saved_tensors, *ctx.attributes)
    )
    of_tensors = [next(found) if name in _DIFFERENTIABLE else None for name in INPUT_SHAPES]
    return (*of_tensors, *(None for _ in ctx.attributes))


multi_image_deformable_attention.register_autograd(_differentiate, setup_context=_keep_inputs)


def _implementation(value: Tensor) -> Any:
    """Module whose `forward` and `backward` run tensors like `value`."""
    if value.is_cuda and value.dtype != torch.float64 and _has_triton():
        from mmi_plugins.torch import triton_kernels

        return triton_kernels
    return kernel


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _check(call: MmfsCall) -> None:
    """Raise `EngineError` unless the inputs agree with each other."""
    tensors = {name: getattr(call, name) for name in INPUT_SHAPES}
    _check_kinds(tensors)
    _check_sizes(
        tuple(tuple(tensor.shape) for tensor in tensors.values()),
        tuple(call.level_heights),
        tuple(call.level_widths),
        call.base_grid,
    )


def _check_kinds(tensors: Mapping[str, Tensor]) -> None:
    """Check types and devices, which are known for fake tensors too."""
    value = tensors["value"]
    if value.dtype not in TYPES:
        names = ", ".join(str(known) for known in TYPES)
        raise EngineError(f"{NAME}: unsupported type of value", expected=names, got=value.dtype)
    wide = torch.promote_types(value.dtype, torch.float32)
    for name, tensor in tensors.items():
        if tensor.device != value.device:
            raise EngineError(
                f"{NAME}: {name} and value are on different devices",
                expected=value.device,
                got=tensor.device,
            )
        expected = value.dtype if name in NARROW_INPUTS else wide
        expected = torch.int32 if name in INDEX_INPUTS else expected
        if tensor.dtype != expected:
            raise EngineError(f"{NAME}: wrong type of {name}", expected=expected, got=tensor.dtype)


@lru_cache(maxsize=1024)
def _check_sizes(
    shapes: tuple[tuple[int, ...], ...],
    level_heights: tuple[int, ...],
    level_widths: tuple[int, ...],
    base_grid: float,
) -> None:
    """Check sizes by the operator's own rules, on broadcast arrays that take no memory."""
    Call(
        {
            name: np.broadcast_to(np.int32(0) if name in INDEX_INPUTS else np.float32(0), shape)
            for name, shape in zip(INPUT_SHAPES, shapes, strict=True)
        },
        level_heights,
        level_widths,
        base_grid,
        null_slot=False,
    )
