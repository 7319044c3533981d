"""The operator's definition: the float64 reference against loops, and what a call must be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmi_deploy.errors import EngineError
from mmi_plugins.cases import SITUATIONS, draw, draws, read_case, rounded, write_case
from mmi_plugins.operator import INPUT_SHAPES, Call
from mmi_plugins.reference import all_rows, attention, output_of
from references.mmfs_float64 import operator


def attributes(call: Call) -> dict[str, Any]:
    names = ("level_heights", "level_widths", "base_grid", "null_slot")
    return {name: getattr(call, name) for name in names}


@pytest.mark.parametrize("seed", range(3))
def test_the_reference_is_the_specification_in_loops(seed: int) -> None:
    for name, call in draws(seed, len(SITUATIONS), d=8, p=3, h=2, q=3):
        expected = operator(**call.inputs, **attributes(call))
        np.testing.assert_allclose(
            output_of(call, attention(call)), expected, atol=1e-12, err_msg=name
        )


def test_some_rows_are_those_of_all() -> None:
    call = draw(np.random.default_rng(0), q=17, h=2, b=2)
    rows = all_rows(call)
    chosen = np.array([3, 40, 5])
    np.testing.assert_array_equal(attention(call, rows[chosen]), attention(call)[chosen])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rounding_is_to_the_nearest_number_of_the_type(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    numbers = np.random.default_rng(0).normal(size=4096).astype(np.float32) * 30
    expected = torch.from_numpy(numbers).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(rounded(numbers, dtype), expected)


def test_a_case_survives_its_file(tmp_path: Path) -> None:
    for index, (_, call) in enumerate(draws(1, 6)):
        path = tmp_path / f"{index}.npz"
        expected = output_of(call, attention(call))
        write_case(path, call, expected)
        read, found = read_case(path)
        np.testing.assert_array_equal(found, expected)
        assert attributes(read) == attributes(call) and read.dtype == call.dtype
        for name in INPUT_SHAPES:
            np.testing.assert_array_equal(read[name], call[name])


def changed(call: Call, **inputs: np.ndarray) -> Call:
    return replace(call, inputs={**call.inputs, **inputs})


def test_contradictions_are_refused_in_one_line() -> None:
    call = draw(np.random.default_rng(0), b=2, q=3, h=2, p=4, d=16, levels=[(4, 4), (2, 2)], m=2)
    value, slot, logits = call["value"], call["image_slot"], call["logits"]
    tries: list[tuple[str, Any]] = [
        ("differ in h", lambda: changed(call, value=np.concatenate([value, value], 2))),
        ("differ in b", lambda: changed(call, image_slot=slot[:1])),
        ("wrong rank of logits", lambda: changed(call, logits=logits[0])),
        ("wrong type of image_slot", lambda: changed(call, image_slot=slot.astype(np.int64))),
        ("wrong type of value", lambda: changed(call, value=value.astype(np.float64))),
        ("a row for all queries", lambda: changed(call, reference=np.zeros((2, 2), np.float32))),
        ("make up the cells", lambda: replace(call, level_heights=(4, 3))),
        ("number of levels", lambda: replace(call, level_heights=(4,))),
        ("base_grid", lambda: replace(call, base_grid=0.0)),
        ("base_grid", lambda: replace(call, base_grid=float("nan"))),
        ("unknown type", lambda: replace(call, dtype="int8")),
        (
            "empty axes m",
            lambda: changed(
                call, image_slot=slot[:, :0], image_position=call["image_position"][..., :0]
            ),
        ),
        ("head size", lambda: draw(np.random.default_rng(0), d=20)),
        ("head size", lambda: draw(np.random.default_rng(0), d=136)),
        ("too many points", lambda: draw(np.random.default_rng(0), p=17)),
        ("too many levels", lambda: draw(np.random.default_rng(0), levels=[(2, 2)] * 5)),
        ("missing or unknown", lambda: replace(call, inputs={"value": value})),
    ]
    for message, attempt in tries:
        with pytest.raises(EngineError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_files_that_are_no_cases_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"no archive")
    partial = tmp_path / "partial.npz"
    np.savez(partial, value=np.zeros(3))
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, value=np.array([{}], dtype=object))
    for path, message in (
        (broken, "cannot be read"),
        (partial, "are missing"),
        (pickled, "cannot be read"),
    ):
        with pytest.raises(EngineError, match=message):
            read_case(path)
