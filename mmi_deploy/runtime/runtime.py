"""A bundle made ready to run: its engines, loaded when first needed, its samplers and tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.bundle.manifest import PORTABLE
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.runtime.buffers import HOST, Buffer, Memory
from mmi_deploy.runtime.engine import Engine
from mmi_deploy.runtime.tensorrt.backend import TensorRtTarget, runtime_of
from mmi_deploy.runtime.tensorrt.engine import TensorRtEngine
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.graphs import GRAPHS, Graph, Limits, graphs
from mmi_deploy.spec.schedule import Schedule

CPU = "cpu"
"""The target whose engines are taken, graph by graph, where the bundle has them."""


@dataclass(frozen=True)
class BoundSchedule:
    """A sampler whose tables lie where `denoise_step` reads them."""

    schedule: Schedule
    coefficients: Buffer
    time_table: Buffer


class Runtime:
    """Engines, samplers and tokenizer of one model, shared by any number of sessions.

    `load_engine` and `load_schedule` are called once for each name that is asked for.
    """

    def __init__(
        self,
        config: ModelConfig,
        limits: Limits,
        tokenizer: Tokenizer,
        load_engine: Callable[[Graph], Engine],
        load_schedule: Callable[[str | None], Schedule],
        memory: Memory = HOST,
        contract: Mapping[str, Graph] | None = None,
        target: TensorRtTarget | None = None,
        schedules: Collection[str] = (),
    ) -> None:
        """contract: the graphs as the target keeps them, those of the configuration by default.
        target: where the engines are on a GPU. schedules: the samplers that `load` reads beside the
        default."""
        self.config = config
        self.limits = limits
        self.tokenizer = tokenizer
        self.memory = memory
        self.graphs = dict(contract or graphs(config, limits))
        self.target = target
        self.schedules = tuple(schedules)
        self._loading = Lock()
        self._load_engine = load_engine
        self._load_schedule = load_schedule
        self._engines: dict[str, Engine] = {}
        self._schedules: dict[str | None, BoundSchedule] = {}

    @classmethod
    def open(
        cls,
        bundle: Bundle | Path | str,
        *,
        threads: int = 0,
        target: str = CPU,
        library: Path | None = None,
        unproved: bool = False,
        device: int = 0,
        resident: Collection[str] | None = None,
    ) -> Runtime:
        """Open a bundle for one of its targets: `cpu` and the like for ONNX Runtime, or a name such
        as `tensorrt-sm89-fp16` for a GPU.

        threads: of the CPU; 0 lets ONNX Runtime choose. target: whose engines to take, on the CPU
        where there are any; `portable` takes none. library: kernels for our operators, which graphs
        beyond them do without; TensorRT's plugin for its targets. device: which GPU. resident:
        which engines stay on it, as in `tensorrt_engine.GROUPS`. Raises `MmiError`.
        """
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle, unproved=unproved)
        bundle.check_runs()
        library = library and library.absolute()
        check_target(bundle, target)
        if runtime_of(target) is not None:
            gpu = TensorRtTarget.open(
                bundle, target, plugin=library, device=device, resident=resident
            )
            return cls.on_gpu(gpu)
        if resident is not None:
            raise ConfigError("on the CPU all engines stay in memory", fix="leave out --resident")
        files = engine_files(bundle, target)
        return cls(
            bundle.config,
            bundle.limits,
            Tokenizer.open(bundle.tokenizer, bundle.config.tokens),
            partial(_onnx_engine, files, threads, library, bundle.beyond_kernels),
            bundle.schedule,
            schedules=bundle.schedules,
        )

    @classmethod
    def on_gpu(cls, target: TensorRtTarget) -> Runtime:
        """The runtime of an opened target; raises `EngineError` where it does not fit its GPU."""
        target.plan().check()
        bundle = target.bundle
        return cls(
            bundle.config,
            target.limits,
            Tokenizer.open(bundle.tokenizer, bundle.config.tokens),
            target.load,
            bundle.schedule,
            target.memory,
            target.graphs,
            target,
            bundle.schedules,
        )

    def close(self) -> None:
        """Give back what engines hold, and keep what they learned for the next time."""
        with self._loading:
            for engine in self._engines.values():
                engine.close()
            self._engines.clear()

    def engine(self, name: str) -> Engine:
        """The engine of one graph; loads it the first time."""
        with self._loading:
            if name not in self._engines:
                self._engines[name] = self._load_engine(self.graphs[name])
            return self._engines[name]

    def recordings(self) -> dict[str, dict[str, Any]]:
        """Of engines on a GPU: how often each was launched from a CUDA graph (`launches`), and why
        some runs could not be recorded (`refusals`)."""
        engines = {n: e for n, e in self._engines.items() if isinstance(e, TensorRtEngine)}
        return {
            "launches": {name: engine.launches for name, engine in engines.items()},
            "refusals": {name: e.refusal for name, e in engines.items() if e.refusal},
        }

    def load(self) -> None:
        """Read every sampler, and load every engine that stays, now: the first request does not
        wait, and on the CPU the bundle's files are needed no more."""
        for key in (None, *self.schedules):
            self.schedule(key)
        for name in self.graphs:
            if self.target is None or self.target.residency.stays(name):
                self.engine(name)

    def schedule(self, key: str | None = None) -> BoundSchedule:
        """One sampler (`ddim:20`), or the default; raises `BundleError` when there is none such."""
        with self._loading:
            if key not in self._schedules:
                schedule = self._load_schedule(key)
                assert schedule.time_table is not None, "a bundle's schedules have time tables"
                tables = (
                    self.memory.hold(schedule.coefficients),
                    self.memory.hold(schedule.time_table),
                )
                self._schedules[key] = BoundSchedule(schedule, *tables)
            return self._schedules[key]


def check_target(bundle: Bundle, target: str) -> None:
    """Raise `ConfigError` for a target that was not built."""
    if target in (CPU, PORTABLE, *bundle.targets):
        return
    raise ConfigError(
        f"{bundle.folder} has no target {target!r}",
        expected=" or ".join((CPU, *(name for name in bundle.targets if name != CPU))),
        fix=f"build it with `{bundle.build_command(target)}`",
    )


def engine_files(bundle: Bundle, target: str) -> dict[str, Path]:
    """The file of every graph: that of `target` where it has one, or else the portable one."""
    files = {make.__name__: bundle.graph_file(make.__name__) for make in GRAPHS}
    if target == PORTABLE or (target == CPU and target not in bundle.targets):
        return files
    folder = bundle.target_folder(target)
    return files | {name: folder / file for name, file in bundle.target(target).graphs.items()}


def _onnx_engine(
    files: dict[str, Path],
    threads: int,
    library: Path | None,
    beyond_kernels: Collection[str],
    graph: Graph,
) -> Engine:
    # Imported here: a machine that runs TensorRT's engines alone need not have ONNX Runtime.
    from mmi_deploy.runtime.onnxruntime.engine import OnnxOptions, OnnxRuntimeEngine

    path = files[graph.name]
    if path.suffix != ".onnx":
        raise EngineError(f"{path} is no ONNX file, and this runtime runs on the CPU")
    if graph.name in beyond_kernels:
        library = None  # the function inside the file runs, as it did for the receipts
    return OnnxRuntimeEngine(path, graph, OnnxOptions(threads, library))
