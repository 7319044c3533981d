"""Comparison of tensors with their expected values: error, tolerance, verdict.

Errors are relative and computed in float64. Two measures are in use:

* `max`: the greatest |got - expected| over the greatest |expected|. For the same arithmetic in
  another order (exported graphs, golden files), where a single wrong entry is a fault.
* `rms`: the root mean square of the error over that of the expected values. For arithmetic in fewer
  bits (quantised graphs, engines, kernels), where the worst entry says little about the rest.

Tolerances of the operator belong to its contract (`mmi_plugins.operator`), those of training
quantities to `mmi_train.golden.compare`; all others stand here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmi_deploy.errors import BundleError

Array = NDArray[Any]
Measure = Literal["max", "rms"]
Verdict = Literal["pass", "FAIL", "not compared"]
Sized = tuple[dict[str, int], "Comparison"]


@dataclass(frozen=True)
class Tolerance:
    """Greatest relative error allowed, and the reason for that much.

    measure: which error is meant, `max` or `rms`. floor: the least scale that an error is divided
    by, for tensors whose values are smaller than their type or purpose resolves.
    """

    relative: float
    reason: str
    measure: Measure = "max"
    floor: float = 0.0


_REORDERED = "fp32 sums in another order, through as many layers as the graph has"

# Exported graphs against PyTorch, by graph. The tiny preset stays below 5e-6; deeper models need
# the rest.
EXPORT_TOLERANCES: Mapping[str, Tolerance] = {
    "vision_encoder": Tolerance(5e-5, _REORDERED),
    "llm_values": Tolerance(2e-5, "fp32 sums in another order, through one norm and one product"),
    "llm": Tolerance(5e-5, _REORDERED),
    "image_condition": Tolerance(5e-5, _REORDERED),
    "unet_values": Tolerance(2e-5, "fp32 sums in another order, through one norm and one product"),
    "denoise_step": Tolerance(5e-5, _REORDERED),
    "denoise_shallow": Tolerance(5e-5, _REORDERED),
    "vae_decoder": Tolerance(5e-5, _REORDERED),
}

# Constants of a published checkpoint, such as position tables, against those computed here, by the
# type in which they are stored. All lie within [-1, 1]: the floor makes the tolerance absolute.
CONSTANT_TOLERANCES: Mapping[str, Tolerance] = {
    "float32": Tolerance(1e-5, "computed from fp32 angles of up to 64 radians", floor=1.0),
    "float16": Tolerance(2e-3, "stored with 11 bits", floor=1.0),
    "bfloat16": Tolerance(2e-2, "stored with 8 bits", floor=1.0),
}

_INT4 = "4 bits: 8 % of a weight"

# Graphs of a target against the portable ones on recorded inputs, by the recipe's precision. All
# but fp32 leave room for models whose activations are less even than those of the tiny one, up to
# twice what SmolLM2-135M shows: see docs/precision.md. What an error of that size means is measured
# on tasks.
PRECISION_TOLERANCES: Mapping[str, Tolerance] = {
    "fp32": Tolerance(1e-5, "the same sums in another order", "rms"),
    "fp16": Tolerance(
        1e-2, "2^-11 a rounding, some hundred of them in a row that partly cancel", "rms"
    ),
    "bf16": Tolerance(
        6e-2, "2^-8 a rounding, some hundred of them in a row that partly cancel", "rms"
    ),
    "int8": Tolerance(
        6e-2,
        "one scale a channel or 32 rows: 0.5 % of a weight, on the CPU as much of an activation",
        "rms",
    ),
    "fp8": Tolerance(1.5e-1, "3 bits of fraction: 2 % of a weight", "rms"),
    "int4": Tolerance(5e-1, _INT4, "rms"),
    "int4-128": Tolerance(5e-1, _INT4, "rms"),
    "int4-awq": Tolerance(5e-1, _INT4, "rms"),
    "int4-awq-128": Tolerance(5e-1, _INT4, "rms"),
    "mixed": Tolerance(5e-1, f"{_INT4} where it is narrowest", "rms"),
}

# fp32 on a GPU, against ONNX Runtime on a CPU: two CPU libraries differ by 4e-6 already, and a GPU
# adds convolutions by transforms, exponentials by ex2 and sums in tiles. Assumed, until gpu-check
# has measured it; products in TF32 would be 5e-4 off.
GPU_FP32 = Tolerance(1e-4, "the same sums in another order, other convolutions", "rms")

# Factor by which the error may be greater on random tokens. They are not text, and some of them
# bring the model to a point where any rounding changes the output.
RANDOM_FACTOR = 5.0

# Greatest tolerance: an error as great as the output would pass any output.
MOST = 0.99


def precision_tolerance(precision: str, recorded: bool, on_gpu: bool = False) -> Tolerance:
    """Tolerance of a recipe, on recorded inputs or on random ones. on_gpu: of an engine there."""
    tolerance = PRECISION_TOLERANCES[precision]
    if on_gpu and precision == "fp32":
        tolerance = GPU_FP32
    if recorded:
        return tolerance
    return replace(tolerance, relative=min(RANDOM_FACTOR * tolerance.relative, MOST))


@dataclass(frozen=True)
class Error:
    """Statistics of |got - expected| and of |expected| over `count` entries; 0 where there are
    none. worst: index of the greatest error, the first one of equals."""

    max_abs: float
    mean_abs: float
    rms: float
    expected_max: float
    expected_rms: float
    worst: tuple[int, ...] | None
    count: int

    def scale(self, measure: Measure, floor: float = 0.0) -> float:
        """Value that the error is divided by: at least `floor`, and 1 where all expected values are
        0, so that the error counts as it is."""
        scale = self.expected_max if measure == "max" else self.expected_rms
        return max(scale, floor) or 1.0

    def relative(self, measure: Measure, floor: float = 0.0) -> float:
        """Relative error; NaN where there are no entries."""
        if not self.count:
            return float("nan")
        return (self.max_abs if measure == "max" else self.rms) / self.scale(measure, floor)


def error_of(
    got: Array, expected: Array, mask: Array | None = None, *, equal_nonfinite: bool = False
) -> Error:
    """Error of `got` against `expected`, of one shape, where `mask` (bool, over their first
    dimensions) is true.

    The error of a value that is not finite is infinite. equal_nonfinite: unless both are NaN, or
    both the same infinity. Integers are compared exactly. Statistics of `expected` are those of its
    finite values.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(got.astype(np.float64) - expected.astype(np.float64))
        if _kind(got) == _kind(expected) == "integer":
            # Neighbours beyond 2^53 are one number in float64.
            difference = np.where(got == expected, 0.0, np.maximum(difference, 1.0))
        elif equal_nonfinite:
            same = (got == expected) | (np.isnan(got) & np.isnan(expected))
            difference = np.where(same, 0.0, difference)
        difference = np.where(np.isfinite(difference), difference, np.inf)
        counted = _counted(mask, difference.shape)
        found, wanted = difference[counted], expected[counted].astype(np.float64)
        wanted = np.abs(wanted[np.isfinite(wanted)])
        if not found.size:
            return Error(0.0, 0.0, 0.0, 0.0, 0.0, None, 0)
        at = int(np.where(counted, difference, -1.0).argmax())
        return Error(
            max_abs=float(found.max()),
            mean_abs=float(found.mean()),
            rms=_rms(found),
            expected_max=float(wanted.max(initial=0.0)),
            expected_rms=_rms(wanted) if wanted.size else 0.0,
            worst=tuple(int(i) for i in np.unravel_index(at, difference.shape)),
            count=found.size,
        )


def _counted(mask: Array | None, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    if mask is None:
        return np.ones(shape, np.bool_)
    wide = np.asarray(mask, np.bool_).reshape(mask.shape + (1,) * (len(shape) - mask.ndim))
    return np.broadcast_to(wide, shape)


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _kind(array: Array) -> str:
    """Bool, integer or float; the type's own name for what cannot be compared."""
    if array.dtype == np.bool_:
        return "bool"
    if np.issubdtype(array.dtype, np.integer):
        return "integer"
    # bfloat16 and its like are not numpy's own, and convert.
    real = np.issubdtype(array.dtype, np.floating) or (
        array.dtype.kind == "V" and np.can_cast(array.dtype, np.float64)
    )
    return "float" if real else str(array.dtype)


@dataclass(frozen=True)
class Comparison:
    """One tensor compared with its expected values. got, expected: the values at the worst index.
    flaw: why no error could be computed, such as another shape."""

    name: str
    tolerance: Tolerance
    error: Error | None = None
    got: float = float("nan")
    expected: float = float("nan")
    flaw: str = ""

    @property
    def relative(self) -> float:
        """Error in the tolerance's measure, and so the tolerance that would have passed. Infinite
        where the tensors cannot be compared, NaN where nothing was."""
        if self.error is None:
            return float("inf")
        return self.error.relative(self.tolerance.measure, self.tolerance.floor)

    @property
    def share(self) -> float:
        """Relative error as a share of the tolerance: at most 1 where it passes."""
        return self.relative / self.tolerance.relative

    @property
    def allowed(self) -> float:
        """The absolute error that the tolerance allows."""
        assert self.error is not None, self.flaw
        scale = self.error.scale(self.tolerance.measure, self.tolerance.floor)
        return self.tolerance.relative * scale

    @property
    def verdict(self) -> Verdict:
        if self.error is not None and not self.error.count:
            return "not compared"
        return "pass" if self.relative <= self.tolerance.relative else "FAIL"

    @property
    def passed(self) -> bool:
        return self.verdict == "pass"

    def describe(self) -> str:
        """Mean and worst error, and the tolerance that would have passed, for a person to read."""
        if self.error is None:
            return self.flaw
        if not self.error.count:
            return "there is nothing to compare"
        what = "the greatest" if self.tolerance.measure == "max" else "the rms"
        return (
            f"mean error {self.error.mean_abs:.3g}, worst at {list(self.error.worst or ())}: "
            f"got {self.got:.7g}, expected {self.expected:.7g}; "
            f"{self.relative:.3g} of {what} would pass, {self.tolerance.relative:g} is allowed "
            f"({self.tolerance.reason})"
        )


def compare(
    name: str,
    got: Array,
    expected: Array,
    tolerance: Tolerance,
    *,
    mask: Array | None = None,
    equal_nonfinite: bool = False,
) -> Comparison:
    """Compare one tensor; `mask` and `equal_nonfinite` as in `error_of`.

    Fails for another shape and for another kind of element (bool, integer or float); how wide the
    elements are makes no difference.
    """
    if got.shape != expected.shape:
        flaw = f"shape {list(got.shape)} where {list(expected.shape)} is expected"
        return Comparison(name, tolerance, flaw=flaw)
    if _kind(got) != _kind(expected) or _kind(got) not in ("bool", "integer", "float"):
        flaw = f"dtype {got.dtype} where {expected.dtype} is expected"
        return Comparison(name, tolerance, flaw=flaw)
    error = error_of(got, expected, mask, equal_nonfinite=equal_nonfinite)
    if error.worst is None:
        return Comparison(name, tolerance, error)
    return Comparison(name, tolerance, error, float(got[error.worst]), float(expected[error.worst]))


def compare_outputs(
    got: Mapping[str, Array], expected: Mapping[str, Array], tolerance: Tolerance
) -> Comparison:
    """Compare every tensor of `expected`; returns the one with the greatest relative error."""
    return worst_of(
        [
            compare(name, got[name], value, tolerance)
            if name in got
            else Comparison(name, tolerance, flaw=f"there is no output {name}")
            for name, value in expected.items()
        ]
    )


def worst_of(comparisons: Sequence[Comparison]) -> Comparison:
    """The comparison with the greatest relative error; one that compared nothing only where none
    did."""
    compared = [one for one in comparisons if one.verdict != "not compared"]
    return max(compared or comparisons, key=lambda one: one.relative)


def _rank(error: float) -> float:
    """Sort key of errors; NaN (nothing compared) ranks as infinite."""
    return float("inf") if isnan(error) else error


@dataclass(frozen=True)
class Case:
    """One comparison as a receipt holds it: sizes of the dynamic dimensions, relative error, the
    error allowed. Raises `ValueError` for numbers that no comparison gives; a tolerance above 1
    would allow an error as great as the output."""

    sizes: dict[str, int]
    error: float
    tolerance: float

    def __post_init__(self) -> None:
        if any(not 0 <= size <= 2**32 for size in self.sizes.values()):
            raise ValueError("sizes must lie between 0 and 2^32")
        if self.error < 0:  # NaN is written, and does not pass
            raise ValueError("error must not be negative")
        if not 0 < self.tolerance <= 1:
            raise ValueError("tolerance must lie in (0, 1]")

    @property
    def passed(self) -> bool:
        """A NaN error does not pass."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Proof:
    """All comparisons of one graph, each with the sizes of the dynamic dimensions."""

    graph: str
    compared_with: str
    comparisons: tuple[Sized, ...]

    @property
    def cases(self) -> tuple[Case, ...]:
        """The comparisons in the form that a receipt stores."""
        return tuple(
            Case(sizes, one.relative, one.tolerance.relative) for sizes, one in self.comparisons
        )

    @property
    def error(self) -> float:
        """The greatest relative error of all cases; NaN where one compared nothing."""
        return max((case.error for case in self.cases), key=_rank)

    @property
    def passed(self) -> bool:
        return bool(self.comparisons) and all(one.passed for _, one in self.comparisons)

    @property
    def worst(self) -> Sized:
        """The comparison that is nearest to failing, or fails by most."""
        return max(self.comparisons, key=lambda sized: _rank(sized[1].share))

    def check(self, what: str, fix: str) -> None:
        """Raise `BundleError` for the first case that failed; `what` and `fix` word the error."""
        for sizes, one in self.comparisons:
            if not one.passed:
                raise BundleError(
                    f"{what} at {sizes}",
                    expected=f"a relative error of at most {one.tolerance.relative:g}",
                    got=f"{one.relative:.3g} in {one.name} ({one.describe()})",
                    fix=fix,
                )
