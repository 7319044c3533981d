"""The whole comparison on the shipped model: parity at real size too, as a round is refused unless
both backends write and draw the same (20 steps, guidance 3.5, four pictures in context)."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from exports import SHIPPED, Exported
from mmi_bench.compare import compare
from mmi_bench.compare.backends import PYTORCH, RUNTIME
from mmi_bench.compare.cases import DOCUMENT, TEXT, text_after


@pytest.mark.slow
def test_a_quick_comparison_of_the_shipped_model(
    exported_once: Callable[[str], Exported],
) -> None:
    shipped = exported_once(SHIPPED)
    bundle = shipped.bundle
    stages: list[tuple[str, int, int, str]] = []
    result = compare.run(
        bundle.folder,
        shipped.folder,
        quick=True,
        threads=1,
        progress=lambda *stage, detail: stages.append((*stage, detail)),
    )
    names = [DOCUMENT, TEXT, text_after(0), text_after(8)]
    told = [stage[-1].partition(":")[0] for stage in stages]
    # Each backend, one round to warm up, two measured.
    assert told == 3 * [name for name in names for _ in result.backends]
    assert result.about["schedule"] == "unipc:20"  # the first of 20 steps
    assert result.about["bundle_sha256"] == bundle.identity
    assert result.pixel_difference <= 1
    assert result.backends == (RUNTIME, PYTORCH)
    for backend in result.backends:
        for name in names:
            assert len(result.samples[backend][name]) == 2
        document = result.samples[backend][DOCUMENT][0]
        assert len(document.step_gaps) == 19 and len(document.token_gaps) == 3
        assert 0 < document.first_token < document.seconds
        assert result.peak_bytes[backend] > 50e6
    # The four given images together; nothing asks for the drawn one.
    assert len(result.samples["runtime"][DOCUMENT][0].stages["encode"]) == 1
    assert json.loads(json.dumps(result.to_json()))["metrics"]["whole turn"]["speedup"]
