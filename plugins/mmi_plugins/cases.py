"""Calls of the operator to try a kernel with: drawn at random, or read from `.npz` files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmi_deploy.errors import EngineError
from mmi_plugins.operator import INDEX_INPUTS, INPUT_SHAPES, NARROW_INPUTS, TOLERANCES, Call

ATTRIBUTES = ("level_heights", "level_widths", "base_grid", "null_slot")

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
"""What a drawn call is about."""


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """float32 numbers rounded to the nearest of `dtype`, still held as float32."""
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
    """Change drawn inputs so that they show `situation`."""
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
    """`count` named calls, every situation in turn."""
    for index in range(count):
        situation = SITUATIONS[index % len(SITUATIONS)]
        rng = np.random.default_rng([seed, index])
        yield f"{situation} {index}", draw(rng, situation, **fixed)


def write_case(path: Path, call: Call, expected: np.ndarray) -> None:
    """An `.npz` of the inputs, the attributes, the type and `expected` [b, q, h*d]."""
    arrays: dict[str, Any] = {name: np.array(getattr(call, name)) for name in ATTRIBUTES}
    arrays |= {**call.inputs, "dtype": np.array(call.dtype), "expected": expected}
    np.savez(path, **arrays)


def read_case(path: Path) -> tuple[Call, np.ndarray]:
    """The call and the expected output of a file. Raises `EngineError` for a file that is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise EngineError(f"{path} cannot be read as .npz: {error}") from None
    wanted = {*INPUT_SHAPES, *ATTRIBUTES, "expected"}
    if missing := wanted - set(arrays):
        raise EngineError(f"{path}: arrays are missing: {', '.join(sorted(missing))}")
    inputs = {
        name: np.ascontiguousarray(arrays[name], np.int32 if name in INDEX_INPUTS else np.float32)
        for name in INPUT_SHAPES
    }
    call = Call(
        inputs,
        tuple(np.atleast_1d(arrays["level_heights"]).astype(int).tolist()),
        tuple(np.atleast_1d(arrays["level_widths"]).astype(int).tolist()),
        float(arrays["base_grid"].reshape(-1)[0]),
        bool(arrays["null_slot"].reshape(-1)[0]),
        str(arrays["dtype"].reshape(-1)[0]) if "dtype" in arrays else "float32",
    )
    sizes = call.sizes
    shape = (sizes["b"], sizes["q"], sizes["h"] * sizes["d"])
    if arrays["expected"].shape != shape:
        raise EngineError(
            f"{path}: wrong shape of expected", expected=shape, got=arrays["expected"].shape
        )
    return call, arrays["expected"].astype(np.float64)
