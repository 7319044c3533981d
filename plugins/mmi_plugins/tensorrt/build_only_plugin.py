"""Build-only plugin: a Python `IPluginV3` with the library's name, namespace, version and fields.

Engines can be parsed, checked and built with it without a compiler or TensorRT's headers, but it
cannot run. The engine stores the fields, and takes the library (or another plugin of that name)
when it is loaded. Letters as in `operator`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from mmi_plugins.tensorrt.build_only_products import noting, product_creator
from mmi_plugins.tensorrt.plugin_library import plugin_creator

# Attributes of the node, in the types in which an engine stores them.
FIELDS = {
    "level_heights": np.int32,
    "level_widths": np.int32,
    "base_grid": np.float32,
    "null_slot": np.int32,
}

# Stored beside the fields; any other version is refused.
VERSION_FIELD = "plugin_version"
FIELDS_VERSION = 1


class BuildOnlyPlugin:
    """The build-only plugins of both operators, registered with a TensorRT module."""

    def __init__(self, tensorrt: Any) -> None:
        self._registry = tensorrt.get_plugin_registry()
        self._report = ""
        self._creators = (_creator(tensorrt, self._note), product_creator(tensorrt, self._note))
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


def _creator(trt: Any, note: Callable[[EngineError], None]) -> Any:
    field_types = {np.int32: trt.PluginFieldType.INT32, np.float32: trt.PluginFieldType.FLOAT32}
    narrow_types = (trt.float32, trt.float16, trt.bfloat16)
    noted = noting(note)

    class BuildOnlyLayer(
        trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime
    ):
        def __init__(self, fields: dict[str, np.ndarray]) -> None:
            for base in BuildOnlyLayer.__bases__:
                base.__init__(self)
            self.plugin_name, self.plugin_namespace = NAME, DOMAIN
            self.plugin_version, self.num_outputs = str(VERSION), 1
            self.fields = fields

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return BuildOnlyLayer(self.fields)

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            version = np.array([FIELDS_VERSION], np.int32)
            stored = {**self.fields, VERSION_FIELD: version}
            return trt.PluginFieldCollection(
                [
                    trt.PluginField(name, data, field_types[data.dtype.type])
                    for name, data in stored.items()
                ]
            )

        @noted
        def get_output_data_types(self, types: Sequence[Any]) -> list[Any]:
            _expect_inputs(len(types))
            for name, given in zip(INPUT_SHAPES, types, strict=True):
                if not _type_fits(name, given, types[0]):
                    expected = types[0] if name in NARROW_INPUTS[1:] else "its own type"
                    raise EngineError(f"{NAME}: wrong type of {name}", expected=expected, got=given)
            return [types[0]]

        @noted
        def get_output_shapes(self, inputs: Any, shape_inputs: Any, expressions: Any) -> list[Any]:
            _expect_inputs(len(inputs))
            known = [
                [
                    side.get_constant_value() if side.is_constant() else None
                    for side in (shape[axis] for axis in range(len(shape)))
                ]
                for shape in inputs
            ]
            check_shapes(known, self.fields)
            value, offsets = inputs[0], inputs[2]
            output = trt.DimsExprs(3)  # [b, q, h * d]
            output[0], output[1] = offsets[0], offsets[1]
            output[2] = expressions.operation(trt.DimensionOperation.PROD, value[2], value[3])
            return [output]

        def supports_format_combination(self, index: int, tensors: Any, inputs: int) -> bool:
            given, value = tensors[index].desc, tensors[0].desc
            if inputs != len(INPUT_SHAPES) or given.format != trt.TensorFormat.LINEAR:
                return False
            if index == len(INPUT_SHAPES):
                return bool(given.type == value.type)
            return _type_fits(list(INPUT_SHAPES)[index], given.type, value.type)

        @noted
        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            check_shapes([_known(tensor.desc.dims) for tensor in inputs], self.fields)

        @noted
        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            check_shapes([_known(tensor.dims) for tensor in inputs], self.fields)

        @noted
        def enqueue(self, *arguments: Any) -> None:
            raise EngineError(
                f"{NAME}: the build-only plugin cannot run",
                fix="Load the plugin library that `mmi plugins build` makes",
            )

    def _type_fits(name: str, given: Any, value: Any) -> bool:
        if name == "value":
            return given in narrow_types
        if name in NARROW_INPUTS:
            return bool(given == value)
        return bool(given == (trt.int32 if name in INDEX_INPUTS else trt.float32))

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = NAME, DOMAIN, str(VERSION)
            self.field_names = trt.PluginFieldCollection(
                [
                    trt.PluginField(name, np.array([], kind), field_types[kind])
                    for name, kind in FIELDS.items()
                ]
            )

        @noted
        def create_plugin(self, name: str, collection: Any, phase: Any) -> Any:
            given = {field.name: np.array(field.data) for field in collection}
            runs = phase == trt.TensorRTPhase.RUNTIME
            return BuildOnlyLayer(checked_fields(given, needs_version=runs))

    return Creator()


def _expect_inputs(count: int) -> None:
    if count != len(INPUT_SHAPES):
        raise EngineError(f"{NAME}: wrong number of inputs", expected=len(INPUT_SHAPES), got=count)


def _known(dims: Any) -> list[int | None]:
    return [None if side < 0 else int(side) for side in dims]


def checked_fields(given: dict[str, np.ndarray], needs_version: bool) -> dict[str, np.ndarray]:
    """The attributes among the fields `given`. Raises `EngineError` for a missing or wrong one and,
    with `needs_version`, for fields stored in another version."""
    version = given.pop(VERSION_FIELD, None)
    if needs_version and (version is None or version.tolist() != [FIELDS_VERSION]):
        raise EngineError(
            f"{NAME}: the engine holds other fields",
            expected=f"version {FIELDS_VERSION}",
            got=version,
            fix="Build the engine again",
        )
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
