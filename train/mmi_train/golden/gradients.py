"""Check of the gradients of the training loss, with bounds where they are discontinuous.

Bilinear sampling is continuous, but its derivative jumps where a point crosses from one cell of a
map into the next. For a point on such a border, within the rounding of fp32, two correct
computations may take the derivatives of different cells. Such entries are identified by moving all
points by about that rounding: the expected gradient may lie anywhere between the results. All other
entries must agree as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from mmi_train.checkpoint_import.published import DerivedConstant, rename
from mmi_train.golden.compare import Checks, Line, compare
from mmi_train.golden.units import UnitError
from mmi_train.model.interactions import DeformableAttention
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.model.mmfs import Mmfs

_PREFIX = "grad."

# Distance that points are moved, relative to a map's side: a few roundings of a location in fp32.
REACH = 4e-7

# Index of the forward argument that is the reference of the sampling points.
_REFERENCE = {Mmfs: 4, DeformableAttention: 1}


def check_gradients(
    checks: Checks, model: MMInterleaved, loss: Tensor | None, again: Callable[[], Tensor | None]
) -> None:
    """Compare the gradients of `loss` with `out.grad.<name>`; `again` recomputes the loss."""
    names = [name for name in checks.unit.outputs if name.startswith(_PREFIX)]
    if not names:
        return
    if loss is None:
        raise UnitError("has gradients but no loss", expected="out.loss_<data set>")
    parameters = _parameters(checks, model, names)
    lines = {}
    for name, gradient in _gradients(loss, parameters).items():
        lines[name] = _compare(checks, name, gradient)
    doubtful = {
        name: parameters[name]
        for name, line in lines.items()
        if line.verdict == "FAIL" and line.error is not None  # a wrong shape has no error
    }
    if doubtful:
        bounds = gradient_bounds(model, lambda: _gradients(_loss(again), doubtful))
        for name, (least, greatest) in bounds.items():
            expected = checks.unit.outputs[name].view_as(least)
            line = _compare(checks, name, expected.clamp(least, greatest))
            if line.verdict == "pass":
                detail = "where sampling points lie on the border of a cell, either side's gradient"
                lines[name] = replace(line, detail=detail)
    checks.lines += lines.values()


def _loss(again: Callable[[], Tensor | None]) -> Tensor:
    loss = again()
    assert loss is not None, "the loss was there the first time"
    return loss


def _parameters(checks: Checks, model: MMInterleaved, names: list[str]) -> dict[str, nn.Parameter]:
    """Our parameter of each stored gradient; our constants are listed as not compared."""
    skips = len(model.image_decoder.unet.look_back) - 1
    own, found = dict(model.named_parameters()), {}
    for name in names:
        ours = rename(name.removeprefix(_PREFIX), skips)
        if isinstance(ours, DerivedConstant):
            checks.skip(name, "a constant here, not a parameter")
        elif ours in own:
            found[name] = own[ours]
        else:
            raise UnitError(f"has out.{name}, a gradient without a parameter in this configuration")
    return found


def _gradients(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradient of each parameter, zeros where the loss does not depend on it."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
    }


def _compare(checks: Checks, name: str, gradient: Tensor) -> Line:
    expected = checks.unit.outputs[name]
    if expected.numel() == gradient.numel():  # leading dimensions of one may differ
        gradient = gradient.reshape(expected.shape)
    return compare(checks.unit.name, name, gradient, expected, "gradient")


def gradient_bounds(
    model: nn.Module, gradients: Callable[[], Mapping[str, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Least and greatest gradients of `model` with all points moved by `REACH` in four
    directions."""
    found = []
    for x in (-REACH, REACH):
        for y in (-REACH, REACH):
            with _moved(model, torch.tensor([x, y])):
                found.append(gradients())
    stacked = {name: torch.stack([moved[name] for moved in found]) for name in found[0]}
    return {name: (values.amin(0), values.amax(0)) for name, values in stacked.items()}


@contextmanager
def _moved(model: nn.Module, shift: Tensor) -> Iterator[None]:
    """Move every sampling point of `model` by `shift` (x, y) while the context is open."""
    handles = []
    for module in model.modules():
        for kind, place in _REFERENCE.items():
            if isinstance(module, kind):
                handles.append(module.register_forward_pre_hook(_move_argument(place, shift)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _move_argument(
    place: int, shift: Tensor
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*arguments[:place], arguments[place] + shift, *arguments[place + 1 :])

    return hook
