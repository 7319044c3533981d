"""Published weights into our modules: strict, with every tensor accounted for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from mmi_deploy.errors import WeightsError
from mmi_train.model.unet import UNet
from mmi_train.model.vit_adapter import resize_positions
from mmi_train.published import RELEASED_SKIPS, DerivedConstant, published_name, rename
from mmi_train.published.vision import POSITION_IDS, POSITION_TABLE
from mmi_train.weights import kind_of

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
    names of the whole model. Raises `WeightsError` that names every tensor which is missing, extra,
    misshapen, of another kind, not finite, or a derived constant of other values than the
    configuration gives. Shapes may differ by leading dimensions of one, and CLIP's position table
    may be that of another image size: it is resized, as the published code does for 448 pixels.
    """
    own = module.state_dict()
    skips = _skips(module)
    constants = dict(module.named_buffers())
    published = _at_own_image_size({**own, **constants}, published, theirs, ours)
    state: dict[str, Tensor] = {}
    extra, wrong = [], []

    def mismatch(name: str, value: Tensor, shape: torch.Size, expected_kind: str = "") -> bool:
        if bare_shape(value.shape) != bare_shape(shape):
            wrong.append(f"{name} has shape {list(value.shape)}, expected {list(shape)}")
        elif expected_kind and kind_of(value) != expected_kind:
            wrong.append(f"{name} holds {kind_of(value)} numbers, expected {expected_kind}")
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
            wrong_shape = mismatch(name, value, own[target].shape, kind_of(own[target]))
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


def _at_own_image_size(
    own: Mapping[str, Tensor], published: Mapping[str, Tensor], theirs: str, ours: str
) -> Mapping[str, Tensor]:
    """`published` with CLIP's position table and ids for the image size of the module `own`."""
    table_name, ids_name = (
        str(published_name(name)).removeprefix(theirs) for name in (POSITION_TABLE, POSITION_IDS)
    )
    table = published.get(table_name)
    wanted = own.get(POSITION_TABLE.removeprefix(ours))
    if table is None or wanted is None or table.ndim != 2 or len(table) == len(wanted):
        return published
    if round((len(table) - 1) ** 0.5) ** 2 != len(table) - 1:
        return published  # no square grid: refused for its shape
    resized = {table_name: resize_positions(table, round((len(wanted) - 1) ** 0.5))}
    ids = published.get(ids_name)
    if ids is not None and bare_shape(ids.shape) == (len(table),):
        if _equal(ids, torch.arange(len(table))):
            resized[ids_name] = torch.arange(len(wanted))
    return {**published, **resized}


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
