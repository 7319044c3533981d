"""Runtime: the engines, samplers and tokenizer of a bundle, loaded at first use."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.backend import Backend, open_backend
from mmi_deploy.runtime.buffers import Buffer
from mmi_deploy.runtime.engine import Engine
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.spec.backends import AUTO, CPU
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.preview_map import PreviewMap
from mmi_deploy.spec.schedule import Schedule


@dataclass(frozen=True)
class BoundSchedule:
    """A sampler, and the row of its first step in the tables of all samplers."""

    schedule: Schedule
    first: int


class Runtime:
    """Engines, samplers and tokenizer of one model, shared by any number of sessions.

    Each engine is loaded once, at its first use, and so is each schedule. Thread-safe.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        backend: Backend,
        load_schedule: Callable[[str | None], Schedule],
        schedules: Collection[str] = (),
        preview_map: PreviewMap | None = None,
    ) -> None:
        """load_schedule: reads a schedule by its key, None for the default. schedules: keys that
        can be asked for besides the default. preview_map: None if no previews can be shown."""
        self.config = config
        self.tokenizer = tokenizer
        self.backend = backend
        self.limits = backend.limits
        self.memory = backend.memory
        self.graphs = dict(backend.graphs)
        self.schedules = tuple(schedules)
        self._loading = Lock()
        self._load_schedule = load_schedule
        self._preview_map = preview_map
        self._engines: dict[str, Engine] = {}
        self._schedules: dict[str | None, BoundSchedule] | None = None
        self._tables: dict[str, Buffer] = {}

    @classmethod
    def open(
        cls,
        bundle: Bundle | Path | str,
        *,
        target: str = CPU,
        kernels: str | Path = AUTO,
        threads: int = 0,
        device: int = 0,
        resident: Collection[str] | None = None,
        unproved: bool = False,
        beams: int = 1,
    ) -> Runtime:
        """Open a bundle for one of its targets.

        target: `cpu` or another CPU target for ONNX Runtime, where graphs without a file of the
        target run as exported; `portable` for all graphs as exported; for a GPU a name such as
        `tensorrt-sm89-fp16`, or `cuda-fp16` for ONNX Runtime. kernels: `auto` finds or compiles the
        MMFS kernels (TensorRT: finds the plugin), `none` runs the ONNX functions inside the model
        files, otherwise the path of a library. threads: CPU threads; 0 lets ONNX Runtime choose.
        device: index of the GPU.
        resident: engine groups that stay on the GPU, names of
        `mmi_deploy.runtime.tensorrt.engine.GROUPS`; None for all. unproved: run graphs without a
        receipt. beams: most beams of a document, for whose KV cache a GPU has to have memory.
        Raises `MmiError`.
        """
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle, unproved=unproved)
        bundle.check_runnable()
        backend = open_backend(
            bundle, target, kernels=kernels, threads=threads, device=device, resident=resident
        )
        return cls.from_backend(bundle, backend, beams)

    @classmethod
    def from_backend(cls, bundle: Bundle, backend: Backend, beams: int = 1) -> Runtime:
        """Make the runtime of an opened backend; raises `EngineError` if the device has too little
        memory."""
        # Before any engine is loaded: loading is slow, and would fail only at its end.
        if (plan := backend.plan(beams)) is not None:
            plan.check()
        tokenizer = Tokenizer.open(bundle.tokenizer, bundle.config.tokens)
        return cls(
            bundle.config,
            tokenizer,
            backend,
            bundle.schedule,
            bundle.schedules,
            bundle.manifest.preview,
        )

    def close(self) -> None:
        """Free the engines, and save RTX's compiled kernels for the next start."""
        with self._loading:
            for engine in self._engines.values():
                engine.close()
            self._engines.clear()

    def save_kernels(self) -> None:
        """Save RTX's compiled kernels, as far as it is time to. Called at the end of documents."""
        with self._loading:
            engines = tuple(self._engines.values())
        for engine in engines:
            engine.save_kernels()

    def engine(self, name: str) -> Engine:
        """Engine of one graph, loaded at its first use."""
        with self._loading:
            if name not in self._engines:
                self._engines[name] = self.backend.load(self.graphs[name])
            return self._engines[name]

    def recordings(self) -> dict[str, dict[str, Any]]:
        """Statistics of CUDA graphs: `launches`, engine -> runs launched from a recording, and
        `refusals`, engine -> the reason why its last attempt to record a run failed."""
        engines = self._engines.items()
        return {
            "launches": {name: e.launches for name, e in engines if e.launches is not None},
            "refusals": {name: e.refusal for name, e in engines if e.refusal},
        }

    def load(self) -> None:
        """Load all samplers and resident engines now, so that the first request does not wait. On
        the CPU the bundle's files may be removed afterwards."""
        self.schedule()
        for name in self.graphs:
            if self.backend.is_resident(name):
                self.engine(name)

    def schedule(self, key: str | None = None) -> BoundSchedule:
        """Sampler of a key such as `ddim:20`, or the default; raises `BundleError` for one that is
        not in the bundle."""
        with self._loading:
            bound = self._bound_schedules()
            return bound[key] if key in bound else bound[self._load_schedule(key).key]

    @property
    def preview_map(self) -> PreviewMap:
        """Map of the previews; raises `ConfigError` if the bundle has none."""
        if self._preview_map is None:
            raise ConfigError(
                "the bundle has no map for previews: it was exported before there were any",
                fix="export it again with `mmi export`, or ask for no previews",
            )
        return self._preview_map

    def denoising_steps(self, options: GenerationOptions) -> int:
        """Denoising steps of each picture. Raises `MmiError` for a sampler, or for previews, that
        the bundle does not have."""
        if options.previews:
            _ = self.preview_map
        return self.schedule(options.schedule).schedule.steps

    def tables(self) -> dict[str, Buffer]:
        """`coefficients` and `time_table` of all samplers, one after another, in the memory of
        `denoise_step`."""
        with self._loading:
            self._bound_schedules()
            return self._tables

    def _bound_schedules(self) -> dict[str | None, BoundSchedule]:
        if self._schedules is None:
            default = self._load_schedule(None)
            loaded = {default.key: default}
            loaded |= {key: self._load_schedule(key) for key in self.schedules if key not in loaded}
            found: dict[str | None, BoundSchedule] = {}
            first = 0
            for key, schedule in loaded.items():
                found[key] = BoundSchedule(schedule, first)
                first += schedule.steps
            tables = {
                "coefficients": [schedule.coefficients for schedule in loaded.values()],
                "time_table": [_time_table(schedule) for schedule in loaded.values()],
            }
            self._tables = {
                name: self.memory.from_array(np.concatenate(rows)) for name, rows in tables.items()
            }
            self._schedules = {None: found[default.key], **found}
        return self._schedules


def _time_table(schedule: Schedule) -> NDArray[np.float32]:
    """Time table of a bundle's schedule, which always has one."""
    assert schedule.time_table is not None, "a bundle's schedules have time tables"
    return schedule.time_table
