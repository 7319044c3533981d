"""Building an engine from an ONNX file: calls to TensorRT, and errors from it. The builder is a
scripted fake here; test_tensorrt_rtx_build.py has a real one."""

from __future__ import annotations

import errno
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from deploy.targets.fake_tensorrt import FakePlugin, Script, fake_tensorrt
from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.spec.backends import TENSORRT, TENSORRT_RTX
from mmi_deploy.spec.graphs import Limits, graphs
from mmi_deploy.spec.presets import tiny
from mmi_deploy.system.progress import Cancelled, silent
from mmi_deploy.targets.profiles import profiles
from mmi_deploy.targets.tensorrt_build import (
    BuildResult,
    Job,
    Plugin,
    build_engine,
    check_architecture,
    check_version,
    open_tensorrt,
    rtx_architectures,
)
from mmi_deploy.targets.tensorrt_process import build_in_process

LLM = graphs(tiny(), Limits(context=64))["llm"]


def accept(network: Any, model: onnx.ModelProto) -> None:
    """Plugin check that passes."""


def plugin_of(registered: FakePlugin, check: Any = accept) -> Plugin:
    return Plugin("fake", True, lambda name: None, lambda trt: registered, lambda m: m, check)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    source = tmp_path / "llm.onnx"
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1])
    node = helper.make_node("Identity", ["x"], ["y"])
    onnx.save(helper.make_model(helper.make_graph([node], "llm", [value], [output])), source)
    engine = tmp_path / "llm.engine"
    plugin = plugin_of(FakePlugin())
    return Job("llm", TENSORRT_RTX, "sm89", source, engine, profiles(LLM), plugin)


def run(script: Script, job: Job, **changes: Any) -> BuildResult:

    return build_engine(fake_tensorrt(script), replace(job, **changes), silent)


def test_an_engine_is_written_as_it_comes(job: Job) -> None:
    script = Script()
    built = run(script, job)
    assert job.engine.read_bytes() == b"engine"
    assert built == BuildResult(
        layers={"CAST": 2, "PLUGIN_V3": 1},
        bindings={"x": "half", "y": "half"},
        engine_bytes=6,
        tensorrt="1.7.1",
    )
    assert script.seen["parsed"] == str(job.source), "weights are mapped from beside the file"


def test_the_network_is_strongly_typed_and_both_profiles_are_given(job: Job) -> None:
    script = Script()
    run(script, job)
    config = script.seen["config"]
    assert script.seen["flags"] == 1 << 1 and script.seen["cleared"] == "TF32"
    assert script.seen["flag"] == "REQUIRE_USER_ALLOCATION", "or no CUDA graph can hold it"
    assert config.capabilities == ["89"] and config.num_compute_capabilities == 1
    tokens = [profile["token_ids"] for profile in config.profiles]
    assert tokens == [((1, 1), (1, 64), (8, 64)), ((1, 1), (1, 1), (8, 1))]


def test_a_parsers_errors_name_the_node(job: Job) -> None:
    errors = [("/up/resize", "Resize", "antialias is\n not supported"), *[("n", "Op", "no")] * 3]
    line = (
        r"cannot parse llm for sm89: node /up/resize \(Resize\): antialias is not supported "
        r"\| node n \(Op\): no \| node n \(Op\): no \(and 1 more\)"
    )
    with pytest.raises(EngineError, match=line):
        run(Script(parse_errors=errors), job)
    assert not job.engine.exists()


def test_the_plugins_own_words_are_added(job: Job) -> None:
    plugin = plugin_of(FakePlugin("unsupported head size; got 36"))
    with pytest.raises(EngineError, match="no reason given|n .*unsupported head size; got 36"):
        run(Script(parse_errors=[("n", "Op", "failed")]), job, plugin=plugin)


@pytest.mark.parametrize("severity", ["INFO", "WARNING", "ERROR"])
def test_an_input_that_the_parser_drops_is_an_error(job: Job, severity: str) -> None:
    lines = [(severity, "node attn: Unused Input: nonpad_kv_seqlen")]
    with pytest.raises(EngineError, match="dropped an input of llm: .*nonpad_kv_seqlen"):
        run(Script(parse_lines=lines), job)


def test_a_graph_whose_function_was_taken_is_not_built(job: Job) -> None:
    def refuse(network: Any, model: onnx.ModelProto) -> None:
        raise EngineError("the plugin was not taken")

    registered = FakePlugin()
    with pytest.raises(EngineError, match="the plugin was not taken"):
        run(Script(), job, plugin=plugin_of(registered, refuse))
    assert not registered.registered, "the next build registers its own"
    assert not job.engine.exists()


def test_a_graph_that_the_parser_samples_otherwise_is_not_built(job: Job) -> None:
    script = Script(layers=("PLUGIN_V3", "GRID_SAMPLE"))
    with pytest.raises(EngineError, match="TensorRT misreads GridSample; .*got 1 NEAREST FILL"):
        run(script, job)
    assert not job.engine.exists()


def test_what_the_builder_logs_is_what_is_said(job: Job) -> None:
    with pytest.raises(EngineError, match="cannot build llm for sm89: fp8 is not .* on SM80"):
        run(Script(build_errors=["fp8 is not  supported on SM80"] * 2), job)


def test_a_full_disk_is_told_as_such(job: Job) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(OSError) as caught:
        run(Script(pieces=[b"x" * 10**6] * 3), job, engine=full)
    assert caught.value.errno == errno.ENOSPC


def test_progress_that_says_stop_ends_the_build(job: Job) -> None:
    calls: list[tuple[str, int, int]] = []

    def stop(what: str, done: int = 0, total: int = 0, **_: str) -> None:
        calls.append((what, done, total))
        if done == 1:
            raise Cancelled

    with pytest.raises(EngineError, match="cannot build llm"):
        build_engine(fake_tensorrt(Script()), job, stop)
    assert calls == [("Building", 0, 2), ("Building", 1, 2)]


@pytest.mark.parametrize(
    ("runtime", "version", "old"),
    [
        (TENSORRT, "10.15.1", False),
        (TENSORRT, "10.15.0.3", True),
        (TENSORRT, "10.3.0", True),
        (TENSORRT, "11.0.0.114", False),
        (TENSORRT_RTX, "1.7.1.116", False),
        (TENSORRT_RTX, "1.6.2", True),
    ],
)
def test_versions(runtime: str, version: str, old: bool) -> None:
    if not old:
        check_version(runtime, version)
        return
    with pytest.raises(EngineError, match=rf"too old.*got {version}. pip install --upgrade"):
        check_version(runtime, version)


def test_an_architecture_that_rtx_does_not_know_is_refused_with_those_it_does() -> None:
    trt = fake_tensorrt(Script())
    assert rtx_architectures(trt) == ["sm80", "sm86", "sm89", "sm120"]
    with pytest.raises(ConfigError, match=r"sm90 \(H100, H200\); expected sm80, sm86, sm89, sm120"):
        check_architecture(trt, TENSORRT_RTX, "sm90")


@pytest.mark.parametrize(("here", "fix"), [("sm90", "give --arch sm90"), (None, "tensorrt-rtx")])
def test_tensorrt_builds_for_the_card_in_the_machine_alone(
    monkeypatch: pytest.MonkeyPatch, here: str | None, fix: str
) -> None:
    monkeypatch.setattr(
        "mmi_deploy.targets.tensorrt_build.device_architecture", lambda device: here
    )
    trt = fake_tensorrt(Script())
    with pytest.raises(ConfigError, match=rf"on the GPU that runs them.*got sm89.*{fix}"):
        check_architecture(trt, TENSORRT, "sm89")
    if here:
        check_architecture(trt, TENSORRT, here)


# --- the process ---------------------------------------------------------------------------------
# Module-level functions, since the process imports what it is given.


def _scripted(name: str) -> Any:
    return fake_tensorrt(Script())


def _aborting(name: str) -> Any:
    import os

    os.abort()


def _killed(name: str) -> Any:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def _missing(name: str) -> Any:
    raise EngineError("tensorrt_rtx cannot be imported", fix="pip install tensorrt-rtx-cu13")


def _faulty(name: str) -> Any:
    raise KeyError("a bug in mmi")


def _register(trt: Any) -> FakePlugin:
    return FakePlugin()


def _same(model: onnx.ModelProto) -> onnx.ModelProto:
    return model


def process_job(job: Job, importer: Any) -> Job:

    return replace(job, plugin=Plugin("fake", True, importer, _register, _same, accept))


def test_an_engine_is_built_in_a_process_of_its_own(job: Job) -> None:
    measured = build_in_process(process_job(job, _scripted), silent)
    assert job.engine.read_bytes() == b"engine"
    assert measured.built.layers["CAST"] == 2 and measured.seconds > 0
    assert measured.memory.peak >= measured.memory.before > 0
    assert "deploy.targets.fake_tensorrt" in sys.modules


@pytest.mark.parametrize(
    ("importer", "error", "line"),
    [
        (_killed, EngineError, "build of llm for sm89 was killed.*memory.*--dry-run"),
        (_aborting, EngineError, "TensorRT stopped the process .signal SIGABRT"),
        (_missing, EngineError, "cannot be imported. pip install"),
        (_faulty, RuntimeError, "KeyError: 'a bug in mmi'"),
    ],
)
def test_whatever_ends_the_process_is_one_line(
    job: Job, importer: Any, error: type[Exception], line: str
) -> None:
    with pytest.raises(error, match=line):
        build_in_process(process_job(job, importer), silent)


def test_open_tensorrt_checks_version_and_architecture(job: Job) -> None:
    plugin = process_job(job, _scripted).plugin
    assert open_tensorrt(plugin, TENSORRT_RTX, "sm89").__version__ == "1.7.1"
    with pytest.raises(ConfigError, match="does not build for sm100"):
        open_tensorrt(plugin, TENSORRT_RTX, "sm100")


# --- kernels of the engine -----------------------------------------------------------------------

LAYERS = (
    "Layers:\nName: k_myl0_0, LayerType: kgen, Inputs: [], Constants: [], Outputs: [], "
    "TacticName: , StreamId: 0, Metadata: \nName: k [profile 1]_myl1_0, LayerType: gemm, "
    "Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: "
)


def test_the_builder_is_asked_for_its_kernels_and_they_are_read(job: Job) -> None:
    script = Script(parse_lines=[("VERBOSE", LAYERS)])
    built = run(script, job)
    assert script.seen["config"].profiling_verbosity == "DETAILED"
    assert [(plan.profile, len(plan.kernels)) for plan in built.plans] == [
        ("prefill", 1),
        ("decode", 1),
    ]
    assert built.warnings == () and "inspected" not in script.seen


def test_tensorrt_on_a_gpu_is_asked_for_the_kernels_that_its_log_lacks(job: Job) -> None:
    kernel = {"Name": "k_myl0_0", "LayerType": "kgen", "Inputs": [], "Outputs": []}
    script = Script(inspected=json.dumps({"Layers": [kernel]}))
    (plan,) = run(script, job, runtime=TENSORRT).plans
    assert plan.profile == "prefill" and plan.kernels[0].name == "k"
    assert script.seen["inspected"] == b"engine"
    assert run(Script(), job, runtime=TENSORRT).plans == (), "it cannot be loaded"
    assert run(Script(), job).plans == (), "RTX cannot load it without a GPU"
