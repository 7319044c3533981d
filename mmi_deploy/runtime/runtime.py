"""A bundle made ready to run: its engines, loaded when first needed, its samplers and tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.runtime.backend import Backend, open_backend
from mmi_deploy.runtime.buffers import Buffer
from mmi_deploy.runtime.engine import Engine
from mmi_deploy.spec.backends import AUTO, CPU
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.schedule import Schedule


@dataclass(frozen=True)
class BoundSchedule:
    """A sampler whose tables lie where `denoise_step` reads them."""

    schedule: Schedule
    coefficients: Buffer
    time_table: Buffer


class Runtime:
    """Engines, samplers and tokenizer of one model, shared by any number of sessions.

    Engines are loaded, and `load_schedule` is called, once for each name that is asked for.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        backend: Backend,
        load_schedule: Callable[[str | None], Schedule],
        schedules: Collection[str] = (),
    ) -> None:
        """schedules: the samplers that `load` reads beside the default."""
        self.config = config
        self.tokenizer = tokenizer
        self.backend = backend
        self.limits = backend.limits
        self.memory = backend.memory
        self.graphs = dict(backend.graphs)
        self.schedules = tuple(schedules)
        self._loading = Lock()
        self._load_schedule = load_schedule
        self._engines: dict[str, Engine] = {}
        self._schedules: dict[str | None, BoundSchedule] = {}

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
    ) -> Runtime:
        """Open a bundle for one of its targets: `cpu` and the like for ONNX Runtime, or a name such
        as `tensorrt-sm89-fp16` for a GPU.

        target: whose engines run, on the CPU graph by graph where it has any; `portable` takes
        none. kernels: `auto` finds or compiles the MMFS kernels (for a GPU: finds the plugin),
        `none` runs the functions inside the model files, or a library file. threads: of the CPU; 0
        lets ONNX Runtime choose. device: the GPU, from 0. resident: engines that stay on it, as in
        `mmi_deploy.runtime.tensorrt.engine.GROUPS`; None: all. unproved: run graphs without a
        receipt. Raises `MmiError`.
        """
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle, unproved=unproved)
        bundle.check_runnable()
        backend = open_backend(
            bundle, target, kernels=kernels, threads=threads, device=device, resident=resident
        )
        return cls.from_backend(bundle, backend)

    @classmethod
    def from_backend(cls, bundle: Bundle, backend: Backend) -> Runtime:
        """The runtime of an opened backend; raises `EngineError` where the device has too little
        memory."""
        if (plan := backend.plan()) is not None:
            plan.check()
        tokenizer = Tokenizer.open(bundle.tokenizer, bundle.config.tokens)
        return cls(bundle.config, tokenizer, backend, bundle.schedule, bundle.schedules)

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
                self._engines[name] = self.backend.load(self.graphs[name])
            return self._engines[name]

    def recordings(self) -> dict[str, dict[str, Any]]:
        """CUDA graphs of engines on a GPU: launches of each engine from one (`launches`), and the
        reasons of runs that could not be recorded (`refusals`)."""
        engines = self._engines.items()
        return {
            "launches": {name: e.launches for name, e in engines if e.launches is not None},
            "refusals": {name: e.refusal for name, e in engines if e.refusal},
        }

    def load(self) -> None:
        """Read every sampler, and load every engine that stays, now: the first request does not
        wait, and on the CPU the bundle's files are needed no more."""
        for key in (None, *self.schedules):
            self.schedule(key)
        for name in self.graphs:
            if self.backend.is_resident(name):
                self.engine(name)

    def schedule(self, key: str | None = None) -> BoundSchedule:
        """One sampler (`ddim:20`), or the default; raises `BundleError` when there is none such."""
        with self._loading:
            if key not in self._schedules:
                schedule = self._load_schedule(key)
                assert schedule.time_table is not None, "a bundle's schedules have time tables"
                tables = (
                    self.memory.from_array(schedule.coefficients),
                    self.memory.from_array(schedule.time_table),
                )
                self._schedules[key] = BoundSchedule(schedule, *tables)
            return self._schedules[key]
