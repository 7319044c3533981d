"""Ahead-of-time plugin: `tensorrt.plugin` with PTX that NVRTC compiles while an engine is built.

For pip's TensorRT, which has no headers: `register_ahead_of_time` registers the operator under the
same name, and NVRTC (pip install nvidia-cuda-nvrtc) compiles the kernel. The engine contains the
PTX and runs without this package.

TensorRT passes the inputs' addresses, then 32-bit integers, then the output's address to such a
kernel, and no workspace. So attributes are constants of the PTX, and several blocks never share a
row: with few queries and many images the library is faster. TensorRT launches the kernel without a
check of the actual shapes: whoever binds the inputs must check that they agree, as
`mmi_deploy.runtime` does.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import GenericAlias
from typing import Any

import numpy as np
import numpy.typing as npt

from mmi_deploy.errors import EngineError
from mmi_deploy.system.nvidia_driver import nvidia_driver
from mmi_plugins.compile.launch_plan import TYPES, Variant, check_limits
from mmi_plugins.compile.nvrtc import compile_ptx
from mmi_plugins.compile.ptx_version import check_driver
from mmi_plugins.constants import constant
from mmi_plugins.gemv.operator import NAME as PRODUCT
from mmi_plugins.operator import DOMAIN, INPUT_SHAPES, NAME
from mmi_plugins.tensorrt import ahead_of_time_products
from mmi_plugins.tensorrt import build_only_products as products
from mmi_plugins.tensorrt.build_only_plugin import FIELDS, check_shapes, checked_fields
from mmi_plugins.tensorrt.plugin_library import plugin_creator

# Architectures whose PTX is tested; PTX runs on its architecture and every later one.
PTX_TARGETS = (80, 90, 100, 120)

# The kernel's integer parameters in order, and the input and axis that each is read from.
SIZES = {
    "q": ("offsets", 1),
    "m": ("image_slot", 1),
    "h": ("value", 2),
    "l": ("logits", 3),
    "p": ("offsets", 3),
    "d": ("value", 3),
    "n": ("value", 0),
    "s": ("value", 1),
    "r": ("offset_table", 0),
    "position_queries": ("image_position", 1),
    "reference_queries": ("reference", 0),
}

_POINTERS = ("void", "int", "void", "void", "float", "float", "int", "float", "float")
_ARRAYS: dict[Any, Any] = {np.int32: npt.NDArray[np.int32], np.float32: npt.NDArray[np.float32]}
_BODIES = {"rows": "attend_rows", "split": "attend_split"}


@dataclass(frozen=True)
class AheadOfTimeVariant(Variant):
    """A kernel with attributes as constants and parameters that TensorRT can pass."""

    level_heights: tuple[int, ...] = ()
    level_widths: tuple[int, ...] = ()
    base_grid: float = 1.0
    null_slot: bool = False

    @property
    def name(self) -> str:
        """The kernel's `extern "C"` name."""
        return f"mmfs_ahead_of_time_{self.kind}"

    @property
    def source(self) -> str:
        """A translation unit that has this kernel alone."""
        inverse = 1.0 / float(np.float32(self.base_grid))
        whole = np.float32(inverse)
        rest = np.float32(inverse - float(whole))
        constants = {
            "null_slot": str(int(self.null_slot)),
            "parts": "1" if self.kind == "split" else "0",
            "inverse_grid": f"{whole:.9e}f",
            "inverse_grid_rest": f"{rest:.9e}f",
        }
        for level, (height, width) in enumerate(
            zip(self.level_heights, self.level_widths, strict=True)
        ):
            constants[f"level_height[{level}]"] = str(height)
            constants[f"level_width[{level}]"] = str(width)
        pointers = [
            f"const {kind}* {name}" for kind, name in zip(_POINTERS, INPUT_SHAPES, strict=True)
        ]
        parameters = ", ".join([*pointers, *(f"int {size}" for size in SIZES), "void* output"])
        members = {name: name for name in (*INPUT_SHAPES, *SIZES, "output")} | constants
        fill = "".join(f"  call.{member} = {of};\n" for member, of in members.items())
        wide = "true" if self.wide else "false"
        return (
            '#include "mmfs.cuh"\n'
            f'extern "C" __global__ void MMI_{self.kind.upper()}_BOUNDS {self.name}('
            f"{parameters}) {{\n"
            f"  mmi::KernelParameters call{{}};\n{fill}"
            f"  mmi::{_BODIES[self.kind]}<{TYPES[self.dtype]}, {wide}>(call);\n}}\n"
        )


def choose_variant(
    dtype: str, fields: dict[str, np.ndarray], *, opt_rows: int, channels: int | None
) -> AheadOfTimeVariant:
    """The kernel for type `dtype` and attributes `fields`. `opt_rows`: output rows (b, q, h) of the
    profile's optimum shapes. `channels`: of a head; None: known only at run time."""
    kind = "rows" if opt_rows >= constant("kMinUnsplitRows") else "split"
    wide = dtype != "float32" and (channels is None or channels > 64)
    heights, widths = (tuple(map(int, fields[name])) for name in ("level_heights", "level_widths"))
    return AheadOfTimeVariant(
        dtype,
        kind,
        wide,
        heights,
        widths,
        float(fields["base_grid"][0]),
        bool(fields["null_slot"][0]),
    )


def ptx_target(capability: tuple[int, int]) -> int:
    """Architecture to compile PTX for, for a GPU of compute capability (major, minor)."""
    number = 10 * capability[0] + capability[1]
    if number < PTX_TARGETS[0]:
        raise EngineError(
            f"{NAME}: the GPU is too old",
            expected="compute capability 8.0 or newer",
            got=capability,
        )
    return max(target for target in PTX_TARGETS if target <= number)


class AheadOfTimePlugin:
    """Both operators, registered with `tensorrt.plugin` until the process ends."""

    def __init__(self) -> None:
        self._report = ""

    def last_report(self) -> str:
        """Last error line, or "": TensorRT itself only says that a call failed."""
        return self._report

    def unregister(self) -> None:
        """Do nothing: `tensorrt.plugin` cannot remove a plugin."""

    def recording(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, recording its `EngineError` as the last report."""

        def recorded(*arguments: Any, **attributes: Any) -> Any:
            try:
                return function(*arguments, **attributes)
            except EngineError as error:
                self._report = str(error)
                raise

        return recorded


def register_ahead_of_time(trt: Any, capability: tuple[int, int] = (8, 0)) -> AheadOfTimePlugin:
    """Register both operators with `trt.plugin` (`trt`: the module tensorrt, 10.12 or newer) for
    GPUs of compute capability (major, minor) and newer.

    The driver must know the GPU: the PTX has the lowest version of its instructions
    (`mmi_plugins.compile.ptx_version`), whatever NVRTC's. Raises `EngineError` where a plugin of
    that name is registered already.
    """
    if plugin_creator(trt) is not None:
        raise EngineError(f"{trt.__name__} has a plugin {DOMAIN}::{NAME} already")
    plugin: Any = importlib.import_module(f"{trt.__name__}.plugin")
    target = ptx_target(capability)
    names = {trt.float32: "float32", trt.float16: "float16", trt.bfloat16: "bfloat16"}
    arrays = {name: _ARRAYS[kind] for name, kind in FIELDS.items()}
    tensors = dict.fromkeys(INPUT_SHAPES, plugin.TensorDesc)
    identifier = f"{DOMAIN}::{NAME}"

    def describe(*inputs: Any, **attributes: np.ndarray) -> Any:
        value, offsets = inputs[0].shape_expr, inputs[2].shape_expr
        shape = (offsets[0], offsets[1], value[2] * value[3])  # [b, q, h * d]
        return plugin.from_shape_expr(shape, dtype=inputs[0].dtype)

    def implement(*arguments: Any) -> Any:
        inputs = dict(zip(INPUT_SHAPES, arguments, strict=False))
        attributes = dict(zip(FIELDS, arguments[len(inputs) :], strict=False))
        given = {name: np.asarray(data, FIELDS[name]) for name, data in attributes.items()}
        fields = checked_fields(given, needs_version=False)
        check_shapes([_sides(tensor) for tensor in inputs.values()], fields)
        dtype = names.get(inputs["value"].dtype)
        if dtype is None:
            raise EngineError(f"{NAME}: unsupported type", got=inputs["value"].dtype)
        offsets = inputs["offsets"].shape
        b, q, h = (offsets.opt if offsets.is_dynamic else offsets)[:3]
        variant = choose_variant(
            dtype, fields, opt_rows=b * q * h, channels=_sides(inputs["value"])[3]
        )
        check_limits(_max_sizes(inputs), dtype)
        launch = plugin.KernelLaunchParams()
        queries, heads, batch = (inputs["offsets"].shape_expr[axis] for axis in (1, 2, 0))
        rows = constant("kRowWarps")
        launch.grid_x = plugin.cdiv(queries, rows) if variant.kind == "rows" else queries
        launch.grid_y, launch.grid_z = heads, batch
        launch.block_x = variant.threads
        sizes = plugin.SymIntExprs(len(SIZES))
        for index, (name, axis) in enumerate(SIZES.values()):
            sizes[index] = plugin.SymInt32(inputs[name].shape_expr[axis])
        return variant.name, _checked_ptx(variant, target), launch, sizes

    text, launches = str | bytes, (plugin.KernelLaunchParams, plugin.SymIntExprs)
    results = GenericAlias(tuple, (text, text, *launches))
    outputs = {"outputs": GenericAlias(tuple, (plugin.TensorDesc,)), "tactic": int}
    plugin.register(identifier)(_signed(describe, {**tensors, **arrays}, plugin.TensorDesc))
    made = AheadOfTimePlugin()
    implement = _signed(made.recording(implement), {**tensors, **arrays, **outputs}, results)
    plugin.aot_impl(identifier)(implement)
    _register_products(plugin, made, names, target, results)
    return made


def _register_products(
    plugin: Any, made: AheadOfTimePlugin, names: dict[Any, str], target: int, results: Any
) -> None:
    """Register `mmi::WeightOnlyMatMul` with `plugin`, the module `tensorrt.plugin`."""
    tensors = dict.fromkeys(products.INPUTS, plugin.TensorDesc)
    fields = dict.fromkeys(products.FIELDS, _ARRAYS[np.int32])
    outputs = {"outputs": GenericAlias(tuple, (plugin.TensorDesc,)), "tactic": int}
    identifier = f"{DOMAIN}::{PRODUCT}"

    def implement(*arguments: Any) -> Any:
        variant = ahead_of_time_products.product_of(arguments[: len(tensors) + len(fields)], names)
        launch, sizes = ahead_of_time_products.launch_product(plugin, variant, arguments[0])
        return variant.name, _checked_ptx(variant, target), launch, sizes

    describe = ahead_of_time_products.describe_product(plugin)
    plugin.register(identifier)(_signed(describe, {**tensors, **fields}, plugin.TensorDesc))
    implement = _signed(made.recording(implement), {**tensors, **fields, **outputs}, results)
    plugin.aot_impl(identifier)(implement)


def _checked_ptx(variant: Any, target: int) -> Any:
    """PTX of a kernel, of a version that the driver of this machine knows."""
    ptx, driver = compile_ptx(variant, target), nvidia_driver()
    check_driver(ptx, driver.cuda_version() if driver else None)
    return ptx


def _sides(tensor: Any) -> list[int | None]:
    return [None if side < 0 else int(side) for side in tensor.shape]


def _max_sizes(tensors: dict[str, Any]) -> dict[str, int]:
    """Maximum size of every letter over the profile."""
    sizes: dict[str, int] = {}
    for name, axes in INPUT_SHAPES.items():
        shape = tensors[name].shape
        for letter, side in zip(axes, shape.max if shape.is_dynamic else shape, strict=True):
            sizes[letter] = max(sizes.get(letter, 1), int(side))
    return sizes


def _signed(function: Callable[..., Any], kinds: dict[str, Any], result: Any) -> Callable[..., Any]:
    """`function` with the signature from which `tensorrt.plugin` reads a plugin's inputs."""
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters: Sequence[inspect.Parameter] = [
        inspect.Parameter(name, named, annotation=kind) for name, kind in kinds.items()
    ]
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        parameters, return_annotation=result
    )
    return function
