"""Calls of the operator for conformance tests: drawn at random, or read from `.npz` files."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmi_deploy.errors import EngineError
from mmi_plugins.operator import INDEX_INPUTS, INPUT_SHAPES, NARROW_INPUTS, TOLERANCES, Call

ATTRIBUTES = ("level_heights", "level_widths", "base_grid", "null_slot")

# Kinds of random calls.
SITUATIONS = (
    "ordinary",
    "all hidden",
    "far outside",
    "on borders",
    "on centres",
    "huge logits",
    "tiny logits",
    "bad slots",
)


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """float32 numbers rounded to the nearest of `dtype`, as float32."""
    array = np.asarray(array, np.float32)
    if dtype == "float16":
        return array.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = array.view(np.uint32)
        even = (bits >> 16) & 1
        return ((bits + 0x7FFF + even) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return array


def draw(rng: np.random.Generator, situation: str = "ordinary", **fixed: Any) -> Call:
    """A random call; `fixed` sets sizes by letter (`levels` as a list of (height, width)),
    `dtype`, `null_slot`, `base_grid`, `per_query` (visibility) and `references` (one per query)."""

    def pick(name: str, *options: Any) -> Any:
        return fixed[name] if name in fixed else options[int(rng.integers(len(options)))]

    b, m, n, r = pick("b", 1, 2, 4), pick("m", 1, 2, 5), pick("n", 1, 2, 5), pick("r", 2, 4, 9)
    q, h, p = pick("q", 1, 3, 17), pick("h", 1, 2, 5), pick("p", 1, 3, 4, 8, 16)
    d = pick("d", 8, 16, 24, 32, 40, 64, 80, 128)
    levels = pick(
        "levels",
        [(8, 8)],
        [(6, 9), (3, 4)],
        [(8, 8), (4, 4), (2, 2)],
        [(8, 6), (4, 3), (2, 2), (1, 1)],
    )
    dtype = pick("dtype", *TOLERANCES)
    per_query = pick("per_query", False, True)
    base_grid = float(pick("base_grid", 4.0, 8.0, 12.5))
    sizes = {"b": b, "q": q, "h": h, "l": len(levels), "p": p, "d": d, "n": n, "m": m, "r": r}
    sizes |= {"2": 2, "s": sum(height * width for height, width in levels)}
    inputs = {
        name: rng.normal(size=[sizes.get(letter, 1) for letter in letters]).astype(np.float32)
        for name, letters in INPUT_SHAPES.items()
    }
    inputs["reference"] = rng.random((q if pick("references", False, True) else 1, 2)).astype("f4")
    inputs["image_slot"] = rng.integers(0, n, (b, m)).astype(np.int32)
    inputs["image_position"] = rng.integers(0, r, (b, q if per_query else 1, m)).astype(np.int32)
    _shape_situation(rng, situation, inputs, base_grid, levels[0])
    for name in NARROW_INPUTS:
        inputs[name] = rounded(inputs[name], dtype)
    heights, widths = zip(*levels, strict=True)
    null_slot = bool(pick("null_slot", False, True))
    return Call(inputs, heights, widths, base_grid, null_slot, dtype)


def _shape_situation(
    rng: np.random.Generator,
    situation: str,
    inputs: dict[str, np.ndarray],
    base_grid: float,
    level: tuple[int, int],
) -> None:
    """Change drawn inputs in place to fit `situation`."""
    if situation == "all hidden":
        inputs["image_position"][:] = 0
    elif situation == "far outside":
        inputs["offsets"] *= np.float32(2000.0)
        inputs["offset_table"] *= np.float32(1e9)
    elif situation in ("on borders", "on centres"):
        height, width = level
        whole = rng.integers(-1, 2 * max(level) + 2, inputs["offsets"].shape)
        cells = np.array([width, height]) * (2 if situation == "on centres" else 1)
        inputs["offsets"] = (whole / cells * base_grid).astype(np.float32)
        inputs["offset_table"][:] = 0
        inputs["reference"][:] = 0
    elif situation == "huge logits":
        inputs["logits"] *= np.float32(300.0)
        inputs["logit_table"] *= np.float32(300.0)
    elif situation == "tiny logits":
        inputs["logits"] -= np.float32(90.0)
    elif situation == "bad slots":
        inputs["image_slot"] = rng.integers(-2, 9, inputs["image_slot"].shape).astype(np.int32)
        positions = inputs["image_position"].shape
        inputs["image_position"] = rng.integers(-2, 12, positions).astype(np.int32)
    elif situation != "ordinary":
        raise ValueError(f"unknown situation {situation!r}; one of {SITUATIONS}")


def draws(seed: int, count: int, **fixed: Any) -> Iterator[tuple[str, Call]]:
    """`count` random calls with names, every situation in turn."""
    for index in range(count):
        situation = SITUATIONS[index % len(SITUATIONS)]
        rng = np.random.default_rng([seed, index])
        yield f"{situation} {index}", draw(rng, situation, **fixed)


def write_case(path: Path, call: Call, expected: np.ndarray) -> None:
    """Write inputs, attributes, type and `expected` [b, q, h*d] to an `.npz`."""
    arrays: dict[str, Any] = {name: np.array(getattr(call, name)) for name in ATTRIBUTES}
    arrays |= {**call.inputs, "dtype": np.array(call.dtype), "expected": expected}
    np.savez(path, **arrays)


def read_case(path: Path) -> tuple[Call, np.ndarray]:
    """Read the call and the expected output of a case. Raises `EngineError` for an invalid file."""
    if not zipfile.is_zipfile(path):
        raise EngineError(f"{path} cannot be read as .npz: it is not a complete archive")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}
    except Exception as error:  # NumPy, zipfile and zlib raise many kinds for a damaged file
        raise EngineError(f"{path} cannot be read as .npz: {error}") from None
    wanted = {*INPUT_SHAPES, *ATTRIBUTES, "expected"}
    if missing := wanted - set(arrays):
        raise EngineError(f"{path}: arrays are missing: {', '.join(sorted(missing))}")
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return _case(arrays)
    except (EngineError, ValueError) as error:
        raise EngineError(f"{path}: {error}") from None


def _case(arrays: Mapping[str, np.ndarray]) -> tuple[Call, np.ndarray]:
    """`arrays` as a call and its expected output. Raises `EngineError` or `ValueError`."""
    for name in ("base_grid", "null_slot", "dtype"):
        if name in arrays and arrays[name].size != 1:
            raise EngineError(f"{name} must be one value", got=f"{arrays[name].size} of them")
    dtype = str(arrays["dtype"].astype(str).item()) if "dtype" in arrays else "float32"
    inputs = {
        name: _numbers(arrays, name, np.int32 if name in INDEX_INPUTS else np.float32)
        for name in INPUT_SHAPES
    }
    inputs |= {name: rounded(inputs[name], dtype) for name in NARROW_INPUTS}
    heights, widths = (
        tuple(_numbers(arrays, name, np.int32).ravel().tolist())
        for name in ("level_heights", "level_widths")
    )
    base_grid = _numbers(arrays, "base_grid", np.float32).item()
    null_slot = _numbers(arrays, "null_slot", np.int32).item()
    if null_slot not in (0, 1):
        raise EngineError("null_slot must be 0 or 1", got=null_slot)
    call = Call(inputs, heights, widths, base_grid, bool(null_slot), dtype)
    expected, sizes = _numbers(arrays, "expected", np.float64), call.sizes
    shape = (sizes["b"], sizes["q"], sizes["h"] * sizes["d"])
    if expected.shape != shape:
        raise EngineError("wrong shape of expected", expected=shape, got=expected.shape)
    if not np.isfinite(expected).all():
        raise EngineError("expected holds numbers that are not finite")
    return call, expected


def _numbers(arrays: Mapping[str, np.ndarray], name: str, kind: type) -> np.ndarray:
    """An array converted to `kind`. Raises `EngineError` where that is not exact for integers."""
    array = arrays[name]
    if array.dtype.kind not in "biuf":
        raise EngineError(f"{name} must hold real numbers", got=array.dtype)
    numbers: np.ndarray = np.ascontiguousarray(array, kind)
    if kind is np.int32 and np.any(numbers != array):
        raise EngineError(f"{name} must hold whole numbers of 32 bits")
    return numbers
