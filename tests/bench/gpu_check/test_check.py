"""`make gpu-check` on a fake GPU: every step is tried, what is wrong is found, and the report tells
it all. And on this machine, as it is: a line for each step."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from deploy.runtime.tensorrt.fake_cuda import FakeCuda
from deploy.runtime.tensorrt.fake_tensorrt import FakeTensorRt
from deploy.runtime.tensorrt.gpu_targets import PLUGIN, add_target
from deploy.runtime.tensorrt.test_backend import copy_of
from mmi_bench.gpu_check.check import NO_ENGINES, Check, Machine, Step, build_engines, shortened
from mmi_bench.gpu_check.check import run as run_program
from mmi_bench.gpu_check.hypotheses import HYPOTHESES, judge
from mmi_bench.gpu_check.kernel import GpuKernel
from mmi_bench.gpu_check.report import write_report
from mmi_bench.machine import describe
from mmi_deploy.bundle.build_report import GraphReport, TargetReport
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.bundle.kernel_plan import Kernel, ProfilePlan
from mmi_deploy.bundle.manifest import sha256_of
from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.device_memory import Cuda, DeviceMemory
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.backends import TENSORRT
from mmi_deploy.spec.target import Target
from mmi_plugins.compile import nvrtc
from mmi_plugins.compile.launch_plan import launch_plan
from mmi_plugins.conformance.calls import draw
from mmi_plugins.reference import all_rows, mmfs_reference

if TYPE_CHECKING:
    from exports import Exported

ACTIVATIONS = {"fp32": "float32", "fp16": "float16"}


class ReferenceKernel:
    """In the place of the kernel on the GPU: the definition, or something a little off."""

    name, most_rows = "reference", None

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def missing(self) -> None:
        return None

    def run(self, call: Any, rows: np.ndarray) -> np.ndarray:
        return self.factor * mmfs_reference(call, rows)


@pytest.fixture
def bundle(exported_once: Callable[[str], Exported], tmp_path: Path) -> Bundle:
    return copy_of(exported_once("paper").bundle, tmp_path / "bundle")


def with_gpu(tmp_path: Path, **changes: Any) -> Machine:
    """A machine where everything is there; `engines` replace parts of the engine files."""
    library, cuda = tmp_path / "plugin.so", FakeCuda()
    library.write_bytes(PLUGIN)
    engines = changes.pop("engines", {})

    def build(
        folder: Path,
        target: Target,
        plugin: Path | None,
        *,
        rows: int,
        graphs: Sequence[str] = (),
    ) -> None:
        assert rows == (1 if graphs else 2)
        assert plugin is not None and target.architecture == "sm89"
        recipe = {"plugin": f"{plugin.name}:{sha256_of(plugin)[:16]}"}
        activations = ACTIVATIONS[target.precision]
        bundle = Bundle.open(folder)
        add_target(
            bundle,
            activations,
            onnx=True,
            recipe=recipe,
            engines=engines,
            leave_out=set(bundle.graphs) - set(graphs) if graphs else (),
        )

    defaults: dict[str, Any] = {
        "cuda": cuda,
        "tensorrt": FakeTensorRt(cuda),
        "build": build,
        "build_plugin": lambda sm: library,
        "kernel": lambda memory: ReferenceKernel(),
    }
    return Machine(**defaults | changes)


def run(bundle: Bundle, machine: Machine, *precisions: str) -> tuple[int, dict[str, Step]]:
    check = Check(bundle.folder, TENSORRT, precisions, machine, lambda step: None, 1, 6)
    return check.run(), {step.name: step for step in check.steps}


@pytest.mark.slow
def test_everything_passes_where_everything_is_right(bundle: Bundle, tmp_path: Path) -> None:
    code, steps = run(bundle, with_gpu(tmp_path), "fp32", "fp16")
    assert code == 0, [step for step in steps.values() if step.state != "passed"]
    assert list(steps) == [
        "machine", "plugin", "kernel",
        *(f"{step} {p}" for p in ACTIVATIONS for step in ("build", "load", "compare", "document",
                                                          "measure")),
    ]  # fmt: skip
    assert steps["machine"].line == "Fake GPU, sm89, 17 GB"
    compared = steps["compare fp16"].detail["cases"]
    assert compared.keys() == set(bundle.graphs)
    for graph, cases in compared.items():
        if "m" in bundle.graphs[graph].ranges:
            assert {case["sizes"]["b"] for case in cases} >= {1, 2}
            assert len({case["sizes"]["m"] for case in cases}) > 1
    assert steps["document fp32"].detail["text_equal"] is True
    assert max(steps["document fp32"].detail["pixel_differences"]) == 0
    timings = steps["measure fp16"].detail
    assert timings["cuda graphs"]["launches"]["denoise_step"] > 0
    assert not any(timings["without"]["launches"].values())
    for name in ("per token", "per step", "first token", "first picture", "stage vae"):
        assert 0 < timings["without"][name]["low"] <= timings["without"][name]["high"]

    md, js = write_report(tmp_path, describe(), bundle.folder, TENSORRT, list(steps.values()))
    text = md.read_text()
    assert "| compare fp16 | passed |" in text and "## Milliseconds, measure fp32" in text
    assert ", llm " in text.partition("Launched from recordings: ")[2] and "KV cache" in text
    assert len(json.loads(js.read_text())["steps"]) == len(steps)
    # What was compared on the GPU is proved now: it runs without --unproved.
    proved = Bundle.open(bundle.folder).target("tensorrt-sm89-fp16")
    assert "on the GPU itself" in proved.receipts[0].compared_with


def test_wrong_engines_and_kernels_are_found(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another graph's weights in one engine, and a kernel that is one in a hundred off: the rest is
    tried all the same, and what is wrong gets a receipt that says so."""
    other = tmp_path / "other.onnx"
    spoil(bundle, other)
    machine = with_gpu(
        tmp_path,
        engines={"vae_decoder": {"onnx": other}},
        kernel=lambda memory: ReferenceKernel(1.01),
    )
    searched: list[tuple[Target, list[str], Path]] = []

    def find(bundle: Bundle, target: Target, proofs: Any, folder: Path, _: Any) -> list[str]:
        wrong = [proof.graph for proof in proofs if not proof.passed]
        searched.append((target, wrong, folder))
        return ["vae_decoder: the first of 99 tensors"]

    monkeypatch.setattr("mmi_bench.gpu_check.check.find_first_wrong_tensors", find)
    report = tmp_path / "report"
    check = Check(bundle.folder, TENSORRT, ["fp32"], machine, lambda step: None, 1, 6)
    check.folder = report
    code, steps = check.run(), {step.name: step for step in check.steps}
    assert code == 1
    assert searched == [(Target(TENSORRT, "sm89", "fp32"), ["vae_decoder"], report)]
    assert "; vae_decoder: the first of 99 tensors" in steps["compare fp32"].line
    assert steps["kernel"].state == "FAILED" and "wrong in" in steps["kernel"].line
    assert steps["compare fp32"].state == "FAILED"
    assert "too far from ONNX Runtime: vae_decoder;" in steps["compare fp32"].line
    assert steps["document fp32"].state == "FAILED" and "255" in steps["document fp32"].line
    assert steps["measure fp32"].state == "passed"
    with pytest.raises(Exception, match="vae_decoder .* too large an error"):
        Runtime.open(bundle.folder, target="tensorrt-sm89-fp32", kernels="none")


def spoil(bundle: Bundle, out: Path) -> None:
    """The VAE's decoder with its pixels upside down."""
    import onnx

    model = onnx.load(bundle.graph_file("vae_decoder"))
    (output,) = (o.name for o in model.graph.output)
    for node in model.graph.node:
        node.output[:] = ["upright" if name == output else name for name in node.output]
    one = onnx.helper.make_tensor("one", onnx.TensorProto.FLOAT, [], [1.0])
    model.graph.initializer.append(one)
    model.graph.node.append(onnx.helper.make_node("Sub", ["one", "upright"], [output]))
    onnx.save(model, out)


def test_a_step_that_breaks_does_not_stop_the_others(bundle: Bundle, tmp_path: Path) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise EngineError("TensorRT cannot parse llm for sm89: node 7")

    def crash(memory: Any) -> Any:
        raise ZeroDivisionError("of\nall things")

    code, steps = run(bundle, with_gpu(tmp_path, build=broken, kernel=crash), "fp32")
    assert code == 1
    assert steps["build fp32"].line == "TensorRT cannot parse llm for sm89: node 7"
    assert steps["kernel"].line == "unexpected ZeroDivisionError: of all things"
    assert "Traceback" in steps["kernel"].detail["traceback"]
    assert steps["load fp32"].state == "not run"
    assert steps["measure fp32"].line.startswith("no engines were loaded: there are no engines for")


def test_without_a_gpu_each_step_says_what_is_missing(bundle: Bundle, tmp_path: Path) -> None:
    code, steps = run(bundle, with_gpu(tmp_path, cuda=FakeCuda(devices=0)), "fp16")
    assert code == 2 and {step.state for step in steps.values()} == {"not run"}
    assert all("no usable NVIDIA GPU" in step.line for step in steps.values())


def test_the_program_on_this_machine(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On any machine: a line for each step, a report, and an exit code that fits them."""
    if Path("/dev/nvidia0").exists():
        pytest.skip("there is a GPU here: run `make gpu-check`")
    arguments = [str(bundle.folder), "-o", str(tmp_path / "out"), "--precision", "fp16"]
    code = run_program(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert code == 2 and len(lines) == 14, lines
    assert all(line.startswith("not run") for line in lines[:-1])
    assert (tmp_path / "out" / "report.md").is_file() and lines[-1].startswith("report: ")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--target", "cpu"], "mmi: 'cpu' runs no engines; expected tensorrt or tensorrt-rtx"),
        (["--precision", "fp17"], "mmi: there is no precision 'fp17'; expected fp32"),
        (["--repeats", "0"], "mmi: Invalid value for '--repeats'"),
        ([], "mmi: there is no bundle none"),
    ],
)
def test_what_no_machine_could_run_is_refused_at_once(
    options: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program(["none", *options]) == 2
    captured = capsys.readouterr()
    assert (
        captured.err.startswith(line) and len(captured.err.splitlines()) == 1 and not captured.out
    )


@pytest.mark.parametrize("library", [True, False], ids=["library", "ahead of time"])
def test_what_the_builder_refuses_is_told_in_its_words(tmp_path: Path, library: bool) -> None:
    plugin = tmp_path / "plugin.so"
    plugin.write_bytes(PLUGIN)
    with pytest.raises(EngineError, match="^there is no bundle .*none. make one with `mmi export`"):
        target = Target(TENSORRT, "sm89", "fp16")
        build_engines(tmp_path / "none", target, plugin if library else None)


@pytest.mark.skipif(nvrtc.missing() is not None, reason=nvrtc.missing() or "")
@pytest.mark.parametrize("parts", [None, 0, 1, 3])
def test_kernels_are_launched_as_planned(parts: int | None) -> None:
    """CUDA's driver is given the machine code, the grid and the parameter of the launch plan, at
    addresses where the call's arrays lie."""
    call = draw(np.random.default_rng(3), dtype="float16", d=32)
    memory, launches = DeviceMemory(Cuda(FakeCuda())), []

    def launch(function: bytes, *arguments: int) -> tuple[int]:
        grid, block, (shared, stream, parameters, extra) = (
            arguments[:3], arguments[3:6], arguments[6:],
        )  # fmt: skip
        address = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))[0]
        launches.append((function, grid, block, address and ctypes.string_at(address, 200)))
        assert (shared, stream, extra) == (0, memory.stream, 0)
        return (0,)

    driver = SimpleNamespace(
        CUresult=SimpleNamespace(CUDA_SUCCESS=0),
        cuModuleLoadData=lambda image: (0, ctypes.string_at(image, 4)),
        cuModuleGetFunction=lambda module, name: (0, module + name),
        cuLaunchKernel=launch,
    )
    kernel = GpuKernel(memory, driver, parts)
    rows = all_rows(call)
    assert np.isnan(kernel.run(call, rows)).all()  # nothing wrote the output
    addresses = dict.fromkeys(("workspace",), 0)
    planned = launch_plan(call, {name: 0 for name in (*call.inputs, "output", *addresses)}, parts)
    assert [name for name, *_ in launches] == [
        b"\x7fELF" + plan.variant.name.encode() for plan in planned
    ]
    assert [(grid, block) for _, grid, block, _ in launches] == [
        (plan.grid, plan.block) for plan in planned
    ]
    for (*_, given), plan in zip(launches, planned, strict=True):
        assert given[88:168] == plan.parameter[88:168]  # the integers and floats after 11 addresses
        assert all(np.frombuffer(given[:80], np.uint64) % 256 == 0)


@pytest.mark.parametrize("name", ["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel"])
def test_the_drivers_calls_are_real(name: str) -> None:
    import inspect

    driver = pytest.importorskip("cuda.bindings.driver", reason="pip install cuda-bindings")
    count = {"cuModuleLoadData": 1, "cuModuleGetFunction": 2, "cuLaunchKernel": 11}[name]
    inspect.signature(getattr(driver, name)).bind(*range(count))
    assert driver.CUresult.CUDA_SUCCESS == 0 and driver.CUresult.CUDA_SUCCESS.name


def test_a_cause_is_said_once_and_then_by_its_step() -> None:
    """In whatever order causes come; what failed or passed is always said whole."""
    causes: dict[str, str] = {}
    steps = [
        Step("machine", "not run", "no GPU", 0.0),
        Step("plugin", "not run", "no headers; no GPU", 0.0),
        Step("kernel", "not run", "no GPU", 0.0),
        Step("build", "not run", "no GPU; no TensorRT", 0.0),
        Step("load", "not run", "no GPU; no TensorRT", 0.0),
        Step("compare", "not run", f"{NO_ENGINES}no GPU; no TensorRT", 0.0),
        Step("other", "FAILED", "no GPU", 0.0),
    ]
    assert [shortened(step, causes) for step in steps] == [
        "no GPU",
        "no headers; as for machine",
        "as for machine",
        "no TensorRT; as for machine",
        "as for machine and build",
        "as for machine and build",
        "no GPU",
    ]
    assert steps[2].line == "no GPU"  # whole in the report


def test_a_step_is_not_begun_that_would_end_too_late(bundle: Bundle, tmp_path: Path) -> None:
    """Seconds pass only where this clock is read: 100 at each step."""
    moments = iter(range(0, 10**6, 100))
    check = Check(
        bundle.folder, TENSORRT, ("fp32",), with_gpu(tmp_path), lambda step: None, 1, 6,
        minutes=5, clock=lambda: next(moments),
    )  # fmt: skip
    assert check.run() == 2
    states = {step.name: step.state for step in check.steps}
    assert states["machine"] == states["plugin"] == "passed" and states["build fp32"] == "not run"
    assert "0 s are left of 5 minutes, and it takes about 150 s" in check.steps[3].line


def test_a_refused_recording_is_a_failure_with_its_numbers(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recordings = Runtime.recordings

    def refused(runtime: Runtime) -> dict[str, Any]:
        found = recordings(runtime)
        return found | {"refusals": {"denoise_step": "operation not permitted"}}

    monkeypatch.setattr(Runtime, "recordings", refused)
    code, steps = run(bundle, with_gpu(tmp_path), "fp32")
    failed = steps["measure fp32"]
    assert code == 1 and failed.state == "FAILED"
    assert "could not be recorded as CUDA graphs: denoise_step: operation" in failed.line
    assert failed.detail["sampled"]["median"] > 0 and "default sampler adds" in failed.line
    md, _ = write_report(tmp_path, describe(), bundle.folder, TENSORRT, list(steps.values()))
    text = md.read_text()
    numbered = [line for line in text.splitlines() if line[:1].isdigit() and "**" in line]
    assert [line.partition(".")[0] for line in numbered] == [
        str(number) for number in range(1, len(HYPOTHESES) + 1)
    ]
    assert "5. A run whose addresses have just changed cannot be recorded. **confirmed**" in text
    assert "6. fp32 engines differ from a CPU by more than 1e-5. **refuted**" in text
    assert "7. int8 and fp8 are slower" in text and "**not tried**" in text


def test_a_gpus_name_finds_its_data_sheet() -> None:
    from mmi_bench.gpu_check.target import data_sheet

    for name, gigabytes, sheet in (
        ("NVIDIA A100-SXM4-80GB", 85, "a100-80"),
        ("NVIDIA A100-SXM4-40GB", 42, "a100-40"),
        ("NVIDIA H200", 150, "h200"),
        ("NVIDIA L4", 24, "l4"),
        ("NVIDIA L40S", 48, "l40s"),
        ("NVIDIA GeForce RTX 4090", 25, "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16, None),
        ("NVIDIA H100 PCIe", 85, None),
        ("Fake GPU", 17, None),
    ):
        found = data_sheet(name, gigabytes * 10**9)
        assert (found and found.name) == sheet, name


def test_hypotheses_are_judged_by_what_was_measured() -> None:
    def numbers(token: float, decode: float) -> dict[str, Any]:
        times = {"per token": {"median": token}, "stage decode": {"median": decode}}
        return {**times, "launches": {}, "refusals": {}}

    measured = {
        "fp16": {"cuda graphs": numbers(0.010, 0.0095), "without": numbers(0.02, 0.01),
                 "sampled": {"median": 0.02}},
        "int8": {"cuda graphs": numbers(0.025, 0.0245), "without": numbers(0.03, 0.01),
                 "sampled": {"median": 0.026}},
    }  # fmt: skip
    steps = [
        Step("plugin", "passed", "compiled ahead of time into the engines", 1.0),
        Step("compare fp32", "passed", "", 1.0, {"cases": {"llm": [{"error": 2e-5}]}}),
        *(Step(f"measure {name}", "passed", "", 1.0, detail) for name, detail in measured.items()),
    ]
    answers = {verdict.number: verdict.answer for verdict in judge(steps)}
    assert {n for n, answer in answers.items() if answer == "confirmed"} == {1, 6, 7, 8, 10}
    assert {n for n, answer in answers.items() if answer == "refuted"} == {5, 9}
    assert {verdict.answer for verdict in judge([])} == {"not tried"}


def test_the_slice_is_built_compared_and_timed(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the width of the small model here: only the graphs that are asked for, for one row."""
    import mmi_bench.gpu_check.check as module

    monkeypatch.setattr(module, "GRAPHS", {"fp16": ("llm", "vae_decoder")})
    machine = with_gpu(tmp_path, export_slice=lambda folder: copy_of(bundle, folder))
    check = Check(bundle.folder, TENSORRT, (), machine, lambda step: None, 1, 6, with_slice=True)
    assert check.run() == 0, check.steps
    names = [step.name for step in check.steps]
    assert names[3:] == ["slice", "build slice fp16", "compare slice fp16"]
    found = check.steps[-1].detail
    assert found["cases"].keys() == {"llm", "vae_decoder"}
    assert found["decode_seconds"] > 0 and found["workspace_bytes"] == 1 << 14
    answers = {verdict.claim: verdict.answer for verdict in judge(check.steps)}
    assert answers["At one row the 13B engines need at most 0.6 GB of workspace."] == "confirmed"


def test_without_a_slice_its_steps_say_why(bundle: Bundle, tmp_path: Path) -> None:
    def export(folder: Path) -> None:
        raise EngineError("the disk is full")

    machine = with_gpu(tmp_path, export_slice=export)
    check = Check(bundle.folder, TENSORRT, (), machine, lambda step: None, 1, 6, with_slice=True)
    assert check.run() == 1
    lines = {step.name: (step.state, step.line) for step in check.steps}
    assert lines["slice"] == ("FAILED", "the disk is full")
    assert (
        lines["build slice int8"] == lines["compare slice fp16"] == ("not run", "the disk is full")
    )


def test_plans_of_the_built_engines_decide_hypotheses() -> None:
    """Kernels as TensorRT-RTX names them, in the reports of builds."""

    def step(precision: str, graph: str, **profiles: list[Kernel]) -> Step:
        plans = tuple(ProfilePlan(profile=p, kernels=tuple(k)) for p, k in profiles.items())
        report = GraphReport(graph=graph, layers={}, engine_bytes=1, weights_bytes=1, seconds=1,
                             plans=plans)  # fmt: skip
        whole = TargetReport(target="t", runtime=TENSORRT, version="1", architecture="sm90",
                             precision="fp16", graphs=(report,))  # fmt: skip
        return Step(f"build {precision}", "passed", "", 1.0, {"report": whole.model_dump()})

    tiny, thirteen = (
        Kernel(name="_gemm_mha_v2", kind="kgen"),
        Kernel(name="_gemv_mha_v1", kind="kgen"),
    )
    copy = Kernel(
        name="__myl_Resh", kind="kgen", inputs=("present_key.00:Half[1,40,2048,128]",),
        outputs=("o:Half[40,2048,128]",),
    )  # fmt: skip
    steps = [
        step("fp32", "denoise_step", default=[Kernel(name="gemm", kind="gemm")]),
        step("fp16", "llm", prefill=[tiny, copy], decode=[tiny]),
        step("slice fp16", "llm", prefill=[tiny], decode=[thirteen]),
        Step("compare slice fp16", "passed", "", 1.0,
             {"decode_seconds": 1e-4, "workspace_bytes": 7 * 10**8, "beside_bytes": 10**8}),
        Step("compare slice int8", "passed", "", 1.0, {"decode_seconds": 2e-4}),
    ]  # fmt: skip
    answers = {verdict.number: verdict.answer for verdict in judge(steps)}
    assert answers[3] == answers[15] == answers[7] == answers[12] == "confirmed"
    assert answers[13] == answers[17] == "refuted", "the slice's plan counts, not the tiny one's"
    assert answers[14] == answers[16] == "not tried"


def test_the_page_lists_every_hypothesis() -> None:
    page = (Path(__file__).parents[3] / "docs" / "gpu_check.md").read_text()
    rows = [line.split(" | ")[:2] for line in page.splitlines() if line[:3].strip("| ").isdigit()]
    listed = [(int(number.strip("| ")), claim) for number, claim in rows]
    assert listed == [(number, claim) for number, (claim, _) in enumerate(HYPOTHESES, 1)]
