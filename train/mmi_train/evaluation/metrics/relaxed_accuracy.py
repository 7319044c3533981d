"""Relaxed accuracy: numbers within 5 % of the right one count, texts must be equal.

Source: Masry et al., "ChartQA" (2022), after Methani et al., "PlotQA" (2020); a percent sign
divides by 100, as in the evaluation of Pix2Struct.
"""

from __future__ import annotations

from math import isfinite

# Largest relative difference of a number that still counts, and the share of it that rounding may
# add: 105 is within 5 % of 100.
TOLERANCE, ROUNDING = 0.05, 1e-12


def relaxed_match(prediction: str, answer: str) -> bool:
    """True for a right answer. An answer of zero, and one that is no number, must be met literally,
    whatever the case of letters."""
    wanted, got = _number(answer), _number(prediction)
    if wanted and got is not None:
        return abs(got - wanted) / abs(wanted) <= TOLERANCE * (1 + ROUNDING)
    return prediction.strip().lower() == answer.strip().lower()


def _number(text: str) -> float | None:
    """The number that a text is; None for another text."""
    bare = text.strip()
    try:
        value = float(bare.removesuffix("%"))
    except ValueError:
        return None
    if not isfinite(value):  # the words nan and inf
        return None
    return value / 100 if bare.endswith("%") else value
