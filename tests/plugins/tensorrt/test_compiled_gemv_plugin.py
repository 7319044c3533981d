"""The plugin of `mmi::WeightOnlyMatMul` in the library: compiled against TensorRT's headers where
they are, called as TensorRT does, and built into engines by TensorRT-RTX."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmi_plugins.gemv.calls import draw
from mmi_plugins.gemv.launch_plan import device_arrays
from mmi_plugins.gemv.operator import DOMAIN, NAME, attributes
from mmi_plugins.tensorrt.plugin_library import PluginLibrary, load_tensorrt_plugin
from oracles.plugin_driver import Drive, compiled_driver
from oracles.tensorrt_builds import build

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def drive(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Drive:
    """Calls the library as TensorRT would: what it returns, and what it reports."""
    return compiled_driver("tensorrt_gemv_driver.cpp", library, tmp_path_factory.mktemp("driver"))


def test_fields_survive_being_stored(drive: Drive) -> None:
    first, second, third = drive("stored")[0].splitlines()
    assert first == second == third == "format=2 out=40 block=64 plugin_version=1"


# TensorRT's numbers of types.
FLOAT32, FLOAT16, INT8, INT32, BFLOAT16 = 0, 1, 2, 3, 7


@pytest.mark.parametrize("narrow", [FLOAT16, BFLOAT16])
def test_types_and_formats(drive: Drive, narrow: int) -> None:
    expected = f"{FLOAT16}{BFLOAT16} {INT32} {narrow} {narrow} -> 0 {narrow}"
    assert drive("types", narrow) == (expected, "")


def test_another_type_is_refused(drive: Drive) -> None:
    got, report = drive("types", FLOAT32)
    assert "-> -1" in got
    assert report == f"mmi::{NAME}: wrong type of input; expected float16 or bfloat16, got float32"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("create", 2, 40, 16), "a block of int4 is not 32, 64 or 128"),
        (("create", 0, 40, 32), "int8 and float8 have no blocks"),
        (("create", 3, 40, 0), "the weight is neither int8, float8 nor int4"),
        (("create", 0, 0, 0), "there are no output channels"),
        (("missing",), "attributes missing; expected format, out and block"),
        (("long",), "attribute out; expected one int32, got 2"),
        (("run",), "fields of version 0, this library reads version 1; build the engine again"),
    ],
)
def test_wrong_fields_are_refused(drive: Drive, command: tuple[object, ...], reason: str) -> None:
    assert drive("create", 1, 7, 0) == ("made", "")
    got, report = drive(*command)
    assert got == "refused" and reason in report and report.startswith(f"mmi::{NAME}: ")


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ((0, 0), "there are no rows"),
        ((2, 2, 0, 1, 160), "input channels are not a multiple of the block"),
        ((2, 2, 0, 1, 320), "axis 1 of weight; expected 3, got 2"),
        ((2, 2, 1, 0, 4), "axis 0 of weight; expected 3, got 4"),
        ((2, 2, 2, 3, 4), "axis 3 of scales; expected 2, got 4"),
    ],
)
def test_contradicting_shapes_are_refused(
    drive: Drive, numbers: tuple[int, ...], reason: str
) -> None:
    assert drive("shapes", 2, 8) == ("0 0 0", "")
    got, report = drive("shapes", *numbers)
    assert got == "-1 -1 0"
    assert set(report.splitlines()) == {f"mmi::{NAME}: {reason}"}


def test_a_profile_may_have_any_number_of_rows(drive: Drive) -> None:
    for most in (8, 9, 2048):
        assert drive("shapes", -1, most) == ("0 0 0", "")


def test_running_says_what_is_wrong(drive: Drive) -> None:
    got, report = drive("enqueue", 2**20 + 2)
    assert (got, report) == ("-1", f"mmi::{NAME}: a pointer is not aligned to 16 bytes")
    if not Path("/dev/nvidia0").exists():
        got, report = drive("enqueue", 2**20)
        assert got == "-1" and "CUDA driver" in report and len(report.splitlines()) == 1


@pytest.fixture
def plugin(rtx: Any, library: Path) -> Iterator[PluginLibrary]:
    loaded = load_tensorrt_plugin(library, rtx)
    yield loaded
    loaded.unregister()


def one_node(format_: str, block: int, dtype: str) -> onnx.ModelProto:
    """A product [b, t, 256] times [256, 40], its weight a constant."""
    call = draw(np.random.default_rng(0), format_, dtype, inputs=256, outputs=40, block=block)
    arrays = device_arrays(call)
    narrow = TensorProto.FLOAT16 if dtype == "float16" else TensorProto.BFLOAT16
    scales = helper.make_tensor(
        "scales", narrow, arrays["scales"].shape, arrays["scales"].tobytes(), raw=True
    )
    graph = helper.make_graph(
        [
            helper.make_node(
                NAME,
                ["input", "weight", "scales"],
                ["output"],
                domain=DOMAIN,
                plugin_namespace=DOMAIN,
                **attributes(format_, 40, block),
            )
        ],
        "one_node",
        [helper.make_tensor_value_info("input", narrow, ["b", "t", 256])],
        [helper.make_tensor_value_info("output", narrow, None)],
        [numpy_helper.from_array(arrays["weight"], "weight"), scales],
    )
    versions = [helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=10)


@pytest.mark.parametrize(
    ("format_", "block", "dtype"),
    [("int8", 0, "float16"), ("float8_e4m3fn", 0, "bfloat16"), ("int4", 128, "float16")],
)
def test_tensorrt_rtx_takes_the_plugin_with_a_constant_weight(
    rtx: Any, plugin: PluginLibrary, format_: str, block: int, dtype: str
) -> None:
    rows = {"input": ((1, 1, 256), (4, 1, 256), (8, 1, 256))}
    made = build(rtx, one_node(format_, block, dtype), profile=rows)
    assert made.layers.count("PLUGIN_V3") == 1, made.errors()
    assert made.engine, made.errors()


def test_tensorrt_rtx_takes_one_profile_for_prefill_and_decode(
    rtx: Any, plugin: PluginLibrary
) -> None:
    rows = {"input": ((1, 1, 256), (4, 64, 256), (8, 2048, 256))}
    made = build(rtx, one_node("int8", 0, "float16"), profile=rows)
    assert made.layers.count("PLUGIN_V3") == 1 and made.engine, made.errors()
