"""The build-only plugin's own checks, without TensorRT: fields and shapes."""

from typing import Any

import numpy as np
import pytest

from mmi_deploy.errors import EngineError
from mmi_plugins.operator import INPUT_SHAPES
from mmi_plugins.tensorrt.build_only_plugin import FIELDS, check_shapes, checked_fields
from oracles.tensorrt_builds import ATTRIBUTES, SIZES


def fields(**changed: Any) -> dict[str, np.ndarray]:
    arrays = {name: np.atleast_1d(np.array(ATTRIBUTES[name], FIELDS[name])) for name in FIELDS}
    return {name: data for name, data in (arrays | changed).items() if data is not None}


def shapes(**changed: int | None) -> list[list[int | None]]:
    sizes: dict[str, int | None] = {**SIZES, "q": 7, "*": 1, **changed}
    return [[sizes[letter] for letter in letters] for letters in INPUT_SHAPES.values()]


def test_right_fields_and_shapes_pass() -> None:
    kept = checked_fields(fields(), needs_version=False)
    assert list(kept) == list(FIELDS)
    check_shapes(shapes(), kept)
    check_shapes(shapes(q=None, m=None, n=None, b=None), kept)
    assert checked_fields(fields(plugin_version=np.array([1], np.int32)), needs_version=True)


@pytest.mark.parametrize(
    ("changed", "needs_version", "reason"),
    [
        ({"null_slot": None}, False, "null_slot; expected one int32; got 0 int32"),
        ({"base_grid": np.array([8])}, False, "base_grid; expected one float32; got 1 int64"),
        ({"base_grid": np.ones(2, np.float32)}, False, "expected one float32; got 2 float32"),
        ({"level_widths": np.ones(5, np.int32)}, False, "expected 1 to 4 int32; got 5 int32"),
        ({"level_widths": np.array([4], np.int32)}, False, "differ in length; got 2 and 1"),
        ({"base_grid": np.array([0], np.float32)}, False, "base_grid is not positive"),
        ({"base_grid": np.array([np.inf], np.float32)}, False, "base_grid is not positive"),
        ({}, True, "other fields; expected version 1.*Build the engine again"),
        ({"plugin_version": np.array([2], np.int32)}, True, r"version 1; got \[2\]"),
    ],
)
def test_wrong_fields_are_refused(
    changed: dict[str, Any], needs_version: bool, reason: str
) -> None:
    with pytest.raises(EngineError, match=reason):
        checked_fields(fields(**changed), needs_version=needs_version)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"d": 36}, "head size; expected a multiple of 8 up to 128; got 36"),
        ({"p": 17}, "too many points; expected 1..16; got 17"),
        ({"s": 21}, "value and the attributes differ in s; expected 20; got 21"),
        ({"l": 3}, "logits and the attributes differ in l; expected 2; got 3"),
        ({"m": 0}, r"image_slot is empty; got \[1, 0\]"),
        ({"*": 3}, r"rows of image_position; expected \(1, 7\); got 3"),
    ],
)
def test_wrong_shapes_are_refused(changed: dict[str, int], reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        check_shapes(shapes(**changed), checked_fields(fields(), needs_version=False))


def test_the_area_of_a_level_may_need_more_than_32_bits() -> None:
    sides = {name: np.array([2**16], np.int32) for name in ("level_heights", "level_widths")}
    with pytest.raises(EngineError, match=f"differ in s; expected {2**32}; got 1"):
        check_shapes(shapes(s=1, l=1), checked_fields(fields(**sides), needs_version=False))


def test_inputs_that_contradict_each_other_are_refused() -> None:
    given = shapes()
    given[3][1] = 6
    with pytest.raises(EngineError, match="logits and offsets differ in q; expected 7; got 6"):
        check_shapes(given, checked_fields(fields(), needs_version=False))
    with pytest.raises(EngineError, match="wrong rank of value; expected 4; got 3"):
        check_shapes([given[0][:3], *given[1:]], checked_fields(fields(), needs_version=False))
