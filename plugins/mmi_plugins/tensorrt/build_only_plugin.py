"""Build-only plugin: a Python `IPluginV3` with the library's name, namespace, version and fields.

Engines can be parsed, checked and built with it without a compiler or TensorRT's headers, but it
cannot run. The engine stores the fields, and takes the library (or another plugin of that name)
when it is loaded. Letters as in `operator`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmi_deploy.errors import EngineError
from mmi_plugins.operator import (
    CHANNEL_STEP,
    DOMAIN,
    INDEX_INPUTS,
    INPUT_SHAPES,
    MAX_CHANNELS,
    MAX_LEVELS,
    MAX_POINTS,
    NAME,
    NARROW_INPUTS,
    VERSION,
)
from mmi_plugins.tensorrt.build_only_form import VERSION_FIELD, Form, check_version, creator_of
from mmi_plugins.tensorrt.build_only_products import product_form
from mmi_plugins.tensorrt.plugin_library import plugin_creator

# Attributes of the node, in the types in which an engine stores them.
FIELDS = {
    "level_heights": np.int32,
    "level_widths": np.int32,
    "base_grid": np.float32,
    "null_slot": np.int32,
}

FIELDS_VERSION = 1


class BuildOnlyPlugin:
    """The build-only plugins of both operators, registered with a TensorRT module."""

    def __init__(self, tensorrt: Any) -> None:
        self._registry = tensorrt.get_plugin_registry()
        self._report = ""
        self._creators = [
            creator_of(tensorrt, form, self._note) for form in (mmfs_form(), product_form())
        ]
        for creator in self._creators:
            self._registry.register_creator(creator, DOMAIN)

    def last_report(self) -> str:
        """Last error line, or "": TensorRT itself only says that a call failed."""
        return self._report

    def unregister(self) -> None:
        """Remove the plugins from the registry, so that others of their names can be loaded."""
        for creator in self._creators:
            self._registry.deregister_creator(creator)

    def _note(self, error: EngineError) -> None:
        self._report = str(error)


def register_build_only_plugin(tensorrt: Any) -> BuildOnlyPlugin:
    """Register the build-only plugin with a TensorRT module. Raises `EngineError` where a plugin of
    that name is registered already."""
    if plugin_creator(tensorrt) is not None:
        raise EngineError(f"{tensorrt.__name__} has a plugin {DOMAIN}::{NAME} already")
    return BuildOnlyPlugin(tensorrt)


def mmfs_form() -> Form:
    """The operator as a plugin of TensorRT."""
    return Form(
        NAME, DOMAIN, VERSION, FIELDS_VERSION, FIELDS,
        checked_fields, check_shapes, _expected_types, _output_shape,
    )  # fmt: skip


def _expected_types(trt: Any, first: Any) -> dict[str, tuple[Any, ...]]:
    def expected(name: str) -> tuple[Any, ...]:
        if name == "value":
            return (trt.float32, trt.float16, trt.bfloat16)
        if name in NARROW_INPUTS:
            return (first,)
        return (trt.int32 if name in INDEX_INPUTS else trt.float32,)

    return {name: expected(name) for name in INPUT_SHAPES}


def _output_shape(trt: Any, inputs: Any, expressions: Any, fields: Any) -> Any:
    value, offsets = inputs[0], inputs[2]
    output = trt.DimsExprs(3)  # [b, q, h * d]
    output[0], output[1] = offsets[0], offsets[1]
    output[2] = expressions.operation(trt.DimensionOperation.PROD, value[2], value[3])
    return output


def checked_fields(given: dict[str, np.ndarray], needs_version: bool) -> dict[str, np.ndarray]:
    """The attributes among the fields `given`. Raises `EngineError` for a missing or wrong one and,
    with `needs_version`, for fields stored in another version."""
    if needs_version:
        check_version(NAME, given.get(VERSION_FIELD), FIELDS_VERSION)
    for name, kind in FIELDS.items():
        data = given.get(name, np.empty(0, kind))
        most = MAX_LEVELS if name.startswith("level") else 1
        if data.dtype != kind or not 1 <= data.size <= most:
            raise EngineError(
                f"{NAME}: attribute {name}",
                expected=f"{'one' if most == 1 else f'1 to {most}'} {np.dtype(kind)}",
                got=f"{data.size} {data.dtype}",
            )
    heights, widths = given["level_heights"], given["level_widths"]
    if len(heights) != len(widths):
        raise EngineError(
            f"{NAME}: level_heights and level_widths differ in length",
            got=f"{len(heights)} and {len(widths)}",
        )
    if min(*heights, *widths) < 1 or not 0 < given["base_grid"][0] < np.inf:
        raise EngineError(f"{NAME}: an empty level, or base_grid is not positive")
    return {name: given[name] for name in FIELDS}


def check_shapes(shapes: Sequence[Sequence[int | None]], fields: dict[str, np.ndarray]) -> None:
    """Raise `EngineError` for input shapes that contradict each other or the fields, or that no
    kernel takes. None: an axis known only at run time."""
    if len(shapes) != len(INPUT_SHAPES):
        raise EngineError(
            f"{NAME}: wrong number of inputs", expected=len(INPUT_SHAPES), got=len(shapes)
        )
    heights, widths = fields["level_heights"], fields["level_widths"]
    cells = int(heights.astype(np.int64) @ widths)
    sizes = {"l": ("the attributes", len(heights)), "s": ("the attributes", cells)}
    for (name, axes), shape in zip(INPUT_SHAPES.items(), shapes, strict=True):
        if len(shape) != len(axes):
            raise EngineError(f"{NAME}: wrong rank of {name}", expected=len(axes), got=len(shape))
        for axis, side in zip(axes, shape, strict=True):
            if side == 0:
                raise EngineError(f"{NAME}: {name} is empty", got=list(shape))
            if side is None or axis == "*":
                continue
            other, size = ("(x, y)", 2) if axis == "2" else sizes.setdefault(axis, (name, side))
            if side != size:
                raise EngineError(
                    f"{NAME}: {name} and {other} differ in {axis}", expected=size, got=side
                )
    for name, queries_axis in (("image_position", 1), ("reference", 0)):
        rows = shapes[list(INPUT_SHAPES).index(name)][queries_axis]
        queries = sizes.get("q", ("", rows))[1]
        if rows not in (None, 1, queries):
            raise EngineError(f"{NAME}: rows of {name}", expected=(1, queries), got=rows)
    channels, points = sizes.get("d", ("", CHANNEL_STEP))[1], sizes.get("p", ("", 1))[1]
    if channels % CHANNEL_STEP or channels > MAX_CHANNELS:
        raise EngineError(
            f"{NAME}: unsupported head size",
            expected=f"a multiple of {CHANNEL_STEP} up to {MAX_CHANNELS}",
            got=channels,
        )
    if points > MAX_POINTS:
        raise EngineError(f"{NAME}: too many points", expected=f"1..{MAX_POINTS}", got=points)
