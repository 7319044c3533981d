"""How close is close enough, and what is said when it is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mmi_train.golden.units import Unit

Quantity = Literal["forward", "gradient", "loss", "exact"]
Verdict = Literal["pass", "FAIL", "not compared"]

FLOOR = 1e-6
"""Tensors whose greatest entry is smaller are compared as if it were this."""


@dataclass(frozen=True)
class Tolerance:
    """Greatest |error| allowed, as a share of the greatest |expected|, and why that much."""

    relative: float
    reason: str


TOLERANCES: Mapping[Quantity, Tolerance] = {
    "forward": Tolerance(1e-4, "fp32 sums in another order, through tens of layers"),
    "gradient": Tolerance(1e-3, "the same, forwards and backwards, and small terms that cancel"),
    "loss": Tolerance(1e-5, "a mean over thousands of entries: their errors average out"),
    "exact": Tolerance(0.0, "ids, masks and steps are whole numbers"),
}


@dataclass(frozen=True)
class Comparison:
    """One line of the report. `error` and `allowed` are absolute; `detail` says why it failed or
    was not compared."""

    unit: str
    tensor: str
    verdict: Verdict
    error: float | None = None
    allowed: float | None = None
    detail: str = ""


def compare(
    unit: str,
    tensor: str,
    got: Tensor,
    expected: Tensor,
    quantity: Quantity,
    mask: Tensor | None = None,
) -> Comparison:
    """Compare `got` with `expected` where `mask` (bool, over their first dimensions) is true.

    NaN equals NaN and infinity equals itself; otherwise a value that is not finite fails.
    """
    if got.shape != expected.shape:
        detail = f"shape {list(got.shape)} where {list(expected.shape)} is expected"
        return Comparison(unit, tensor, "FAIL", detail=detail)
    got, expected = got.detach().double(), expected.double()
    error = (got - expected).abs()
    same = (got == expected) | (got.isnan() & expected.isnan())
    error = torch.where(same, 0.0, torch.where(error.isfinite(), error, torch.inf))
    counted = torch.ones_like(error, dtype=torch.bool)
    if mask is not None:
        counted &= mask.reshape(mask.shape + (1,) * (error.ndim - mask.ndim))
    if not bool(counted.any()):
        return Comparison(unit, tensor, "not compared", detail="its mask hides every value")
    finite = expected[counted & expected.isfinite()].abs()
    scale = finite.max().item() if finite.numel() else 0.0
    relative = TOLERANCES[quantity].relative
    allowed = relative * max(scale, FLOOR)
    error = torch.where(counted, error, 0.0)
    worst = error.max().item()
    if worst <= allowed:
        return Comparison(unit, tensor, "pass", worst, allowed)
    index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    detail = (
        f"mean error {error.sum().item() / int(counted.sum()):.3g}, worst at {list(index)}: "
        f"got {got[index].item():.7g}, expected {expected[index].item():.7g}; "
        f"{worst / max(scale, FLOOR):.3g} of the greatest would pass, {relative:g} is allowed "
        f"({TOLERANCES[quantity].reason})"
    )
    return Comparison(unit, tensor, "FAIL", worst, allowed, detail)


@dataclass
class Checks:
    """The comparisons of one unit, made while it runs."""

    unit: Unit
    lines: list[Comparison] = field(default_factory=list)

    def wants(self, name: str) -> bool:
        """Whether the unit holds `out.<name>`."""
        return name in self.unit.outputs

    def compare(
        self, name: str, got: Tensor, quantity: Quantity = "forward", mask: Tensor | None = None
    ) -> None:
        """Compare with `out.<name>`, if the unit holds it."""
        if self.wants(name):
            self.lines.append(
                compare(self.unit.name, name, got, self.unit.outputs[name], quantity, mask)
            )

    def skip(self, name: str, reason: str) -> None:
        """List `out.<name>`, if the unit holds it, as not compared."""
        if self.wants(name):
            self.lines.append(Comparison(self.unit.name, name, "not compared", detail=reason))

    def finish(self) -> list[Comparison]:
        """All lines, those of outputs that nobody asked for included."""
        seen = {line.tensor for line in self.lines}
        for name in self.unit.outputs:
            if name not in seen:
                self.skip(name, "the checker knows no output of this name")
        return self.lines
