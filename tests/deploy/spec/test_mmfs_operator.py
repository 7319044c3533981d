"""The inputs of the MMFS operator, as its definition and both of its users see them."""

from __future__ import annotations

import pytest

from mmi_deploy.spec.mmfs_operator import FLOAT32_INPUTS, INDEX_INPUTS, INPUT_SHAPES, NARROW_INPUTS


def test_tables_reference_and_null_value_are_always_float32() -> None:
    names = list(INPUT_SHAPES)
    assert [names[position] for position in FLOAT32_INPUTS] == [
        "offset_table",
        "logit_table",
        "reference",
        "null_value",
    ]
    assert {*NARROW_INPUTS, *INDEX_INPUTS} == {names[position] for position in (0, 1, 2, 3, 6)}


def test_precision_and_byte_counts_read_the_same_positions() -> None:
    pytest.importorskip("onnx_ir")
    from mmi_deploy.analysis import stored_bytes
    from mmi_deploy.spec.graphs import MMFS_OPERATOR
    from mmi_deploy.targets.precision import types

    assert types._ALWAYS_FLOAT32[MMFS_OPERATOR] == set(FLOAT32_INPUTS)
    assert stored_bytes.FLOAT32_INPUTS is FLOAT32_INPUTS


def test_the_kernels_read_the_same_definition() -> None:
    from mmi_plugins import operator

    assert operator.INPUT_SHAPES is INPUT_SHAPES and operator.NARROW_INPUTS is NARROW_INPUTS
