"""Build a TensorRT or TensorRT-RTX engine from an ONNX file.

Both use one code path; they differ in how the architecture is set. Networks are strongly typed: the
file decides the precision. Weights are never read into Python: the parser maps the file beside the
graph, and the engine is streamed to disk while it is serialised.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx

from mmi_deploy.bundle.kernel_plan import ProfilePlan
from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.runtime.device_memory import import_cuda
from mmi_deploy.runtime.tensorrt.versions import check_versions, installed_versions
from mmi_deploy.spec.backends import ARCHITECTURES, BACKENDS
from mmi_deploy.system.nvidia_driver import gpus_here, nvidia_driver
from mmi_deploy.system.progress import Cancelled, Progress
from mmi_deploy.targets.plan_reader import LAYER, read_inspector, read_log
from mmi_deploy.targets.profiles import DEFAULT, Profile
from mmi_deploy.targets.timing_cache import load_timings, save_timings

# Logged by TensorRT's parser when it drops an input of a node that it does not support. The engine
# would silently compute something else.
UNUSED_INPUT = "Unused Input"

_FIRST_ERRORS = 3


@dataclass(frozen=True)
class Plugin:
    """The plugin of our operators, passed in by the command: this package does not depend on it.

    `import_tensorrt(module name)`: import the module, ready to parse plugins. `load(module)`:
    register the plugin; the result has `last_report()` and `unregister()`. `copy(model)`:
    TensorRT's own copy of a graph. `check(network, model)`: raise unless every MMFS node became a
    plugin layer. `products(model, path)`: a copy of the graph at `path` whose weight-only products
    are the plugin's; None where it has none. All can be pickled. `identity`: hash of its bytes.
    `build_only`: engines built with it cannot run.
    """

    identity: str
    build_only: bool
    import_tensorrt: Callable[[str], Any]
    load: Callable[[Any], Any]
    copy: Callable[[onnx.ModelProto], onnx.ModelProto]
    check: Callable[[Any, onnx.ModelProto], None]
    products: Callable[[onnx.ModelProto, Path], onnx.ModelProto] | None = None


@dataclass(frozen=True)
class Job:
    """One engine to build: `source`, an ONNX file with weights beside it, becomes `engine`.

    device: index of the GPU to build on, where the runtime needs one. timings: file of its timing
    cache, None for none.
    """

    graph: str
    runtime: str
    architecture: str
    source: Path
    engine: Path
    profiles: tuple[Profile, ...]
    plugin: Plugin
    device: int = 0
    timings: Path | None = None


@dataclass(frozen=True)
class BuildResult:
    """Result of a build. layers: count by type in the parsed network. bindings: inputs and outputs,
    name -> type. warnings: lines of the builder's log. plans: final kernels of each profile."""

    layers: Mapping[str, int]
    bindings: Mapping[str, str]
    engine_bytes: int
    tensorrt: str
    warnings: tuple[str, ...] = ()
    plans: tuple[ProfilePlan, ...] = ()


@dataclass
class Log:
    """Lines of TensorRT's logger by severity, and its messages about the final kernels."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)

    def add(self, severity: str, line: str) -> None:
        if LAYER in line:
            self.layers.append(line)
        line = " ".join(line.split())
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(line)
        elif severity == "WARNING" or UNUSED_INPUT in line:
            self.warnings.append(line)

    def dropped(self) -> str | None:
        """First log line about a dropped input, or None."""
        return next((line for line in [*self.errors, *self.warnings] if UNUSED_INPUT in line), None)


def open_tensorrt(plugin: Plugin, runtime: str, architecture: str, device: int = 0) -> Any:
    """Import the TensorRT module of `runtime` and check that it builds for `architecture`, on GPU
    `device` where it needs one.

    Raises `EngineError` where it is not installed, too old, or does not fit the driver,
    `ConfigError` where it cannot build for that architecture on this machine.
    """
    check_installed(runtime)
    trt = plugin.import_tensorrt(BACKENDS[runtime].module)
    check_version(runtime, trt.__version__)
    check_architecture(trt, runtime, architecture, device)
    return trt


def check_installed(runtime: str) -> None:
    """Raise `EngineError` unless driver, CUDA's bindings and TensorRT fit one another. A runtime
    that builds without a GPU is compared with neither driver nor bindings."""
    if BACKENDS[runtime].cross_compiles:
        check_versions(runtime, installed_versions(runtime))
        return
    cuda = None
    with suppress(EngineError):  # a build does without the bindings
        cuda = import_cuda()
    driver = nvidia_driver()
    version = driver.cuda_version() if driver else None
    check_versions(runtime, replace(installed_versions(runtime, cuda), driver=version))


def check_version(runtime: str, version: str) -> None:
    """Raise `EngineError` for a TensorRT version that is too old for the graphs."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    backend = BACKENDS[runtime]
    if numbers < backend.minimum_version:
        raise EngineError(
            f"{backend.module} is too old: its parser does not know all operators of the graphs",
            expected=f"{'.'.join(map(str, backend.minimum_version))} or newer",
            got=version,
            fix=f"pip install --upgrade {backend.package}",
        )


def check_architecture(trt: Any, runtime: str, architecture: str, device: int = 0) -> None:
    """Raise `ConfigError` where `trt` does not build for `architecture` on this machine.

    TensorRT-RTX compiles for any GPU that it knows; TensorRT measures kernels, and so builds for
    GPU `device` of the machine alone.
    """
    if BACKENDS[runtime].cross_compiles:
        known = rtx_architectures(trt)
        if architecture not in known:
            raise ConfigError(
                f"TensorRT-RTX {trt.__version__} does not build for {architecture} "
                f"({ARCHITECTURES.get(architecture, 'unknown')})",
                expected=", ".join(known),
                fix="give one of these with --arch, or build with --target tensorrt on the GPU",
            )
        return
    here = device_architecture(device)
    if here != architecture:
        others = [gpu for gpu in gpus_here() if gpu.architecture == architecture]
        if others:
            fix = f"choose {others[0]} with --device {others[0].index}"
        elif here:
            fix = f"give --arch {here}"
        else:
            fix = "run this on that GPU, or build with --target tensorrt-rtx, which needs no GPU"
        raise ConfigError(
            f"TensorRT builds engines on the GPU that runs them, and {architecture} is not it",
            expected=here or "a machine with an NVIDIA GPU and its driver",
            got=architecture,
            fix=fix,
        )


def rtx_architectures(trt: Any) -> list[str]:
    """Architectures of `ARCHITECTURES` that this TensorRT-RTX compiles for."""
    return [name for name in ARCHITECTURES if hasattr(trt.ComputeCapability, name.upper())]


def device_architecture(device: int = 0) -> str | None:
    """Architecture of GPU `device` of this machine, such as `sm89`, or None without a GPU. Raises
    `ConfigError` where there are GPUs, but not this one."""
    gpus = gpus_here()
    if not gpus:
        return None
    for gpu in gpus:
        if gpu.index == device:
            return gpu.architecture
    raise ConfigError(
        f"there is no GPU {device}",
        expected=", ".join(map(str, gpus)),
        fix="give one of these with --device",
    )


def build_engine(trt: Any, job: Job, progress: Progress) -> BuildResult:
    """Parse `job.source`, check the parsed network, and write `job.engine`.

    Raises `EngineError` with TensorRT's message and the node where parsing or building fails, and
    `OSError` where the engine cannot be written.
    """
    model = onnx.load(job.source, load_external_data=False)
    log = Log()
    registered = job.plugin.load(trt)
    try:
        builder = trt.Builder(_logger(trt, log))
        network = builder.create_network(strongly_typed(trt))
        parser = trt.OnnxParser(network, builder.logger)
        if not parser.parse_from_file(str(job.source)):
            raise _parse_error(job, parser, registered)
        if line := log.dropped():
            raise EngineError(f"TensorRT dropped an input of {job.graph}: {line}")
        job.plugin.check(network, model)
        check_samples(trt, network, model)
        config = _config(trt, builder, job)
        config.progress_monitor = _monitor(trt, progress)
        if job.timings is not None:
            load_timings(config, job.timings)
        writer = _writer(trt, job.engine)
        with writer:
            done = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.failure is not None:
            raise writer.failure
        if not done or not writer.written:
            raise _build_error(job, log, registered)
        if job.timings is not None:
            save_timings(config, job.timings)
        return BuildResult(
            layers=layers_of(network),
            bindings=_bindings(network),
            engine_bytes=writer.written,
            tensorrt=trt.__version__,
            warnings=tuple(dict.fromkeys(log.warnings)),
            plans=_plans(trt, builder.logger, job, log),
        )
    finally:
        registered.unregister()


def _plans(trt: Any, logger: Any, job: Job, log: Log) -> tuple[ProfilePlan, ...]:
    """Kernels of the engine: from the log, else from the engine itself, which takes a GPU."""
    names = [profile.name for profile in job.profiles if profile.shapes] or [DEFAULT]
    plans = read_log(log.layers, names)
    if plans or BACKENDS[job.runtime].cross_compiles:
        return plans
    engine = trt.Runtime(logger).deserialize_cuda_engine(job.engine.read_bytes())
    if engine is None:
        return ()
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return read_inspector(text, names)


_MODES = {"nearest": "NEAREST", "linear": "LINEAR", "bilinear": "LINEAR", "cubic": "CUBIC",
          "bicubic": "CUBIC"}  # fmt: skip
_PADDING = {"zeros": "FILL", "border": "CLAMP", "reflection": "REFLECT"}


def check_samples(trt: Any, network: Any, model: onnx.ModelProto) -> None:
    """Raise `EngineError` unless the GRID_SAMPLE layers of `network` match the GridSample nodes of
    `model`. TensorRT's parser up to 11.1 silently reads a mode that it does not know as nearest."""
    expected = Counter(_sampling(node) for node in model.graph.node if node.op_type == "GridSample")
    found: Counter[tuple[str, str, bool]] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name == "GRID_SAMPLE":
            layer.__class__ = trt.IGridSampleLayer  # how TensorRT's Python casts a layer
            kind = (layer.interpolation_mode.name, layer.sample_mode.name)
            found[*kind, bool(layer.align_corners)] += 1
    if found != expected:
        raise EngineError(
            "TensorRT misreads GridSample",
            expected=_format_counts(expected),
            got=_format_counts(found),
            fix="build with another TensorRT, and report its version",
        )


def _sampling(node: onnx.NodeProto) -> tuple[str, str, bool]:
    """(interpolation mode, sample mode, align_corners) of a GridSample node, named as in
    TensorRT."""
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    mode = given.get("mode", b"linear").decode()
    padding = given.get("padding_mode", b"zeros").decode()
    return _MODES[mode], _PADDING[padding], bool(given.get("align_corners", 0))


def _format_counts(kinds: Mapping[tuple[str, str, bool], int]) -> str:
    """Format counted GRID_SAMPLE layers for an error message."""
    parts = (
        f"{count} {mode} {padding}{' align_corners' * corners}"
        for (mode, padding, corners), count in sorted(kinds.items())
    )
    return ", ".join(parts) or "no GRID_SAMPLE layer"


def strongly_typed(trt: Any) -> int:
    """Network creation flags. In TensorRT 11 all networks are strongly typed; the flag may be
    gone."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def layers_of(network: Any) -> dict[str, int]:
    """Count of layers by type, most frequent first."""
    counts = Counter(network.get_layer(index).type.name for index in range(network.num_layers))
    return dict(counts.most_common())


def _bindings(network: Any) -> dict[str, str]:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    return {tensor.name: tensor.dtype.name.lower() for tensor in [*inputs, *outputs]}


def _config(trt: Any, builder: Any, job: Job) -> Any:
    config = builder.create_builder_config()
    if BACKENDS[job.runtime].cross_compiles:
        config.num_compute_capabilities = 1
        capability = getattr(trt.ComputeCapability, job.architecture.upper())
        config.set_compute_capability(capability, 0)
    for flag in BACKENDS[job.runtime].builder_flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    config.clear_flag(trt.BuilderFlag.TF32)
    # The builder then says which kernels the layers became; the engine computes the same.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for profile in job.profiles:
        if not profile.shapes:
            continue
        shapes = builder.create_optimization_profile()
        for name, ends in profile.shapes.items():
            shapes.set_shape(name, *ends)
        if config.add_optimization_profile(shapes) < 0:
            raise EngineError(
                f"TensorRT refuses the profile {profile.name} of {job.graph}",
                got=profile.record(),
            )
    return config


def _parse_error(job: Job, parser: Any, registered: Any) -> EngineError:
    said = [parser.get_error(index) for index in range(parser.num_errors)]
    lines = [
        f"{_node(error)}{' '.join(error.desc().split())}" for error in said[:_FIRST_ERRORS]
    ] or ["no reason given"]
    if report := registered.last_report():
        lines.append(report)
    more = f" (and {len(said) - _FIRST_ERRORS} more)" if len(said) > _FIRST_ERRORS else ""
    return EngineError(
        f"TensorRT cannot parse {job.graph} for {job.architecture}: {' | '.join(lines)}{more}"
    )


def _node(error: Any) -> str:
    name, operator = error.node_name(), error.node_operator()
    return f"node {name} ({operator}): " if name or operator else ""


def _build_error(job: Job, log: Log, registered: Any) -> EngineError:
    lines = list(dict.fromkeys(log.errors))[:_FIRST_ERRORS] or ["no reason given"]
    if report := registered.last_report():
        lines.append(report)
    return EngineError(
        f"TensorRT cannot build {job.graph} for {job.architecture}: {' | '.join(lines)}"
    )


def _logger(trt: Any, log: Log) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, line: str) -> None:
            log.add(severity.name, line)

    return Logger()


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps
            with suppress(Cancelled):  # only step_complete can stop TensorRT
                progress(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                progress(phase, step + 1, self.steps.get(phase, step + 1))
            except Cancelled:
                return False
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()


def _writer(trt: Any, path: Path) -> Any:
    """Stream writer of the engine. Keeps the failure, since TensorRT discards exceptions."""

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.written = 0
            self.failure: BaseException | None = None

        def __enter__(self) -> None:
            self.file = path.open("wb")

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            try:
                self.file.write(data)
            except OSError as error:
                self.failure = error
                return 0
            self.written += len(data)
            return len(data)

    return Writer()
