"""Build-only plugin of `mmi::WeightOnlyMatMul`, as `build_only_plugin` has it of MMFS: name, fields
and checks of the library in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmi_deploy.errors import EngineError
from mmi_plugins.constants import constant
from mmi_plugins.gemv.operator import DOMAIN, FORMATS, NAME, VERSION, unsupported_reason
from mmi_plugins.gemv.packing import scales_shape, weight_shape
from mmi_plugins.tensorrt.build_only_form import VERSION_FIELD, Form, check_version

INPUTS = ("input", "weight", "scales")

# Attributes of the node, each one int32.
FIELDS = ("format", "out", "block")

FIELDS_VERSION = 1


def product_form() -> Form:
    """The operator as a plugin of TensorRT."""
    return Form(
        NAME, DOMAIN, VERSION, FIELDS_VERSION, dict.fromkeys(FIELDS, np.int32),
        checked_fields, check_shapes, _expected_types, _output_shape,
    )  # fmt: skip


def _expected_types(trt: Any, first: Any) -> dict[str, tuple[Any, ...]]:
    return dict(zip(INPUTS, ((trt.float16, trt.bfloat16), (trt.int32,), (first,)), strict=True))


def _output_shape(trt: Any, inputs: Any, expressions: Any, fields: dict[str, int]) -> Any:
    rank = len(inputs[0])
    output = trt.DimsExprs(rank)
    for axis in range(rank - 1):
        output[axis] = inputs[0][axis]
    output[rank - 1] = expressions.constant(fields["out"])
    return output


def checked_fields(given: dict[str, np.ndarray], needs_version: bool) -> dict[str, int]:
    """The attributes among the fields `given`. Raises `EngineError` for a missing or wrong one and,
    with `needs_version`, for fields stored in another version."""
    if needs_version:
        check_version(NAME, given.get(VERSION_FIELD), FIELDS_VERSION)
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
