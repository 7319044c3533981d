"""Every implementation of the operator on the same cases, within the tolerance of its type."""

from __future__ import annotations

import numpy as np
import pytest

from mmi_plugins.conformance.calls import SITUATIONS, draw, draws
from mmi_plugins.conformance.check import check
from mmi_plugins.conformance.implementations import IMPLEMENTATIONS, Implementation
from mmi_plugins.operator import Call
from mmi_plugins.reference import mmfs_reference, output_of

# Runs a kernel instruction by instruction in NumPy: few cases, a few rows of each.
NUMPY = ("emulator",)


def ready(name: str) -> Implementation:
    try:
        implementation = IMPLEMENTATIONS[name]()
        reason = implementation.missing()
    except ImportError as error:
        reason = f"{error.name} is not installed"
    if reason:
        pytest.skip(f"{name}: {reason}")
    return implementation


def cases(few: bool) -> list[tuple[str, Call]]:
    """Every situation; the levels of the published model's language side; a large map."""
    if few:
        return list(draws(40, len(SITUATIONS), q=3, h=2, b=1, m=2, d=16, p=4))
    rng = np.random.default_rng(5)
    sizes = {"b": 1, "m": 2, "n": 3, "r": 4, "d": 64, "p": 8, "references": True}
    published = draw(rng, q=9, h=2, levels=[(32, 32), (16, 16), (8, 8)], base_grid=16.0, **sizes)
    large = draw(
        rng, q=40, h=1, levels=[(64, 64), (32, 32)], base_grid=8.0, dtype="float32", **sizes
    )
    return [*draws(41, 5 * len(SITUATIONS)), ("published levels", published), ("64x64", large)]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_within_the_tolerance_of_its_type(name: str) -> None:
    implementation = ready(name)
    wrong = []
    for case, call in cases(name in NUMPY):
        verdict = check(case, call, output_of(call, mmfs_reference(call)), implementation)
        if verdict.word != "passed":
            wrong.append((case, call.dtype, verdict.word, verdict.relative, verdict.reason))
    assert not wrong
