"""Build-only form of a plugin: TensorRT's interfaces of a layer and its creator, in Python.

An operator brings its name, its attributes and its checks; what TensorRT asks of every plugin is
here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np

from mmi_deploy.errors import EngineError

# Stored beside the attributes; any other version is refused.
VERSION_FIELD = "plugin_version"

Fields = Mapping[str, Any]
Shapes = Sequence[Sequence[int | None]]
Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True)
class Form:
    """An operator as TensorRT's plugin: names, attributes with their types, and checks.

    `check_fields` gives the attributes among given fields, and refuses wrong ones; with True as its
    second argument, fields of another version too. `check_shapes` refuses shapes of the inputs;
    None: an axis known only at run time. `expected_types` gives the accepted types of each input by
    its name, from that of the first. `output_shape` makes the output's dimensions. All but the
    last raise `EngineError`.
    """

    name: str
    namespace: str
    version: int
    fields_version: int
    kinds: Mapping[str, type[np.generic]]
    check_fields: Callable[[dict[str, np.ndarray], bool], Fields]
    check_shapes: Callable[[Shapes, Any], None]
    expected_types: Callable[[Any, Any], Mapping[str, Sequence[Any]]]
    output_shape: Callable[[Any, Any, Any, Any], Any]


def check_version(form_name: str, version: np.ndarray | None, expected: int) -> None:
    """Raise `EngineError` for fields that an engine stored in another version."""
    if version is None or version.tolist() != [expected]:
        raise EngineError(
            f"{form_name}: the engine holds other fields",
            expected=f"version {expected}",
            got=version,
            fix="Build the engine again",
        )


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


def creator_of(trt: Any, form: Form, note: Callable[[EngineError], None]) -> Any:
    """The plugin's creator for the registry of the module `trt`. `note` is given each error."""
    noted = noting(note)
    stored_types = {np.int32: trt.PluginFieldType.INT32, np.float32: trt.PluginFieldType.FLOAT32}

    def field(name: str, data: np.ndarray) -> Any:
        return trt.PluginField(name, data, stored_types[data.dtype.type])

    class BuildOnlyLayer(
        trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime
    ):
        def __init__(self, fields: Fields) -> None:
            for base in BuildOnlyLayer.__bases__:
                base.__init__(self)
            self.plugin_name, self.plugin_namespace = form.name, form.namespace
            self.plugin_version, self.num_outputs = str(form.version), 1
            self.fields = fields

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return BuildOnlyLayer(self.fields)

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            version = np.array([form.fields_version], np.int32)
            attributes = [
                field(name, np.atleast_1d(np.asarray(self.fields[name], kind)))
                for name, kind in form.kinds.items()
            ]
            return trt.PluginFieldCollection([*attributes, field(VERSION_FIELD, version)])

        @noted
        def get_output_data_types(self, types: Sequence[Any]) -> list[Any]:
            accepted = form.expected_types(trt, types[0] if types else None)
            if len(types) != len(accepted):
                raise EngineError(
                    f"{form.name}: wrong number of inputs", expected=len(accepted), got=len(types)
                )
            for (name, allowed), given in zip(accepted.items(), types, strict=True):
                if given not in allowed:
                    raise EngineError(
                        f"{form.name}: wrong type of {name}",
                        expected=" or ".join(map(str, allowed)),
                        got=given,
                    )
            return [types[0]]

        @noted
        def get_output_shapes(self, inputs: Any, shape_inputs: Any, expressions: Any) -> list[Any]:
            known = [
                [
                    side.get_constant_value() if side.is_constant() else None
                    for side in (shape[axis] for axis in range(len(shape)))
                ]
                for shape in inputs
            ]
            form.check_shapes(known, self.fields)
            return [form.output_shape(trt, inputs, expressions, self.fields)]

        def supports_format_combination(self, index: int, tensors: Any, inputs: int) -> bool:
            given, first = tensors[index].desc, tensors[0].desc
            accepted = list(form.expected_types(trt, first.type).values())
            if inputs != len(accepted) or given.format != trt.TensorFormat.LINEAR:
                return False
            return given.type in [*accepted, (first.type,)][index]

        @noted
        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            form.check_shapes([_known(tensor.desc.dims) for tensor in inputs], self.fields)

        @noted
        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            form.check_shapes([_known(tensor.dims) for tensor in inputs], self.fields)

        @noted
        def enqueue(self, *arguments: Any) -> None:
            raise EngineError(
                f"{form.name}: the build-only plugin cannot run",
                fix="Load the plugin library that `mmi plugins build` makes",
            )

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace = form.name, form.namespace
            self.plugin_version = str(form.version)
            self.field_names = trt.PluginFieldCollection(
                [field(name, np.array([], kind)) for name, kind in form.kinds.items()]
            )

        @noted
        def create_plugin(self, name: str, collection: Any, phase: Any) -> Any:
            given = {one.name: np.array(one.data) for one in collection}
            return BuildOnlyLayer(form.check_fields(given, phase == trt.TensorRTPhase.RUNTIME))

    return Creator()


def _known(dims: Any) -> list[int | None]:
    return [None if side < 0 else int(side) for side in dims]
