"""The model-local ONNX function, the PyTorch op and the float64 reference are one operator."""

from __future__ import annotations

import numpy as np
import pytest

from mmi_plugins.conformance.calls import draw, draws
from mmi_plugins.conformance.function import FUNCTION, Function
from mmi_plugins.conformance.torch_op import TORCH_OP
from mmi_plugins.operator import TOLERANCES, Call
from mmi_plugins.reference import all_rows, mmfs_reference

pytestmark = pytest.mark.skipif(bool(FUNCTION.missing()), reason=str(FUNCTION.missing()))

BRANCHES = {"gather": FUNCTION, "grid_sample": Function(most_gathered=0)}

# What the function may lose where scores are large: it adds logits and tables in fp32.
FP32_SCORES = 1e-5


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    """rms of error / rms of wanted; where nothing is wanted, the norm of the error."""
    norm = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(got.astype(np.float64) - wanted)) / (norm or 1.0)


def allowed(name: str, call: Call) -> float:
    tolerance = TOLERANCES[call.dtype].relative
    return max(tolerance, FP32_SCORES) if "logits" in name else tolerance


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_function_and_torch_op_agree_with_the_reference(dtype: str, branch: str) -> None:
    for name, call in draws(12, 16, dtype=dtype):
        rows = all_rows(call)
        wanted = mmfs_reference(call, rows)
        function, op = BRANCHES[branch].run(call, rows), TORCH_OP.run(call, rows)
        assert relative(function, wanted) <= allowed(name, call), name
        assert relative(op, wanted) <= TOLERANCES[dtype].relative, name
        # Two roundings to T differ by at most twice what each may differ from the truth.
        assert relative(function, op.astype(np.float64)) <= 2 * allowed(name, call), name


def test_rows_can_be_chosen() -> None:
    call = draw(np.random.default_rng(1), b=2, q=3, h=2)
    rows = all_rows(call)[[7, 0, 11]]
    np.testing.assert_array_equal(
        FUNCTION.run(call, rows), FUNCTION.run(call, all_rows(call))[[7, 0, 11]]
    )
