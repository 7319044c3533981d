"""`make gpu-check`: run every check that takes a GPU, and write a report.

Each step is tried even if others failed, and reports its result or what is missing in one line.
Exit code 0: all passed. 1: a step failed. 2: a step could not be run here.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import typer
from rich.console import Console

from mmi_bench.gpu_check.first_wrong_tensor import engine_runner, find_first_wrong_tensors
from mmi_bench.gpu_check.hypotheses import SLICE
from mmi_bench.gpu_check.kernel import GpuKernel, import_driver
from mmi_bench.gpu_check.report import KIND, write_report
from mmi_bench.gpu_check.slice import (
    GRAPHS,
    HOST_BYTES,
    decode_inputs,
    export_slice,
    seconds_per_run,
    slice_samples,
)
from mmi_bench.gpu_check.target import (
    CheckFailed,
    Detail,
    OpenTarget,
    compare,
    document,
    measure,
)
from mmi_bench.machine import describe
from mmi_deploy.bundle.build_report import read_report
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.cli import program
from mmi_deploy.errors import ConfigError, EngineError, MmiError
from mmi_deploy.parity import Proof
from mmi_deploy.runtime.device_memory import Cuda, DeviceMemory, import_cuda
from mmi_deploy.runtime.tensorrt.backend import AHEAD_OF_TIME, TensorRtBackend
from mmi_deploy.runtime.tensorrt.module import import_tensorrt
from mmi_deploy.spec.backends import BACKENDS, TENSORRT
from mmi_deploy.spec.target import Target
from mmi_deploy.system.files import cache_folder, size
from mmi_deploy.system.memory import free_memory
from mmi_deploy.system.output_folder import new_folder
from mmi_deploy.targets.precision import recipe
from mmi_plugins.compile import nvrtc
from mmi_plugins.conformance.calls import draws
from mmi_plugins.conformance.check import Verdict, check
from mmi_plugins.operator import TOLERANCES
from mmi_plugins.reference import all_rows, mmfs_reference
from mmi_plugins.tensorrt.build_plugin import (
    build_tensorrt_plugin,
    find_cmake,
    find_nvcc,
    find_tensorrt_headers,
)
from mmi_plugins.tensorrt.plugin import plugin_for

# Rows of the tiny model's engines, so that batches are compared; the slice's have one, the default.
ROWS = 2

# Exit codes.
WRONG, NOT_RUN = 1, 2
PRECISIONS = ("fp32", "fp16")
# Separator of the causes of one step.
CAUSES = "; "

# Prefix of the line of a step that depends on engines which were not loaded.
NO_ENGINES = "no engines were loaded: "

# Minutes of a whole run: a GPU that is lent for a quarter of an hour.
MINUTES = 14.0

# Seconds that a step takes at most, as assumed; one is not begun with fewer left.
LEAST_SECONDS = {"plugin": 90, "kernel": 30, "build": 150, "load": 20, "compare": 60,
                 "document": 30, "measure": 60, SLICE: 120}  # fmt: skip

# Random calls of the kernel: six of each kind.
KERNEL_CASES = 48

State = Literal["passed", "FAILED", "not run"]


class Missing(Exception):
    """A step requires something that this machine lacks."""


@dataclass
class Step:
    """Result of one step. `line`: for people. `detail`: all numbers."""

    name: str
    state: State
    line: str
    seconds: float
    detail: dict[str, Any] = field(default_factory=dict)


class Builder(Protocol):
    """Build engines of a bundle for a target, with the plugin library if given: those of `graphs`,
    or all, for `rows` rows."""

    def __call__(
        self,
        bundle: Path,
        target: Target,
        plugin: Path | None,
        *,
        rows: int,
        graphs: Sequence[str] = (),
    ) -> None: ...


@dataclass
class Machine:
    """GPU, libraries and builders that steps use; tests pass fakes. None: the real one."""

    device: int = 0
    cuda: Any = None
    driver: Any = None
    tensorrt: Any = None
    build: Builder | None = None
    build_plugin: Callable[[str], Path] | None = None
    kernel: Callable[[DeviceMemory], Any] | None = None
    export_slice: Callable[[Path], None] | None = None
    _memory: DeviceMemory | None = None

    def memory(self) -> DeviceMemory:
        """Open the GPU; raises `Missing`."""
        if self._memory is None:
            try:
                self._memory = DeviceMemory(Cuda(self.cuda or import_cuda()), self.device)
            except EngineError as error:
                raise Missing(str(error)) from None
        return self._memory

    def module(self, runtime: str) -> Any:
        """Import TensorRT or TensorRT-RTX; raises `Missing`."""
        try:
            return self.tensorrt or import_tensorrt(BACKENDS[runtime].module)
        except EngineError as error:
            raise Missing(str(error)) from None


@dataclass
class Check:
    """One run of all steps on one bundle."""

    bundle: Path
    runtime: str
    precisions: Sequence[str]
    machine: Machine
    say: Callable[[Step], None]
    repeats: int = 5
    cases: int = KERNEL_CASES
    minutes: float = MINUTES
    folder: Path | None = None  # of the report; None: no part of a graph is left there
    with_slice: bool = False  # also check the slice of the 13B model
    clock: Callable[[], float] = time.monotonic
    steps: list[Step] = field(default_factory=list)
    plugin: Path | None = None
    started: float = 0.0

    def run(self) -> int:
        """Try every step; return the exit code."""
        self.started = self.clock()
        self._try("machine", self._machine)
        self._try("plugin", self._plugin)
        self._try("kernel", self._kernel)
        for precision in self.precisions:
            self._precision(precision)
        if self.with_slice:
            with tempfile.TemporaryDirectory(prefix="mmi-gpu-check-") as folder:
                self._slice(Path(folder) / SLICE)
        states = [step.state for step in self.steps]
        return WRONG if "FAILED" in states else NOT_RUN if "not run" in states else 0

    def _precision(self, precision: str) -> None:
        """Try the steps of one precision: build, load, compare, document, measure."""
        opened: list[OpenTarget] = []

        def with_engines(work: Callable[[OpenTarget], Detail]) -> Callable[[], Detail]:
            return lambda: work(self._opened(opened))

        self._try(f"build {precision}", partial(self._build, precision))
        self._try(f"load {precision}", partial(self._load, precision, opened))
        self._try(f"compare {precision}", with_engines(self._compare))
        self._try(f"document {precision}", with_engines(document))
        self._try(f"measure {precision}", with_engines(self._measure))
        if opened:
            opened[0].runtime.close()

    def _slice(self, folder: Path) -> None:
        """Try the steps of the slice: export, and for each precision build and compare."""
        self._try(SLICE, partial(self._export_slice, folder))
        for precision, names in GRAPHS.items():
            opened: list[OpenTarget] = []
            called = f"{SLICE} {precision}"
            self._try(f"build {called}", partial(self._build_slice, folder, precision, names))
            self._try(f"compare {called}", partial(self._compare_slice, folder, precision, opened))
            if opened:
                opened[0].runtime.close()

    def _export_slice(self, folder: Path) -> Detail:
        self._require(self._lacking(gpu=True, tensorrt=True))
        make = self.machine.export_slice
        if make is None and find_spec("torch") is None:
            raise Missing("the slice is exported by torch: pip install '.[export]'")
        if make is None and (free := free_memory()) < HOST_BYTES:
            raise Missing(
                f"{size(free)} of host memory are free, and it takes about {size(HOST_BYTES)}"
            )
        (make or export_slice)(folder)
        return f"exported {Bundle.open(folder, unproved=True).config.name}", {}

    def _build_slice(self, folder: Path, precision: str, graphs: Sequence[str]) -> Detail:
        self._require_slice(folder)
        return self._build(precision, folder, rows=1, graphs=graphs)

    def _require_slice(self, folder: Path) -> None:
        if not folder.is_dir():
            raise Missing(next(step.line for step in self.steps if step.name == SLICE))

    def _compare_slice(self, folder: Path, precision: str, opened: list[OpenTarget]) -> Detail:
        """Compare the slice's engines, and time a token of its language model."""
        self._require_slice(folder)
        free = self.machine.memory().gpu.memory()[0]
        open_target = self._open(Bundle.open(folder, unproved=True), precision)
        opened.append(open_target)
        backend, runtime = open_target.backend, open_target.runtime
        line, detail, proofs = compare(open_target, slice_samples(backend))
        seconds = seconds_per_run(runtime.engine("llm"), decode_inputs(backend))
        held = free - backend.memory.gpu.memory()[0]
        files = backend.manifest.files.values()
        detail |= {
            "decode_seconds": seconds,
            "workspace_bytes": backend.workspace.bound,
            "reserved_bytes": backend.workspace.size,
            "beside_bytes": held - sum(file.size for file in files) - backend.workspace.size,
        }
        line = f"{line}; {1000 * seconds:.3f} ms a token of one layer"
        if failed := [proof.graph for proof in proofs if not proof.passed]:
            words = f"too far from ONNX Runtime: {', '.join(failed)}"
            raise CheckFailed(f"{words}; {line}", detail)
        return line, detail

    def _try(self, name: str, work: Callable[[], Detail]) -> None:
        start = time.perf_counter()
        detail: dict[str, Any] = {}
        state: State = "passed"
        try:
            self._check_time(name)
            line, detail = work()
        except Missing as missing:
            state, line = "not run", str(missing)
        except CheckFailed as error:
            state, line, detail = "FAILED", str(error), error.detail
        except MmiError as error:
            state, line = "FAILED", str(error)
        except Exception as error:  # the other steps are tried all the same
            words = " ".join(str(error).split())
            state, line = "FAILED", f"unexpected {type(error).__name__}: {words}"
            detail = {"traceback": traceback.format_exc()}
        step = Step(name, state, line, round(time.perf_counter() - start, 3), detail)
        self.steps.append(step)
        self.say(step)

    def _seconds_left(self) -> float:
        return self.minutes * 60 - (self.clock() - self.started)

    def _check_time(self, name: str) -> None:
        """Raise `Missing` for a step that would end after the time limit."""
        left = self._seconds_left()
        if left < (least := LEAST_SECONDS.get(name.partition(" ")[0], 0)):
            raise Missing(
                f"no time: {max(left, 0):.0f} s are left of {self.minutes:g} minutes, and it takes "
                f"about {least} s (--minutes allows more)"
            )

    def _machine(self) -> Detail:
        memory = self.machine.memory()
        free, total = memory.gpu.memory()
        facts = {
            "gpu": memory.gpu.name,
            "architecture": memory.gpu.architecture,
            "memory_bytes": total,
            "free_bytes": free,
            "driver": _version(memory.cuda("cudaDriverGetVersion")),
            "cuda": _version(memory.cuda("cudaRuntimeGetVersion")),
        }
        return f"{facts['gpu']}, {facts['architecture']}, {total / 1e9:.0f} GB", facts

    def _plugin(self) -> Detail:
        folder = cache_folder() / "tensorrt"
        build = self.machine.build_plugin or (lambda sm: build_tensorrt_plugin(None, folder, (sm,)))
        lacking = self._lacking(gpu=True)
        try:
            if lacking and self.machine.build_plugin is None:
                find_tensorrt_headers()
                find_nvcc()
                find_cmake()
            self._require(lacking)
            self.plugin = build(self.machine.memory().gpu.architecture.removeprefix("sm"))
        except EngineError as error:
            if self.runtime != TENSORRT or find_spec("tensorrt") is None or lacking:
                raise Missing(CAUSES.join([*lacking, str(error)])) from None
            return f"compiled ahead of time into the engines; no library: {error}", {}
        return self.plugin.name, {"path": str(self.plugin)}

    def _lacking(self, *, gpu: bool = False, tensorrt: bool = False) -> list[str]:
        """Reasons why the requested ones of GPU and TensorRT cannot be used; empty if they can."""
        lines = []
        for wanted, find in (
            (gpu, self.machine.memory),
            (tensorrt, partial(self.machine.module, self.runtime)),
        ):
            try:
                if wanted:
                    find()
            except Missing as missing:
                lines.append(str(missing))
        return lines

    @staticmethod
    def _require(lacking: list[str]) -> None:
        if lacking:
            raise Missing(CAUSES.join(lacking))

    def _kernel(self) -> Detail:
        no_compiler = nvrtc.missing("nvrtc") if self.machine.kernel is None else None
        self._require([*self._lacking(gpu=True), *([no_compiler] if no_compiler else [])])
        make = self.machine.kernel or (
            lambda memory: GpuKernel(memory, self.machine.driver or import_driver())
        )
        implementation = make(self.machine.memory())
        verdicts: list[Verdict] = []
        worst: dict[str, float] = dict.fromkeys(TOLERANCES, 0.0)
        for name, call in draws(0, self.cases):
            expected = mmfs_reference(call, all_rows(call)).reshape(
                call.sizes["b"], call.sizes["q"], -1
            )
            verdicts.append(check(name, call, expected, implementation))
            worst[call.dtype] = max(worst[call.dtype], verdicts[-1].relative)
        wrong = [verdict for verdict in verdicts if verdict.wrong]
        detail = {"cases": len(verdicts), "greatest_relative_rms": worst}
        if wrong:
            raise EngineError(
                f"the kernel is wrong in {len(wrong)} of {len(verdicts)} cases",
                got=f"{wrong[0].reason} in {wrong[0].case!r}",
            )
        errors = ", ".join(f"{dtype} {error:.1e}" for dtype, error in worst.items())
        return f"{len(verdicts)} cases against float64; greatest relative rms: {errors}", detail

    def _target(self, precision: str) -> Target:
        return Target(self.runtime, self.machine.memory().gpu.architecture, precision)

    def _build(
        self,
        precision: str,
        folder: Path | None = None,
        *,
        rows: int = ROWS,
        graphs: Sequence[str] = (),
    ) -> Detail:
        folder = folder or self.bundle
        self._require(self._lacking(gpu=True, tensorrt=True))
        if self.plugin is None and self.runtime != TENSORRT:
            raise Missing(f"{self.runtime} requires the compiled plugin, which was not built")
        target = self._target(precision)
        build = self.machine.build or partial(build_engines, device=self.machine.device)
        rows = min(rows, Bundle.open(folder, unproved=True).limits.batch)
        build(folder, target, self.plugin, rows=rows, graphs=graphs)
        bundle = Bundle.open(folder, unproved=True)
        manifest = bundle.target(target.name)
        written = sum(entry.size for entry in manifest.files.values())
        report = read_report(bundle.target_folder(target.name))
        detail = {"report": report.model_dump()} if report else {}
        return f"{target.name}: {len(manifest.graphs)} engines, {written / 1e6:.1f} MB", detail

    def _load(self, precision: str, opened: list[OpenTarget]) -> Detail:
        open_target = self._open(Bundle.open(self.bundle, unproved=True), precision)
        opened.append(open_target)
        open_target.runtime.load()
        plan = open_target.backend.plan()
        detail = {"plan": {**asdict(plan), "total": plan.total}, "lines": plan.lines()}
        return f"{plan.total / 1e6:.1f} MB of GPU memory", detail

    def _open(self, bundle: Bundle, precision: str) -> OpenTarget:
        self._require(self._lacking(gpu=True, tensorrt=True))
        name = self._target(precision).name
        if name not in bundle.targets:
            raise Missing(f"there are no engines for {name}")
        module = self.machine.module(self.runtime)

        def target(record: bool) -> TensorRtBackend:
            return TensorRtBackend.open(
                bundle,
                name,
                library=self.plugin,
                device=self.machine.device,
                record=record,
                cuda=self.machine.cuda,
                tensorrt=module,
            )

        return OpenTarget.open(bundle, precision, target)

    def _opened(self, opened: list[OpenTarget]) -> OpenTarget:
        if not opened:
            loading = next(step for step in reversed(self.steps) if step.name.startswith("load"))
            raise Missing(f"{NO_ENGINES}{loading.line}")
        return opened[0]

    def _compare(self, open_target: OpenTarget) -> Detail:
        line, detail, proofs = compare(open_target)
        if failed := [proof.graph for proof in proofs if not proof.passed]:
            found = self._first_wrong(open_target, proofs)
            words = [f"too far from ONNX Runtime: {', '.join(failed)}", line, *found]
            raise CheckFailed(CAUSES.join(words), {**detail, "first_wrong": found})
        return line, detail

    def _first_wrong(self, open_target: OpenTarget, proofs: Sequence[Proof]) -> list[str]:
        """Lines about the first wrong tensor of each graph that failed, if there is time."""
        if self.folder is None or self._seconds_left() < LEAST_SECONDS["build"]:
            return []
        target, backend = self._target(open_target.precision), open_target.backend
        choice = AHEAD_OF_TIME if self.plugin is None else str(self.plugin)
        try:
            plugin = plugin_for(target.runtime, str(target.architecture), choice)
            return find_first_wrong_tensors(
                Bundle.open(self.bundle, unproved=True),
                target,
                proofs,
                self.folder,
                lambda graph: engine_runner(graph, target, backend, plugin),
            )
        except MmiError as error:
            return [f"the first wrong tensor was not found: {error}"]

    def _measure(self, open_target: OpenTarget) -> Detail:
        return measure(open_target, self.repeats)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def build_engines(
    bundle: Path,
    target: Target,
    plugin: Path | None,
    device: int = 0,
    *,
    rows: int = 1,
    graphs: Sequence[str] = (),
) -> None:
    """Run `mmi build` in its own process, so that the builder's state does not affect the engines.

    Without a library the plugin is compiled into TensorRT's engines ahead of time. Raises
    `EngineError` with the last line of a build that failed."""
    code = "from mmi_deploy.cli.app import main; main()"
    words = ["build", str(bundle), "--target", target.runtime, "--precision", target.precision]
    words += ["--arch", str(target.architecture), "--plugin", str(plugin or AHEAD_OF_TIME)]
    words += ["--device", str(device), "--rows", str(rows)]
    for graph in graphs:
        words += ["--graph", graph]
    if graphs:  # of the slice, which takes too much memory to be calibrated
        words.append("--unproved")
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise EngineError(
            said[-1].removeprefix("mmi: ") if said else "mmi build failed without a message"
        )


def check_arguments(bundle: Path, runtime: str, precisions: Sequence[str]) -> None:
    """Raise `MmiError` for arguments that are wrong on every machine."""
    tested = [row.name for row in BACKENDS.values() if row.plugin]
    if runtime not in tested:
        raise ConfigError(f"{runtime!r} runs no engines", expected=" or ".join(tested))
    for precision in precisions:
        recipe(precision)
    Bundle.open(bundle, unproved=True)


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle that `mmi export` wrote.")] = Path(
        "bundles/tiny"
    ),
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for report.md and report.json.")
    ] = Path("gpu_check"),
    target: Annotated[str, typer.Option(help="Backend: tensorrt or tensorrt-rtx.")] = TENSORRT,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="Recipe of `mmi build`; several may be given.", show_default="both"),
    ] = None,
    device: Annotated[int, typer.Option(min=0, help="Index of the GPU.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Number of measured documents.")] = 5,
    minutes: Annotated[
        float, typer.Option(min=0, help="Begin no step that would end later.")
    ] = MINUTES,
    with_slice: Annotated[
        bool,
        typer.Option(
            "--slice/--no-slice", help="Also check one layer of the 13B model, and its U-Net."
        ),
    ] = True,
) -> int:
    """Build, run, compare and measure the engines of a bundle on this machine's GPU."""
    console = Console(highlight=False, soft_wrap=True)
    causes: dict[str, str] = {}

    def say(step: Step) -> None:
        line = shortened(step, causes)
        console.print(f"{step.state:<8} {step.name:<18} {line}", markup=False)

    precisions = tuple(precision or PRECISIONS)
    check_arguments(bundle, target, precisions)
    code, written = WRONG, ""
    with _no_full_disk(console), new_folder(out, None, kind=KIND, inputs=[bundle]) as work:
        check = Check(
            bundle,
            target,
            precisions,
            Machine(device),
            say,
            repeats,
            minutes=minutes,
            folder=work,
            with_slice=with_slice,
        )
        code = check.run()
        paths = write_report(work, describe(), bundle, target, check.steps)
        written = " and ".join(str(out / path.name) for path in paths)
    if written:
        console.print(f"report: {written}", markup=False)
    return code


def shortened(step: Step, causes: dict[str, str]) -> str:
    """Shorten the line of a step that was not run: repeated causes become the name of their step.

    `causes`: causes printed so far, with their steps; updated. The report has all lines in full.
    """
    if step.state != "not run":
        return step.line
    parts = step.line.removeprefix(NO_ENGINES).split(CAUSES)
    fresh = [part for part in parts if part not in causes]
    causes.update(dict.fromkeys(fresh, step.name))
    steps = dict.fromkeys(causes[part] for part in parts if part not in fresh)
    return CAUSES.join([*fresh, *([f"as for {' and '.join(steps)}"] if steps else [])])


@contextmanager
def _no_full_disk(console: Console) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        console.print(f"the report cannot be written: {error}", markup=False)


run = program.program("python -m mmi_bench.gpu_check", main)
