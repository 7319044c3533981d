"""The kernel's benchmark: what it compares is equal, and what is wrong is not timed."""

from __future__ import annotations

import numpy as np
import pytest

from mmi_bench import kernel
from mmi_bench.statistics import ratios
from mmi_deploy.errors import EngineError
from mmi_plugins.conformance.onnxruntime_kernel import OnnxRuntimeKernel
from mmi_plugins.operator import Call

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def ours() -> OnnxRuntimeKernel:
    found = OnnxRuntimeKernel()
    if reason := found.missing():
        pytest.skip(reason)
    return found


def test_both_implementations_compute_the_same(ours: OnnxRuntimeKernel) -> None:
    found = kernel.compare(40, ours.library, threads=1, repeats=3, seconds=0)
    assert 0 < found.difference < 1e-4
    assert len(found.ours) == len(found.grid_sample) == 3
    assert found.speedup == ratios(found.grid_sample, found.ours)
    shown = kernel.table([found], threads=1)
    assert shown.row_count == 1 and "1 threads" in str(shown.title)


def test_a_baseline_that_computes_something_else_is_refused(
    ours: OnnxRuntimeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = kernel.precomputed

    def shifted(call: Call) -> dict[str, np.ndarray]:
        inputs = honest(call)
        return inputs | {"grid": inputs["grid"] + np.float32(0.01)}

    monkeypatch.setattr(kernel, "precomputed", shifted)
    with pytest.raises(EngineError, match="GridSample is wrong at 1 queries"):
        kernel.compare(1, ours.library, threads=1, repeats=1, seconds=0)
