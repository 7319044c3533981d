"""Growth that is expected of each quantity, as data, and the verdict on a fit."""

from __future__ import annotations

from dataclasses import dataclass

from mmi_bench.scale.cases import (
    DECODE,
    DENOISE,
    ENCODE,
    IMAGES,
    MEMORY,
    PICTURE,
    PREFILL,
    ROWS,
    STEPS,
    TOKENS,
    UNITS,
    VAE,
)
from mmi_bench.scale.fit import Fit

# At most in proportion, above a fixed part; hardly at all.
LINEAR, FLAT = "linear", "flat"

MET, MISSED, UNDECIDED = "met", "missed", "undecided"

# Largest exponent of what is linear.
EXPONENT = 1.1


@dataclass(frozen=True)
class Expectation:
    """Expected growth of a quantity along an axis.

    limit: of the exponent if it is linear, or if it is flat, of the growth by one unit of the axis
    (`UNITS`) relative to the fixed part. why: reason for the expectation.
    """

    quantity: str
    axis: str
    kind: str
    limit: float
    why: str

    def said(self) -> str:
        """The expectation in words."""
        if self.kind == LINEAR:
            return f"linear: exponent <= {self.limit:g}"
        return f"flat: <= {100 * self.limit:g} % per {UNITS[self.axis][1]}"

    def verdict(self, fit: Fit) -> str:
        """`met` or `missed` if the whole interval lies on one side of the limit, `undecided` if the
        limit lies in it."""
        if self.kind == LINEAR:
            found, limit = fit.exponent, self.limit
        else:
            found, limit = fit.growth, self.limit / UNITS[self.axis][0]
        if found is None:  # no fixed part at all: all of it grows
            return MISSED if self.kind == FLAT else UNDECIDED
        if found.high <= limit:
            return MET
        return MISSED if found.low > limit else UNDECIDED


EXPECTATIONS = (
    Expectation(ENCODE, IMAGES, LINEAR, EXPONENT, "each image is encoded once"),
    Expectation(
        PREFILL, IMAGES, FLAT, 0.02, "image values exist before; a token samples a few points each"
    ),
    Expectation(DECODE, IMAGES, FLAT, 0.02, "image values exist before; a token samples a few"),
    Expectation(DENOISE, IMAGES, FLAT, 0.02, "image values are computed when a picture is begun"),
    Expectation(PICTURE, IMAGES, FLAT, 0.02, "its steps hardly depend on the images"),
    Expectation(MEMORY, IMAGES, LINEAR, EXPONENT, "features and values of each image"),
    Expectation(PREFILL, TOKENS, LINEAR, EXPONENT, "attention runs over all slots of the cache"),
    Expectation(DECODE, TOKENS, FLAT, 0.05, "attention runs over all slots of the cache"),
    Expectation(MEMORY, TOKENS, LINEAR, EXPONENT, "keys, values, hidden states and activations"),
    Expectation(ENCODE, ROWS, LINEAR, EXPONENT, "rows share the weights"),
    Expectation(DECODE, ROWS, LINEAR, EXPONENT, "rows share the weights"),
    Expectation(DENOISE, ROWS, LINEAR, EXPONENT, "rows share the weights"),
    Expectation(VAE, ROWS, LINEAR, EXPONENT, "rows share the weights"),
    Expectation(MEMORY, ROWS, LINEAR, EXPONENT, "a KV cache and activations a row"),
    Expectation(PICTURE, STEPS, LINEAR, EXPONENT, "each step is a run of the same graph"),
    Expectation(DENOISE, STEPS, FLAT, 0.02, "each step is a run of the same graph"),
    Expectation(MEMORY, STEPS, FLAT, 0.02, "a step overwrites the last one"),
)


def expectation(quantity: str, axis: str) -> Expectation | None:
    """Expectation of a quantity along an axis, if there is one."""
    found = (one for one in EXPECTATIONS if (one.quantity, one.axis) == (quantity, axis))
    return next(found, None)
