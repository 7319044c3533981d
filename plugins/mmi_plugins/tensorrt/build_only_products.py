"""Build-only plugin of `mmi::WeightOnlyMatMul`, as `build_only_plugin` has it of MMFS: name, fields
and checks of the library in Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np

from mmi_deploy.errors import EngineError
from mmi_plugins.constants import constant
from mmi_plugins.gemv.operator import DOMAIN, FORMATS, NAME, VERSION, unsupported_reason
from mmi_plugins.gemv.packing import scales_shape, weight_shape

INPUTS = ("input", "weight", "scales")

# Attributes of the node, each one int32.
FIELDS = ("format", "out", "block")

# Stored beside the fields; any other version is refused.
VERSION_FIELD = "plugin_version"
FIELDS_VERSION = 1

Method = TypeVar("Method", bound=Callable[..., Any])


def noting(note: Callable[[EngineError], None]) -> Callable[[Method], Method]:
    """A decorator that hands an `EngineError` to `note`: TensorRT discards the exception."""

    def noted(method: Method) -> Method:
        @wraps(method)
        def call(*arguments: Any) -> Any:
            try:
                return method(*arguments)
            except EngineError as error:
                note(error)
                raise

        return cast(Method, call)

    return noted


def product_creator(trt: Any, note: Callable[[EngineError], None]) -> Any:
    """The plugin's creator for the registry of the module `trt`. `note` is given each error."""
    noted = noting(note)
    int32 = trt.PluginFieldType.INT32

    class BuildOnlyProduct(
        trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime
    ):
        def __init__(self, fields: dict[str, int]) -> None:
            for base in BuildOnlyProduct.__bases__:
                base.__init__(self)
            self.plugin_name, self.plugin_namespace = NAME, DOMAIN
            self.plugin_version, self.num_outputs = str(VERSION), 1
            self.fields = fields

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return BuildOnlyProduct(self.fields)

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            stored = {**self.fields, VERSION_FIELD: FIELDS_VERSION}
            return trt.PluginFieldCollection(
                [
                    trt.PluginField(name, np.array([number], np.int32), int32)
                    for name, number in stored.items()
                ]
            )

        @noted
        def get_output_data_types(self, types: Sequence[Any]) -> list[Any]:
            expected = (trt.float16, trt.bfloat16), (trt.int32,), (types[0],)
            for name, given, allowed in zip(INPUTS, types, expected, strict=True):
                if given not in allowed:
                    raise EngineError(
                        f"{NAME}: wrong type of {name}",
                        expected=" or ".join(map(str, allowed)),
                        got=given,
                    )
            return [types[0]]

        @noted
        def get_output_shapes(self, inputs: Any, shape_inputs: Any, expressions: Any) -> list[Any]:
            sides = [[shape[axis] for axis in range(len(shape))] for shape in inputs]
            known = [
                [s.get_constant_value() if s.is_constant() else None for s in x] for x in sides
            ]
            check_shapes(known, self.fields)
            output = trt.DimsExprs(len(sides[0]))
            for axis, side in enumerate(sides[0][:-1]):
                output[axis] = side
            output[len(sides[0]) - 1] = expressions.constant(self.fields["out"])
            return [output]

        def supports_format_combination(self, index: int, tensors: Any, inputs: int) -> bool:
            given, first = tensors[index].desc, tensors[0].desc
            if inputs != len(INPUTS) or given.format != trt.TensorFormat.LINEAR:
                return False
            if index == 0:
                return given.type in (trt.float16, trt.bfloat16)
            return bool(given.type == (trt.int32 if index == 1 else first.type))

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

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = NAME, DOMAIN, str(VERSION)
            self.field_names = trt.PluginFieldCollection(
                [trt.PluginField(name, np.array([], np.int32), int32) for name in FIELDS]
            )

        @noted
        def create_plugin(self, name: str, collection: Any, phase: Any) -> Any:
            given = {field.name: np.array(field.data) for field in collection}
            runs = phase == trt.TensorRTPhase.RUNTIME
            return BuildOnlyProduct(checked_fields(given, needs_version=runs))

    return Creator()


def _known(dims: Any) -> list[int | None]:
    return [None if side < 0 else int(side) for side in dims]


def checked_fields(given: dict[str, np.ndarray], needs_version: bool) -> dict[str, int]:
    """The attributes among the fields `given`. Raises `EngineError` for a missing or wrong one and,
    with `needs_version`, for fields stored in another version."""
    version = given.get(VERSION_FIELD)
    if needs_version and (version is None or version.tolist() != [FIELDS_VERSION]):
        raise EngineError(
            f"{NAME}: the engine holds other fields",
            expected=f"version {FIELDS_VERSION}",
            got=version,
            fix="Build the engine again",
        )
    fields = {}
    for name in FIELDS:
        data = given.get(name, np.empty(0, np.int32))
        if data.dtype != np.int32 or data.size != 1:
            raise EngineError(
                f"{NAME}: attribute {name}", expected="one int32", got=f"{data.size} {data.dtype}"
            )
        fields[name] = int(data[0])
    check_width(constant("kGemvStep"), fields)
    return fields


def check_width(inputs: int, fields: dict[str, int]) -> None:
    """Raise `EngineError` where no kernel takes a weight of `inputs` channels and these fields."""
    known = 0 <= fields["format"] < len(FORMATS)
    format_ = FORMATS[fields["format"]] if known else "unknown"
    if reason := unsupported_reason(format_, inputs, fields["out"], fields["block"]):
        raise EngineError(f"{NAME}: {reason}", got=f"{inputs} input channels, {fields}")


def check_shapes(shapes: Sequence[Sequence[int | None]], fields: dict[str, int]) -> None:
    """Raise `EngineError` for shapes of input, weight and scales that contradict each other or the
    fields, or that no kernel takes. None: an axis known only at run time."""
    if len(shapes) != len(INPUTS):
        raise EngineError(f"{NAME}: wrong number of inputs", expected=len(INPUTS), got=len(shapes))
    inputs = shapes[0][-1] if shapes[0] else 0
    if inputs is None:
        raise EngineError(f"{NAME}: the input channels are not known")
    check_width(inputs, fields)
    format_ = FORMATS[fields["format"]]
    wanted = (
        weight_shape(format_, inputs, fields["out"]),
        scales_shape(inputs, fields["out"], fields["block"]),
    )
    for name, expected, got in zip(INPUTS[1:], wanted, shapes[1:], strict=True):
        same = len(expected) == len(got) and all(
            side in (None, want) for want, side in zip(expected, got, strict=True)
        )
        if not same:
            raise EngineError(f"{NAME}: shape of {name}", expected=list(expected), got=list(got))
