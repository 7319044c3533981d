"""Comparison with golden outputs: a tolerance for each kind of quantity, a line for each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from mmi_deploy import parity
from mmi_deploy.parity import Tolerance, Verdict
from mmi_train.golden.units import Unit

Quantity = Literal["forward", "gradient", "loss", "exact"]

# Smallest scale of a tensor: errors are relative to its greatest entry, but at least to this.
FLOOR = 1e-6

TOLERANCES: Mapping[Quantity, Tolerance] = {
    "forward": Tolerance(1e-4, "fp32 sums in another order, over tens of layers", floor=FLOOR),
    "gradient": Tolerance(
        1e-3, "as forward, over two passes, and small terms that cancel", floor=FLOOR
    ),
    "loss": Tolerance(
        1e-5, "a mean over thousands of entries: their errors average out", floor=FLOOR
    ),
    "exact": Tolerance(0.0, "ids, masks and steps are whole numbers", floor=FLOOR),
}


@dataclass(frozen=True)
class Line:
    """One line of the report. error, allowed: absolute. detail: the reason of a failure, or of a
    missing comparison."""

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
) -> Line:
    """Compare `got` with `expected` where `mask` (bool, over the first dimensions) is true.

    NaN equals NaN and infinity equals itself; otherwise a value that is not finite fails.
    """
    found = parity.compare(
        tensor,
        got.detach().double().numpy(),
        expected.double().numpy(),
        TOLERANCES[quantity],
        mask=None if mask is None else mask.numpy(),
        equal_nonfinite=True,
    )
    if found.error is None:
        return Line(unit, tensor, "FAIL", detail=found.flaw)
    if found.verdict == "not compared":
        return Line(unit, tensor, "not compared", detail="its mask hides every value")
    detail = found.describe() if found.verdict == "FAIL" else ""
    return Line(unit, tensor, found.verdict, found.error.max_abs, found.allowed, detail)


@dataclass
class Checks:
    """Comparisons with the golden outputs of one unit, collected while the unit runs."""

    unit: Unit
    lines: list[Line] = field(default_factory=list)

    def wants(self, name: str) -> bool:
        """Return true where the unit has a golden output `out.<name>`."""
        return name in self.unit.outputs

    def compare(
        self, name: str, got: Tensor, quantity: Quantity = "forward", mask: Tensor | None = None
    ) -> None:
        """Compare `got` with `out.<name>`, if the unit has it."""
        if self.wants(name):
            self.lines.append(
                compare(self.unit.name, name, got, self.unit.outputs[name], quantity, mask)
            )

    def skip(self, name: str, reason: str) -> None:
        """Report `out.<name>`, if the unit has it, as not compared."""
        if self.wants(name):
            self.lines.append(Line(self.unit.name, name, "not compared", detail=reason))

    def finish(self) -> list[Line]:
        """All lines; golden outputs that were never compared get a line too."""
        seen = {line.tensor for line in self.lines}
        for name in self.unit.outputs:
            if name not in seen:
                self.skip(name, "the checker knows no output of this name")
        return self.lines
