"""The plugin library, compiled against TensorRT's headers where they are: it loads into every
TensorRT there is, makes plugins from fields and back, and refuses in one line."""

import ctypes
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.tensorrt.module import INSTALL, import_tensorrt
from mmi_plugins.compile.checksum import has_valid_checksum
from mmi_plugins.operator import NAME
from mmi_plugins.tensorrt.build_only_plugin import FIELDS
from mmi_plugins.tensorrt.build_plugin import find_tensorrt_headers
from mmi_plugins.tensorrt.plugin_library import (
    PluginLibrary,
    load_tensorrt_plugin,
    plugin_creator,
)
from oracles.plugin_driver import Drive, compiled_driver
from oracles.tensorrt_builds import ATTRIBUTES

pytestmark = pytest.mark.slow


def lean_of_the_headers() -> str:
    """The module of TensorRT's runtime, if it has the major version of the headers here."""
    name = "tensorrt_lean_bindings"
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: {INSTALL[name]}")
    version, built = import_tensorrt(name).__version__, find_tensorrt_headers()[1]
    if version.partition(".")[0] != built.partition(".")[0]:
        pytest.skip(f"{name} is {version}, the headers here are {built}")
    return name


@pytest.fixture(scope="module", params=["tensorrt_rtx", "tensorrt_lean_bindings"])
def trt(request: pytest.FixtureRequest, library: Path) -> Any:
    if request.param == "tensorrt_rtx":
        return request.getfixturevalue("rtx")
    return import_tensorrt(lean_of_the_headers())


@pytest.fixture
def plugin(trt: Any, library: Path) -> Iterator[PluginLibrary]:
    loaded = load_tensorrt_plugin(library, trt)
    yield loaded
    if plugin_creator(trt) is not None:
        loaded.unregister()


def collection(trt: Any, **changed: Any) -> Any:
    """The fields of `one_node`; `changed` replaces some, None drops one."""
    kinds = {np.dtype(np.int32): trt.PluginFieldType.INT32}
    kinds[np.dtype(np.float32)] = trt.PluginFieldType.FLOAT32
    arrays = {name: np.atleast_1d(np.array(ATTRIBUTES[name], FIELDS[name])) for name in FIELDS}
    arrays |= changed
    return trt.PluginFieldCollection(
        [
            trt.PluginField(name, data, kinds[data.dtype])
            for name, data in arrays.items()
            if data is not None
        ]
    )


def create(trt: Any, phase: str = "BUILD", **changed: Any) -> Any:
    return plugin_creator(trt).create_plugin(
        "layer", collection(trt, **changed), getattr(trt.TensorRTPhase, phase)
    )


def capability(trt: Any, plugin: Any, kind: str) -> Any:
    return plugin.get_capability_interface(getattr(trt.PluginCapabilityType, kind))


@pytest.fixture(scope="module")
def drive(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Drive:
    """Calls the library as TensorRT would: what it returns, and what it reports."""
    return compiled_driver("tensorrt_driver.cpp", library, tmp_path_factory.mktemp("driver"))


def test_cmake_appends_a_checksum_to_what_it_links(library: Path) -> None:
    assert has_valid_checksum(library)


def test_the_library_needs_no_symbol_of_tensorrt(library: Path) -> None:
    """It opens, with every symbol bound at once, in a process without TensorRT."""
    program = f"import ctypes, os; ctypes.CDLL({str(library)!r}, mode=os.RTLD_NOW)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_creator_names_the_operator_and_its_attributes(trt: Any, plugin: Any) -> None:
    creator = plugin_creator(trt)
    assert [field.name for field in creator.field_names] == list(FIELDS)
    made = create(trt)  # owns the interface
    core = capability(trt, made, "CORE")
    assert (core.plugin_name, core.plugin_namespace, core.plugin_version) == (NAME, "mmi", "1")


def test_fields_survive_being_stored(drive: Drive) -> None:
    """In a build, in the plugin that an engine makes of them, and, after that is gone, in what a
    context got of it and in a copy."""
    first, second, third = drive("stored")[0].splitlines()
    assert first == second == third
    assert first == "level_heights=4,2 level_widths=4,2 base_grid=16 null_slot=1 plugin_version=1"


@pytest.mark.parametrize(
    ("phase", "changed", "reason"),
    [
        ("BUILD", {"base_grid": None}, "attributes missing"),
        ("BUILD", {"level_widths": np.array([4], np.int32)}, "differ in length; got 2 and 1"),
        ("BUILD", {"level_widths": np.ones(5, np.int32)}, "expected 1 to 4 int32, got 5"),
        ("BUILD", {"base_grid": np.array([16], np.int32)}, "expected one float32"),
        ("BUILD", {"base_grid": np.array([-1], np.float32)}, "base_grid is not positive"),
        ("BUILD", {"level_heights": np.array([4, 0], np.int32)}, "a level is empty"),
        ("RUNTIME", {}, "fields of version 0"),
        ("RUNTIME", {"plugin_version": np.array([2], np.int32)}, "fields of version 2"),
    ],
)  # fmt: skip
def test_wrong_fields_are_refused(
    trt: Any, plugin: PluginLibrary, phase: str, changed: dict[str, Any], reason: str
) -> None:
    assert create(trt, phase, **changed) is None
    assert reason in plugin.last_report()
    assert plugin.last_report().startswith(f"mmi::{NAME}: ")


# TensorRT's numbers of types.
FLOAT32, FLOAT16, INT8, INT32, BFLOAT16 = 0, 1, 2, 3, 7


@pytest.mark.parametrize("narrow", [FLOAT32, FLOAT16, BFLOAT16])
def test_types_and_formats(drive: Drive, narrow: int) -> None:
    """T for value, offsets, logits and output alike, the rest int32 and float32, linear all."""
    value = f"{FLOAT32}{FLOAT16}{BFLOAT16}"
    inputs = [value, INT32, narrow, narrow, FLOAT32, FLOAT32, INT32, FLOAT32, FLOAT32]
    assert drive("types", narrow) == (f"{' '.join(map(str, inputs))} {narrow} -> 0 {narrow}", "")


def test_another_type_is_refused(drive: Drive) -> None:
    got, report = drive("types", INT8)
    assert "-> -1" in got
    assert "wrong type of value; expected float32, float16 or bfloat16, got" in report


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (["d=36"], "the head size is not a multiple of 8 up to 128"),
        (["d=136"], "the head size is not a multiple of 8 up to 128"),
        (["p=17"], "more than 16 points"),
        (["s=21"], "value and the attributes differ in s; expected 20, got 21"),
        (["l=3"], "logits and the attributes differ in l; expected 2, got 3"),
        (["*=3"], "image_position has neither one row nor one for each query"),
        (["m=0"], "axis 1 of image_slot; expected 1, got 0"),
        ([3, 1, 6], "logits and offsets differ in q; expected 7, got 6"),
        ([8, 0, 3], "null_value and value differ in h; expected 2, got 3"),
        ([4, 3, 3], "offset_table must end in (x, y); expected 2, got 3"),
    ],
)
def test_contradicting_shapes_are_refused(drive: Drive, changed: list[object], reason: str) -> None:
    assert drive("shapes") == ("0 0", "")
    got, report = drive("shapes", *changed)
    assert got == "-1 -1"
    assert report.splitlines() == [f"mmi::{NAME}: {reason}"] * 2


def test_what_only_the_run_knows_is_not_held_against_a_build(drive: Drive) -> None:
    """-1 stands for a side that a profile leaves open."""
    assert drive("shapes", "q=-1", "m=-1", "b=-1", "n=-1", "*=-1") == ("0 0", "")
    assert drive("shapes", "q=-1", "d=36")[0] == "-1 -1"


def test_the_workspace_is_that_of_the_largest_shapes(drive: Drive) -> None:
    def size(*letters: str) -> int:
        return int(drive("workspace", *letters)[0])

    assert size("m=1") == 0  # all four points of an image fit one block
    assert size("m=49") >= 7 * 2 * 2 * (32 + 2) * 4  # at least two parts a row
    assert size("m=49", "q=4096", "b=4") >= size("m=49", "q=4096") >= size("m=49")


def test_running_says_what_is_wrong(drive: Drive) -> None:
    got, report = drive("enqueue", 2**20 + 2)
    assert (got, report) == ("-1", f"mmi::{NAME}: a pointer is not aligned to 16 bytes")
    if not Path("/dev/nvidia0").exists():
        got, report = drive("enqueue", 2**20)
        assert got == "-1" and "CUDA driver" in report and len(report.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "version"), [("tensorrt", "10.15.1.29"), ("tensorrt", "12.0.0.1")]
)
def test_a_library_for_another_major_version_is_refused(
    library: Path, name: str, version: str
) -> None:
    built = ctypes.CDLL(str(library)).mmi_tensorrt_headers
    built.restype = ctypes.c_char_p
    if built().decode().startswith(f"TensorRT {version.partition('.')[0]}."):
        pytest.skip("the headers here are of that version")
    module: Any = SimpleNamespace(__name__=name, __version__=version)
    with pytest.raises(
        EngineError, match=f"built for another TensorRT; expected TensorRT {version}"
    ):
        load_tensorrt_plugin(library, module)


def test_loading_twice_is_refused(trt: Any, plugin: PluginLibrary) -> None:
    with pytest.raises(EngineError, match="has a plugin mmi::.* already"):
        load_tensorrt_plugin(plugin.path, trt)


def open_registered(library: Path, module: str, runtime: str) -> tuple[str, str]:
    """Open the library as tools do that only open libraries, in a process of its own: the plugin
    that is registered afterwards, and the output."""
    registered = next(library.parent.glob("*_registered-*.so"))
    program = f"""
import ctypes
from mmi_deploy.runtime.tensorrt.module import import_tensorrt
from mmi_plugins.tensorrt.plugin_library import plugin_creator
module = import_tensorrt({module!r})
loaded = [line.split()[-1] for line in open("/proc/self/maps") if {runtime!r} in line]
ctypes.CDLL(loaded[0], mode=ctypes.RTLD_GLOBAL)
ctypes.CDLL({str(registered)!r})
print(getattr(plugin_creator(module), "name", None))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return done.stdout.strip(), done.stderr.strip()


def test_the_other_form_registers_itself(library: Path) -> None:
    module = lean_of_the_headers()
    assert open_registered(library, module, "libnvinfer_lean") == (NAME, "")


def test_the_other_form_is_no_danger_to_another_tensorrt(rtx: Any, library: Path) -> None:
    """RTX 1.x is neither 10 nor 11, and its registry another class than that of 10."""
    got, report = open_registered(library, rtx.__name__, "libtensorrt_rtx.so")
    assert got == "None"
    assert "built for another TensorRT; expected TensorRT 1" in report and "got 1." in report
