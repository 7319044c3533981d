"""Builds on one GPU of several: which one the child uses, its timing cache, its memory."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from deploy.system.fake_driver import FakeDriver, install
from deploy.targets.fake_tensorrt import FakePlugin, Script, fake_tensorrt
from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.spec.backends import TENSORRT, TENSORRT_RTX
from mmi_deploy.spec.graphs import Limits, graphs
from mmi_deploy.spec.presets import tiny
from mmi_deploy.spec.target import Target
from mmi_deploy.system.progress import silent
from mmi_deploy.targets import tensorrt_plan
from mmi_deploy.targets.profiles import profiles
from mmi_deploy.targets.tensorrt_build import (
    Job,
    Plugin,
    build_engine,
    check_architecture,
    device_architecture,
    open_tensorrt,
)
from mmi_deploy.targets.tensorrt_plan import DEVICE_BASE, EnginePlan, check_device
from mmi_deploy.targets.tensorrt_process import build_in_process
from mmi_deploy.targets.timing_cache import timing_file

GIB = 1 << 30
MIXED = [("NVIDIA L4", (8, 9), 20 * GIB, 24 * GIB), ("NVIDIA H100", (9, 0), 4 * GIB, 80 * GIB)]
LLM = graphs(tiny(), Limits(context=64))["llm"]


def accept(network: Any, model: onnx.ModelProto) -> None:
    """Plugin check that passes."""


def same(model: onnx.ModelProto) -> onnx.ModelProto:
    return model


def register(trt: Any) -> FakePlugin:
    return FakePlugin()


def report_device(name: str) -> Any:
    """Fail with the GPUs that the process may use."""
    raise EngineError(f"visible: {os.environ.get('CUDA_VISIBLE_DEVICES')}")


def plugin(importer: Any) -> Plugin:
    return Plugin("fake", True, importer, register, same, accept)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    source = tmp_path / "llm.onnx"
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1])
    node = helper.make_node("Identity", ["x"], ["y"])
    onnx.save(helper.make_model(helper.make_graph([node], "llm", [value], [output])), source)
    made = plugin(report_device)
    return Job("llm", TENSORRT_RTX, "sm89", source, tmp_path / "llm.engine", profiles(LLM), made)


@pytest.mark.parametrize(
    ("visible", "device", "seen"), [("", 1, "1"), ("4,6", 1, "6"), ("4,6", 0, "4,6")]
)
def test_the_child_builds_on_the_chosen_gpu(
    job: Job, monkeypatch: pytest.MonkeyPatch, visible: str, device: int, seen: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(EngineError, match=f"visible: {seen}$"):
        build_in_process(replace(job, device=device), silent)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


def test_the_architecture_is_that_of_the_chosen_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeDriver(MIXED))
    assert device_architecture() == "sm89" and device_architecture(1) == "sm90"
    with pytest.raises(ConfigError, match=r"no GPU 2; expected GPU 0 \(NVIDIA L4, sm89\), GPU 1"):
        device_architecture(2)
    trt = fake_tensorrt(Script())
    check_architecture(trt, TENSORRT, "sm90", 1)
    with pytest.raises(ConfigError, match="choose GPU 1 .NVIDIA H100, sm90. with --device 1"):
        check_architecture(trt, TENSORRT, "sm90")
    with pytest.raises(ConfigError, match="give --arch sm90"):
        check_architecture(trt, TENSORRT, "sm80", 1)


def test_a_driver_that_is_too_old_is_refused_before_tensorrt_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mmi_deploy.runtime.tensorrt import versions

    install(monkeypatch, FakeDriver(MIXED, cuda=12040))
    packages = [SimpleNamespace(metadata={"Name": "tensorrt_cu13_libs"})]
    monkeypatch.setattr(versions.metadata, "distributions", lambda: packages)
    with pytest.raises(EngineError, match="got CUDA 12.4.*pip install tensorrt-cu12"):
        open_tensorrt(plugin(report_device), TENSORRT, "sm89")
    with pytest.raises(EngineError, match="visible: "):  # RTX builds without a GPU
        open_tensorrt(plugin(report_device), TENSORRT_RTX, "sm89")


# --- timing cache ------------------------------------------------------------------------------


class Timings:
    """TensorRT's timing cache: bytes of another version are refused."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def combine(self, other: Timings, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.data += other.data.removeprefix(b"times ")
        return True

    def serialize(self) -> bytearray:
        return bytearray(self.data)


def with_timings(script: Script) -> Any:
    """The fake builder with a timing cache, to which each build adds `llm`."""
    trt = fake_tensorrt(script)
    make = trt.Builder.create_builder_config

    def config(builder: Any) -> Any:
        made = make(builder)
        made.create_timing_cache = lambda data: Timings(bytes(data))
        made.get_timing_cache = lambda: made.timings

        def put(cache: Timings, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            if cache.data and not cache.data.startswith(b"times "):
                return False
            script.seen.setdefault("timings", []).append(cache.data)
            made.timings = Timings((cache.data or b"times ") + b"llm ")
            return True

        made.set_timing_cache = put
        return made

    trt.Builder.create_builder_config = config
    return trt


def test_measured_times_serve_the_next_build(job: Job, tmp_path: Path) -> None:
    file = tmp_path / "timing" / "l4.cache"
    for _ in range(2):
        script = Script()
        build_engine(with_timings(script), replace(job, timings=file), silent)
    assert script.seen["timings"] == [b"times llm "]
    assert file.read_bytes().startswith(b"times llm ")


def test_damaged_times_are_measured_again(job: Job, tmp_path: Path) -> None:
    file, script = tmp_path / "l4.cache", Script()
    file.write_bytes(b"of another GPU")
    build_engine(with_timings(script), replace(job, timings=file), silent)
    assert script.seen["timings"] == [b""]


def test_a_folder_that_cannot_be_written_does_not_fail_the_build(job: Job, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    file = tmp_path / "file" / "l4.cache"
    assert build_engine(with_timings(Script()), replace(job, timings=file), silent).engine_bytes


def test_each_gpu_and_version_has_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MMI_CACHE", str(tmp_path))
    file = timing_file("tensorrt", "11.4.0.106", "NVIDIA RTX A6000 / 48GB")
    assert file == tmp_path / "timing" / "tensorrt-11.4.0.106-NVIDIA-RTX-A6000-48GB.cache"


def test_the_real_builder_has_the_timing_caches_calls() -> None:
    from mmi_deploy.runtime.tensorrt.module import import_tensorrt

    if find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx-cu13 is not installed")
    trt = import_tensorrt("tensorrt_rtx")
    for kind, name, words in (
        (trt.IBuilderConfig, "create_timing_cache", ["Buffer"]),
        (trt.IBuilderConfig, "set_timing_cache", ["ITimingCache", "bool"]),
        (trt.IBuilderConfig, "get_timing_cache", ["ITimingCache"]),
        (trt.ITimingCache, "combine", ["ITimingCache", "bool"]),
        (trt.ITimingCache, "serialize", ["IHostMemory"]),
    ):
        assert all(word in getattr(kind, name).__doc__ for word in words), name


# --- memory of the GPU -------------------------------------------------------------------------


def plan(runtime: str, weights: int, bound: int) -> EnginePlan:
    return EnginePlan(Target(runtime, "sm90", "fp16"), "llm", profiles(LLM), {}, weights, bound)


def test_a_gpu_that_measures_holds_weights_and_tensors() -> None:
    assert plan(TENSORRT, 7 * GIB, GIB).device_memory == DEVICE_BASE + 8 * GIB
    assert plan(TENSORRT_RTX, 7 * GIB, GIB).device_memory == 0


def test_inputs_and_outputs_are_counted_at_the_largest_shapes_and_the_cache_once() -> None:
    """llm of the tiny model: the prefill profile is the largest."""
    typed = LLM.typed("float16")
    (sizes,) = ({k: r.max for k, r in profile.ranges.items()} for profile in profiles(LLM)[:1])
    names = {t.name for t in typed.outputs} - set(typed.in_place)
    tensors = [*typed.inputs, *(typed[name] for name in names)]
    width = {"float16": 2, "float32": 4, "int64": 8, "int32": 4}
    expected = 0
    for tensor in tensors:
        count = 1
        for side in tensor.resolve(**sizes):
            count *= side
        expected += count * width[tensor.dtype]
    assert tensorrt_plan._bound_bytes(typed, profiles(LLM)) == expected


def test_an_occupied_gpu_is_named_before_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeDriver(MIXED))
    check_device([plan(TENSORRT, 6 * GIB, 0), plan(TENSORRT_RTX, 99 * GIB, 0)], 0)
    with pytest.raises(EngineError) as occupied:
        check_device([plan(TENSORRT, 6 * GIB, 0)], 1)
    line = str(occupied.value)
    assert "GPU 1 has too little free memory to build llm" in line and "got 4.3 GB of 85.9" in line
    assert "Other programs hold 81.6 GB of it" in line and "--device" in line
    with pytest.raises(EngineError, match="expected about 27.4 GB.*Build the smaller graphs here"):
        check_device([plan(TENSORRT, 25 * GIB, 0)], 0)
    install(monkeypatch, None)
    check_device([plan(TENSORRT, 99 * GIB, 0)], 0)
