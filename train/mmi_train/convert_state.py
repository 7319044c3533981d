"""Published weights into our modules: strict, with every tensor accounted for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from mmi_deploy.errors import WeightsError
from mmi_train.model.unet import UNet
from mmi_train.published import RELEASED_SKIPS, DerivedConstant, published_name, rename

_CONSTANT_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Greatest |stored - computed| of a derived constant, whose values are within [-1, 1]: half
precision rounds them to 11 or 8 bits."""

_SINGLE_TOLERANCE = 1e-5
"""The same for fp32: the published tables come from fp32 angles of up to 64 radians."""

Module = TypeVar("Module", bound=nn.Module)


def convert_state(
    module: nn.Module, published: Mapping[str, Tensor], *, theirs: str = "", ours: str = ""
) -> dict[str, Tensor]:
    """The state dict of `module` made of `published` tensors.

    `theirs` and `ours` are the prefixes that `published` names and the names of `module` lack to be
    names of the whole model. Raises `WeightsError` that names every tensor which is missing, extra
    or misshapen, not finite, or a derived constant of other values than the configuration gives.
    Shapes may differ by leading dimensions of one.
    """
    own = module.state_dict()
    skips = _skips(module)
    constants = dict(module.named_buffers())
    state: dict[str, Tensor] = {}
    extra, wrong = [], []

    def mismatch(name: str, value: Tensor, shape: torch.Size) -> bool:
        if bare_shape(value.shape) != bare_shape(shape):
            wrong.append(f"{name} has shape {list(value.shape)}, expected {list(shape)}")
        elif not _finite(value):
            wrong.append(f"{name} holds NaN or infinity")
        else:
            return False
        return True

    for name, value in published.items():
        try:
            found = rename(theirs + name, skips)
        except WeightsError:
            extra.append(name)
            continue
        target = found.buffer if isinstance(found, DerivedConstant) else found
        target = target.removeprefix(ours) if target.startswith(ours) else ""
        if isinstance(found, DerivedConstant) and target in constants:
            expected = constants[target]
            if not mismatch(name, value, expected.shape) and not _equal(value, expected):
                wrong.append(f"{name} differs from the values that the configuration gives")
        elif isinstance(found, DerivedConstant) or target not in own or target in state:
            extra.append(name)
        else:
            wrong_shape = mismatch(name, value, own[target].shape)
            state[target] = value if wrong_shape else value.reshape(own[target].shape)
    missing = [_their_name(ours + name, theirs, skips) for name in own if name not in state]
    missing += [
        name for name in _constants_of(module, theirs, ours, skips) if name not in published
    ]
    problems = [
        *([f"missing: {', '.join(missing)}"] if missing else []),
        *([f"unknown: {', '.join(extra)}"] if extra else []),
        *wrong,
    ]
    if problems:
        raise WeightsError("the weights do not fit the configuration: " + "; ".join(problems))
    return state


def published_module(
    build: Callable[[], Module],
    published: Mapping[str, Tensor],
    *,
    theirs: str = "",
    ours: str = "",
) -> Module:
    """The module that `build` makes with the weights `published`, for evaluation.

    Shapes are checked before any memory is taken for its parameters. See `convert_state`.
    """
    with torch.device("meta"):
        sketch = build()
    convert_state(sketch, published, theirs=theirs, ours=ours)
    module = build()
    module.load_state_dict(convert_state(module, published, theirs=theirs, ours=ours))
    return module.eval()


def bare_shape(shape: torch.Size) -> tuple[int, ...]:
    """`shape` without its leading dimensions of one."""
    sides = list(shape)
    while sides and sides[0] == 1:
        del sides[0]
    return tuple(sides)


def _skips(module: nn.Module) -> int:
    """How many skip connections the U-Net in `module` has, if there is one."""
    for part in module.modules():
        if isinstance(part, UNet):
            return len(part.look_back) - 1
    return RELEASED_SKIPS


def _constants_of(module: nn.Module, theirs: str, ours: str, skips: int) -> list[str]:
    """Published names of the derived constants that `module` holds as buffers."""
    names = (published_name(ours + name, skips) for name, _ in module.named_buffers())
    return [name.removeprefix(theirs) for name in names if name is not None]


def _finite(value: Tensor) -> bool:
    if value.is_meta or not value.is_floating_point():
        return True
    return bool(torch.isfinite(value).all())


def _equal(value: Tensor, expected: Tensor) -> bool:
    if value.is_meta or expected.is_meta:  # a sketch: only shapes are known
        return True
    if not value.is_floating_point():
        return bool(torch.equal(value.reshape(expected.shape), expected.to(value.dtype)))
    tolerance = _CONSTANT_TOLERANCE.get(value.dtype, _SINGLE_TOLERANCE)
    return bool(
        torch.allclose(
            value.float().reshape(expected.shape), expected.float(), rtol=0.0, atol=tolerance
        )
    )


def _their_name(ours: str, theirs: str, skips: int) -> str:
    name = published_name(ours, skips)
    return name.removeprefix(theirs) if name else f"{ours} (ours)"
