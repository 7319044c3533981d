"""The plugin without a compiler: its PTX with the arguments that TensorRT would pass, in the
emulator; and its registration through NVIDIA's own `tensorrt.plugin`, where a wheel has it."""

import importlib
import struct
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mmi_deploy.errors import EngineError
from mmi_emulator.ptx import GlobalMemory, Machine, parse
from mmi_plugins.compile import nvrtc
from mmi_plugins.compile.launch_plan import (
    check_limits,
    constant,
    device_arrays,
    output_array,
    widen,
)
from mmi_plugins.conformance.calls import draw
from mmi_plugins.gemv import calls as product_calls
from mmi_plugins.gemv.launch_plan import device_arrays as product_arrays
from mmi_plugins.gemv.operator import NAME as PRODUCT
from mmi_plugins.gemv.operator import TOLERANCES as PRODUCT_TOLERANCES
from mmi_plugins.gemv.operator import GemvCall
from mmi_plugins.gemv.operator import attributes as product_attributes
from mmi_plugins.gemv.reference import gemv_reference
from mmi_plugins.operator import INPUT_SHAPES, NAME, TOLERANCES, Call
from mmi_plugins.reference import mmfs_reference, output_of
from mmi_plugins.tensorrt.ahead_of_time import (
    PTX_TARGETS,
    SIZES,
    _max_sizes,
    choose_variant,
    ptx_target,
    register_ahead_of_time,
)
from mmi_plugins.tensorrt.ahead_of_time_products import choose_product

needs_nvrtc = pytest.mark.skipif(nvrtc.missing() is not None, reason=nvrtc.missing() or "")


def fields_of(call: Call) -> dict[str, np.ndarray]:
    return {
        "level_heights": np.array(call.level_heights, np.int32),
        "level_widths": np.array(call.level_widths, np.int32),
        "base_grid": np.array([call.base_grid], np.float32),
        "null_slot": np.array([call.null_slot], np.int32),
    }


def sizes_of(call: Call) -> list[int]:
    return [call[name].shape[axis] for name, axis in SIZES.values()]


def run(
    call: Call, ptx: str, name: str, grid: tuple[int, int, int], threads: int, sizes: list[int]
) -> np.ndarray:
    """The output [b, q, h * d] of the kernel, given the inputs' addresses, the integers and the
    output's address, in the order in which TensorRT passes them."""
    arrays, output = device_arrays(call), output_array(call)
    memory = GlobalMemory(sum(array.nbytes + 4096 for array in (*arrays.values(), output)))
    pointers = [memory.allocate(arrays[input_], input_) for input_ in INPUT_SHAPES]
    result = memory.reserve(output.nbytes, "output")
    packed = struct.pack(f"<{len(pointers)}Q{len(sizes)}i", *pointers, *sizes)
    packed += bytes(-len(packed) % 8) + struct.pack("<Q", result)
    Machine(parse(ptx)[name], memory, grid, (threads, 1, 1), packed).run()
    content, written = memory.written(result, output.dtype)
    assert written.all()
    return widen(content.reshape(output.shape), call.dtype)


def assert_right(call: Call, got: np.ndarray) -> None:
    expected = output_of(call, mmfs_reference(call))
    rms = np.sqrt(np.mean(expected**2))
    assert np.sqrt(np.mean((got - expected) ** 2)) <= TOLERANCES[call.dtype].relative * rms


@needs_nvrtc
@pytest.mark.parametrize("kind", ["rows", "split"])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("channels", [40, 128])
def test_the_kernel_is_right_with_the_arguments_tensorrt_passes(
    kind: str, dtype: str, channels: int
) -> None:
    rng = np.random.default_rng([channels, len(dtype), len(kind)])
    call = draw(rng, dtype=dtype, d=channels, b=2, q=3, h=2, m=5, n=2, r=4, p=4)
    rows = constant("kMinUnsplitRows") if kind == "rows" else 1
    variant = choose_variant(dtype, fields_of(call), opt_rows=rows, channels=channels)
    assert variant.kind == kind
    across = -(-3 // constant("kRowWarps")) if kind == "rows" else 3
    ptx = nvrtc.compile_ptx(variant, PTX_TARGETS[0])
    assert_right(
        call, run(call, ptx, variant.name, (across, 2, 2), variant.threads, sizes_of(call))
    )


@needs_nvrtc
def test_attributes_are_constants_of_the_ptx() -> None:
    """A kernel made for one base grid must not be right for another."""
    call = draw(np.random.default_rng(3), dtype="float32", d=8, b=1, q=3, h=1, m=2, base_grid=8.0)
    other = {**fields_of(call), "base_grid": np.array([4.0], np.float32)}
    variant = choose_variant("float32", other, opt_rows=1, channels=8)
    ptx = nvrtc.compile_ptx(variant, PTX_TARGETS[0])
    got = run(call, ptx, variant.name, (3, 1, 1), variant.threads, sizes_of(call))
    with pytest.raises(AssertionError):
        assert_right(call, got)


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((11, 0), 100), ((12, 1), 120)],
)
def test_ptx_is_chosen_that_the_gpu_can_run(capability: tuple[int, int], target: int) -> None:
    assert ptx_target(capability) == target


def test_a_gpu_that_is_too_old_is_refused() -> None:
    with pytest.raises(EngineError, match=r"8\.0 or newer; got \(7, 5\)"):
        ptx_target((7, 5))


def test_unknown_head_size_takes_the_kernel_for_all() -> None:
    fields = fields_of(draw(np.random.default_rng(0)))
    assert choose_variant("float16", fields, opt_rows=1, channels=None).wide
    assert not choose_variant("float16", fields, opt_rows=1, channels=64).wide
    assert not choose_variant("float32", fields, opt_rows=1, channels=None).wide


def test_a_profile_beyond_what_the_kernels_can_address_is_refused() -> None:
    """Such an engine runs without any of our code."""
    call = draw(np.random.default_rng(1), dtype="float16", b=2, h=2, d=64)
    shapes = {name: call[name].shape for name in INPUT_SHAPES}

    def tensors(**changed: tuple[int, ...]) -> dict[str, Any]:
        class Dynamic(tuple[int, ...]):
            is_dynamic = True
            max = property(tuple)

        given = {**shapes, **changed}
        return {name: SimpleNamespace(shape=Dynamic(shape)) for name, shape in given.items()}

    check_limits(_max_sizes(tensors()), "float16")
    value, offsets = shapes["value"], shapes["offsets"]
    for reason, changed in {
        "64 GiB": tensors(value=(2**28, *value[1:])),
        "65535": tensors(image_slot=(70000, 1)),
        "output rows": tensors(offsets=(2, 2**30, *offsets[2:])),
    }.items():
        with pytest.raises(EngineError, match=reason):
            check_limits(_max_sizes(changed), "float16")


# --- through NVIDIA's own Python code -----------------------------------------------------------


class Number:
    """Stands for TensorRT's symbolic dimension: one that is known."""

    def __init__(self, value: int) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value


class Numbers:
    """Stands for TensorRT's builder of such dimensions."""

    def constant(self, value: int) -> Number:
        return Number(value)

    def operation(self, what: Any, first: Number, second: Number) -> Number:
        a, b = first.value, second.value
        return Number({"PROD": a * b, "CEIL_DIV": -(-a // b)}[what.name])


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`tensorrt.plugin` of the runtime-only wheel, which is the same Python code, under its proper
    name. What only a builder has (dimensions, descriptions of tensors) is replaced."""
    lean = pytest.importorskip(
        "tensorrt_lean_bindings", reason="tensorrt-lean-cu13-bindings is not installed"
    )
    module = ModuleType("tensorrt")
    module.__dict__.update({k: v for k, v in vars(lean).items() if not k.startswith("__")})
    module.__path__ = lean.__path__
    replaced = {
        "IDimensionExpr": Number,
        "DimsExprs": lambda count: [None] * count,
        "DynamicPluginTensorDesc": type("DynamicPluginTensorDesc", (SimpleNamespace,), {}),
        "TensorFormat": SimpleNamespace(LINEAR="linear"),
        "ISymExpr": type("ISymExpr", (), {}),
        "ITensor": type("ITensor", (), {}),
    }
    module.__dict__.update(replaced)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    yield module
    registry = module.get_plugin_registry()
    for creator in [c for c in registry.all_creators if c.name in (NAME, PRODUCT)]:
        registry.deregister_creator(creator)
    for name in [name for name in sys.modules if name.startswith("tensorrt.")]:
        del sys.modules[name]


class Integers(dict[int, Any]):
    """Stands for what TensorRT collects a kernel's integers in."""

    nbSymExprs = 0


@needs_nvrtc
@pytest.mark.parametrize(("likely", "kind"), [(1, "split"), (1024, "rows")])
def test_tensorrts_own_code_takes_the_plugin(tensorrt: ModuleType, likely: int, kind: str) -> None:
    """Types, shape, kernel, launch and integers as `tensorrt.plugin` passes them on, for a profile
    whose optimum number of queries is `likely`; then the kernel runs with them on three."""
    trt: Any = tensorrt
    plugin = register_ahead_of_time(trt)
    with pytest.raises(EngineError, match="has a plugin mmi::.* already"):
        register_ahead_of_time(trt)
    call = draw(np.random.default_rng(5), dtype="float16", d=8, b=2, q=3, h=2, m=2, n=2, p=1, r=4)
    fields = [
        trt.PluginField(
            name,
            data,
            trt.PluginFieldType.FLOAT32 if name == "base_grid" else trt.PluginFieldType.INT32,
        )
        for name, data in fields_of(call).items()
    ]
    creator = importlib.import_module("tensorrt.plugin._lib").QDP_CREATORS[f"mmi::{NAME}"]
    made = creator.create_plugin(
        NAME,
        "mmi",
        trt.PluginFieldCollection(fields),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )
    shapes = [call[name].shape for name in INPUT_SHAPES]
    types = [
        trt.float16 if name in ("value", "offsets", "logits")
        else trt.int32 if name.startswith("image_")
        else trt.float32
        for name in INPUT_SHAPES
    ]  # fmt: skip
    assert made.get_output_data_types(types, [len(shape) for shape in shapes]) == [trt.float16]
    sides = [[Number(side) for side in shape] for shape in shapes]
    (output,) = made.get_output_shapes(sides, [], Numbers())
    assert [side.value for side in output] == [2, 3, 2 * 8]

    described = [
        trt.DynamicPluginTensorDesc(
            desc=SimpleNamespace(dims=shape, type=type_, format="linear", scale=1.0)
        )
        for shape, type_ in zip([*shapes, (2, 3, 16)], [*types, trt.float16], strict=True)
    ]
    offsets = described[list(INPUT_SHAPES).index("offsets")]
    offsets.opt = offsets.max = (2, likely, *offsets.desc.dims[2:])
    offsets.desc.dims = (2, -1, *offsets.desc.dims[2:])
    launch, integers = SimpleNamespace(), Integers()
    made._tactic = 0
    made.get_launch_params(sides, described, len(shapes), launch, integers, Numbers())
    name, ptx = made.get_kernel([each.desc for each in described[:-1]], [described[-1].desc])
    assert name.endswith(kind) and len(integers) == integers.nbSymExprs
    grid = tuple(getattr(launch, f"grid_{axis}").expr.value for axis in "xyz")
    sizes = [integers[index].expr.value for index in range(len(integers))]
    assert sizes == sizes_of(call)
    assert_right(call, run(call, ptx.decode(), name, grid, launch.block_x.expr.value, sizes))

    assert plugin.last_report() == ""
    described[0].desc.type = trt.int8
    with pytest.raises(EngineError):
        made.get_launch_params(sides, described, len(shapes), launch, integers, Numbers())
    assert "unsupported type" in plugin.last_report()


# --- weight-only products ------------------------------------------------------------------------


def run_product(
    call: GemvCall, ptx: str, name: str, grid: tuple[int, int, int], threads: int
) -> np.ndarray:
    """As `run`, of a product: addresses of the inputs, rows, address of the output."""
    arrays = product_arrays(call)
    memory = GlobalMemory(sum(array.nbytes + 4096 for array in arrays.values()) + 2**20)
    pointers = [memory.allocate(array, name) for name, array in arrays.items()]
    result = memory.reserve(2 * call.rows * call.out, "output")
    packed = struct.pack("<3Qi4xQ", *pointers, call.rows, result)
    Machine(parse(ptx)[name], memory, grid, (threads, 1, 1), packed).run()
    bits, written = memory.written(result, np.dtype(np.uint16))
    assert written.all()
    return bits.view(call.input.dtype).reshape(call.rows, call.out).astype(np.float64)


def assert_product_is_right(call: GemvCall, got: np.ndarray) -> None:
    expected = gemv_reference(call)
    error = np.sqrt(((got - expected) ** 2).mean() / (expected**2).mean())
    assert error <= PRODUCT_TOLERANCES[call.dtype]


@needs_nvrtc
@pytest.mark.parametrize(
    ("format_", "block", "dtype"),
    [("int8", 0, "float16"), ("float8_e4m3fn", 0, "bfloat16"), ("int4", 64, "float16")],
)
@pytest.mark.parametrize("rows", [3, 70])
def test_a_product_is_right_with_the_arguments_tensorrt_passes(
    format_: str, block: int, dtype: str, rows: int
) -> None:
    """By the kernel for its rows, and that for many rows also where there are few."""
    rng = np.random.default_rng(rows)
    call = product_calls.draw(rng, format_, dtype, rows=rows, inputs=192, outputs=150, block=block)
    fields = product_attributes(format_, 150, block)
    for most in {rows, 2048}:
        variant = choose_product(dtype, fields, inputs=192, most_rows=most)
        assert variant.rows == (most > 8)
        ptx = nvrtc.compile_ptx(variant, PTX_TARGETS[0])
        grid = (-(-rows // 64), 2, 1) if variant.rows else (10, 1, 1)
        assert_product_is_right(call, run_product(call, ptx, variant.name, grid, variant.threads))


@needs_nvrtc
@pytest.mark.parametrize(("most", "grid"), [((8, 1), (10, 1, 1)), ((1, 2048), (1, 2, 1))])
def test_tensorrts_own_code_takes_the_product(
    tensorrt: ModuleType, most: tuple[int, int], grid: tuple[int, int, int]
) -> None:
    """For profiles of decoding and of prefill; then the kernel runs with what is passed."""
    trt: Any = tensorrt
    plugin = register_ahead_of_time(trt)
    call = product_calls.draw(
        np.random.default_rng(0), "int4", rows=6, inputs=192, outputs=150, block=32
    )
    fields = [
        trt.PluginField(name, np.array([number], np.int32), trt.PluginFieldType.INT32)
        for name, number in product_attributes("int4", 150, 32).items()
    ]
    creator = importlib.import_module("tensorrt.plugin._lib").QDP_CREATORS[f"mmi::{PRODUCT}"]
    made = creator.create_plugin(
        PRODUCT,
        "mmi",
        trt.PluginFieldCollection(fields),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )
    arrays = product_arrays(call)
    shapes = [(2, 3, 192), *(arrays[name].shape for name in ("weight", "scales"))]
    types = [trt.float16, trt.int32, trt.float16]
    assert made.get_output_data_types(types, [len(shape) for shape in shapes]) == [trt.float16]
    sides = [[Number(side) for side in shape] for shape in shapes]
    (output,) = made.get_output_shapes(sides, [], Numbers())
    assert [side.value for side in output] == [2, 3, 150]
    described = [
        trt.DynamicPluginTensorDesc(
            desc=SimpleNamespace(dims=shape, type=type_, format="linear", scale=1.0)
        )
        for shape, type_ in zip([*shapes, (2, 3, 150)], [*types, trt.float16], strict=True)
    ]
    described[0].opt = described[0].max = (*most, 192)
    described[0].desc.dims = (-1, -1, 192)
    launch, integers = SimpleNamespace(grid_y=None, grid_z=None), Integers()
    made._tactic = 0
    made.get_launch_params(sides, described, len(shapes), launch, integers, Numbers())
    name, ptx = made.get_kernel([each.desc for each in described[:-1]], [described[-1].desc])
    assert [integers[index].expr.value for index in range(len(integers))] == [6]
    found = tuple(getattr(launch, f"grid_{axis}") for axis in "xyz")
    assert tuple(1 if side is None else side.expr.value for side in found) == grid
    threads = launch.block_x.expr.value
    assert_product_is_right(call, run_product(call, ptx.decode(), name, grid, threads))
    assert plugin.last_report() == ""
    described[1].desc.dims = (10, 3, 256)
    with pytest.raises(EngineError):
        made.get_launch_params(sides, described, len(shapes), launch, integers, Numbers())
    assert "shape of weight" in plugin.last_report()
