"""The operator's definition: the float64 reference against loops, and what a call must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmi_deploy.errors import EngineError
from mmi_plugins.conformance.calls import SITUATIONS, draw, draws, read_case, rounded, write_case
from mmi_plugins.operator import INPUT_SHAPES, Call
from mmi_plugins.reference import all_rows, mmfs_reference, output_of
from oracles.mmfs_float64 import operator


def attributes(call: Call) -> dict[str, Any]:
    names = ("level_heights", "level_widths", "base_grid", "null_slot")
    return {name: getattr(call, name) for name in names}


@pytest.mark.parametrize("seed", range(3))
def test_the_reference_is_the_specification_in_loops(seed: int) -> None:
    for name, call in draws(seed, len(SITUATIONS), d=8, p=3, h=2, q=3):
        expected = operator(**call.inputs, **attributes(call))
        np.testing.assert_allclose(
            output_of(call, mmfs_reference(call)), expected, atol=1e-12, err_msg=name
        )


def test_some_rows_are_those_of_all() -> None:
    call = draw(np.random.default_rng(0), q=17, h=2, b=2)
    rows = all_rows(call)
    chosen = np.array([3, 40, 5])
    np.testing.assert_array_equal(mmfs_reference(call, rows[chosen]), mmfs_reference(call)[chosen])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rounding_is_to_the_nearest_number_of_the_type(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    numbers = np.random.default_rng(0).normal(size=4096).astype(np.float32) * 30
    expected = torch.from_numpy(numbers).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(rounded(numbers, dtype), expected)


def test_a_case_survives_its_file(tmp_path: Path) -> None:
    for index, (_, call) in enumerate(draws(1, 6)):
        path = tmp_path / f"{index}.npz"
        expected = output_of(call, mmfs_reference(call))
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
        (
            "empty axes s, l",
            lambda: replace(
                call,
                inputs={
                    **call.inputs,
                    "value": value[:, :0],
                    "logits": logits[..., :0, :],
                    "logit_table": call["logit_table"][:, :, :0],
                },
                level_heights=(),
                level_widths=(),
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


@pytest.fixture
def arrays(tmp_path: Path) -> dict[str, Any]:
    """A case in bfloat16 as it lies in its file."""
    call = draw(np.random.default_rng(0), levels=[(4, 4), (2, 2)], dtype="bfloat16")
    write_case(tmp_path / "case.npz", call, output_of(call, mmfs_reference(call)))
    with np.load(tmp_path / "case.npz") as file:
        return {name: file[name] for name in file.files}


def test_a_case_may_be_stored_in_other_ways(arrays: dict[str, Any], tmp_path: Path) -> None:
    kinds: dict[str, Any] = {"f": ">f8", "i": "i8"}
    other: dict[str, Any] = {
        name: np.asfortranarray(array, kinds.get(array.dtype.kind))
        for name, array in arrays.items()
    }
    other["value"] = other["value"] * (1 + 2**-12)  # rounds to what it was
    other |= {name: arrays[name].reshape(1) for name in ("base_grid", "null_slot", "dtype")}
    np.savez(tmp_path / "one.npz", **arrays)
    np.savez(tmp_path / "other.npz", **other)
    (one, expected), (call, found) = (read_case(tmp_path / f"{x}.npz") for x in ("one", "other"))
    np.testing.assert_array_equal(found, expected)
    assert attributes(call) == attributes(one) and call.dtype == one.dtype == "bfloat16"
    for name in INPUT_SHAPES:
        np.testing.assert_array_equal(call[name], one[name])


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("dtype", lambda x: np.array("float8"), "unknown type.* got float8"),
        ("dtype", lambda x: np.zeros(0), "dtype must be one value; got 0"),
        ("base_grid", lambda x: np.array(1e300), "base_grid must be positive; got inf"),
        ("null_slot", lambda x: np.array(2), "null_slot must be 0 or 1; got 2"),
        ("level_heights", lambda x: x + 0.5, "level_heights must hold whole numbers"),
        ("level_heights", lambda x: x * np.nan, "level_heights must hold whole numbers"),
        (
            "image_slot",
            lambda x: x.astype(np.int64) + 2**32,
            "image_slot must hold whole numbers of 32 bits",
        ),
        ("logits", lambda x: x.astype(complex), "logits must hold real numbers; got complex128"),
        ("logits", lambda x: x.astype(str), "logits must hold real numbers; got <U"),
        ("value", lambda x: x[0], "wrong rank of value"),
        ("expected", lambda x: x[..., 1:], "wrong shape of expected"),
        ("expected", lambda x: x * np.nan, "expected holds numbers that are not finite"),
    ],
)
def test_arrays_that_are_no_case_are_refused_in_one_line(
    name: str,
    change: Callable[[np.ndarray], np.ndarray],
    says: str,
    arrays: dict[str, Any],
    tmp_path: Path,
) -> None:
    path = tmp_path / "case.npz"
    np.savez(path, **{**arrays, name: change(arrays[name])})
    with pytest.raises(EngineError, match=f"^{path}: .*{says}") as caught:
        read_case(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_cases_are_refused(arrays: dict[str, Any], tmp_path: Path) -> None:
    whole = (tmp_path / "case.npz").read_bytes()
    half = len(whole) // 2
    contents = {"text": b"no archive", "empty": b"", "short": whole[:half]}
    contents["changed"] = whole[:half] + bytes([whole[half] ^ 255]) + whole[half + 1 :]
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "pickled.npz", value=np.array([{}], dtype=object))
    for name in (*contents, "pickled.npz", "nowhere"):
        with pytest.raises(EngineError, match=f"{name} cannot be read as .npz") as caught:
            read_case(tmp_path / name)
        assert "\n" not in str(caught.value)
    np.savez(tmp_path / "partial.npz", value=np.zeros(3))
    with pytest.raises(EngineError, match="arrays are missing: base_grid, expected"):
        read_case(tmp_path / "partial.npz")
