"""Ahead-of-time plugin of `mmi::WeightOnlyMatMul`, as `ahead_of_time` has it of MMFS.

TensorRT asks for a kernel per profile: one of decoding where no run of the profile has more rows
than it takes, else the one of many rows, which takes any number. The rows are a product of leading
axes, which TensorRT computes before it launches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import mul
from typing import Any

import numpy as np

from mmi_deploy.errors import EngineError
from mmi_plugins.compile.launch_plan import TYPES
from mmi_plugins.constants import constant
from mmi_plugins.gemv.launch_plan import GemvVariant
from mmi_plugins.gemv.operator import FORMATS, MAX_DECODE_ROWS, NAME
from mmi_plugins.tensorrt.build_only_products import INPUTS, check_shapes, checked_fields

_BODIES = {False: "multiply_weight", True: "multiply_rows"}


@dataclass(frozen=True)
class AheadOfTimeProduct(GemvVariant):
    """A kernel with widths as constants and parameters that TensorRT can pass: addresses of the
    inputs, rows, address of the output."""

    inputs: int = 0
    out: int = 0

    @property
    def name(self) -> str:
        """The kernel's `extern "C"` name."""
        return "weight_only_rows_ahead_of_time" if self.rows else "weight_only_ahead_of_time"

    @property
    def source(self) -> str:
        """A translation unit that has this kernel alone."""
        blocks = "2" if self.rows else "mmi::kGemvBlocks"
        steps = -(-self.inputs // constant("kGemvStep"))
        return (
            '#include "gemv_rows.cuh"\n'
            f'extern "C" __global__ void __launch_bounds__(mmi::kLanes* mmi::kGemvWarps, {blocks}) '
            f"{self.name}(const void* input, const int* weight, const void* scales, int rows, "
            "void* output) {\n"
            "  const mmi::GemvParameters call{input, weight, scales, output, rows, "
            f"{self.inputs}, {self.out}, {steps}}};\n"
            f"  mmi::{_BODIES[self.rows]}<{TYPES[self.dtype]}, mmi::{self._names[1]}>(call);\n}}\n"
        )


def choose_product(
    dtype: str, fields: Mapping[str, int], *, inputs: int, most_rows: int
) -> AheadOfTimeProduct:
    """The kernel for type `dtype`, attributes `fields`, and a profile of at most `most_rows`."""
    return AheadOfTimeProduct(
        dtype, FORMATS[fields["format"]], fields["block"], most_rows > MAX_DECODE_ROWS,
        inputs, fields["out"],
    )  # fmt: skip


def describe_product(plugin: Any) -> Any:
    """The function that describes the output, for `plugin`, the module `tensorrt.plugin`."""

    def describe(*inputs: Any, **attributes: np.ndarray) -> Any:
        shape, out = inputs[0].shape_expr, np.asarray(attributes["out"], np.int32)
        sides = [shape[axis] for axis in range(inputs[0].ndim - 1)]
        return plugin.from_shape_expr((*sides, int(out.reshape(-1)[0])), dtype=inputs[0].dtype)

    return describe


def product_of(arguments: tuple[Any, ...], names: Mapping[Any, str]) -> AheadOfTimeProduct:
    """The kernel for the descriptions of inputs and the attributes that TensorRT passes. `names`:
    name of each of its types. Raises `EngineError` for what no kernel takes."""
    tensors = arguments[: len(INPUTS)]
    given = [np.asarray(data, np.int32).reshape(-1) for data in arguments[len(INPUTS) :]]
    fields = checked_fields(
        dict(zip(("format", "out", "block"), given, strict=False)), needs_version=False
    )
    shapes = [[None if side < 0 else int(side) for side in one.shape] for one in tensors]
    check_shapes(shapes, fields)
    dtype = names.get(tensors[0].dtype)
    if dtype not in ("float16", "bfloat16"):
        raise EngineError(f"{NAME}: unsupported type", got=tensors[0].dtype)
    shape = tensors[0].shape
    most = reduce(mul, list(shape.max if shape.is_dynamic else shape)[:-1], 1)
    inputs = shapes[0][-1]
    assert inputs is not None
    return choose_product(dtype, fields, inputs=inputs, most_rows=int(most))


def launch_product(plugin: Any, variant: AheadOfTimeProduct, tensor: Any) -> tuple[Any, Any]:
    """Launch parameters and integers of a kernel for the description `tensor` of its input."""
    launch, sizes = plugin.KernelLaunchParams(), plugin.SymIntExprs(1)
    rows = reduce(mul, [tensor.shape_expr[axis] for axis in range(tensor.ndim - 1)])
    tiles = -(-variant.out // constant("kGemvOutputs"))
    if variant.rows:
        launch.grid_x = plugin.cdiv(rows, constant("kGemvRowTile"))
        launch.grid_y = -(-tiles // constant("kGemvWarps"))
    else:
        launch.grid_x = tiles
    launch.block_x = variant.threads
    sizes[0] = plugin.SymInt32(rows)
    return launch, sizes
