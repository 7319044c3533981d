"""Backends of the comparison, each a function from (document, options) to events."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from mmi_bench.compare.samples import ClockName
from mmi_deploy.bundle.manifest import PORTABLE
from mmi_deploy.documents.document import Document
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.events import Event
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.spec.backends import CPU, NONE
from mmi_deploy.spec.config import ModelConfig

# `runtime`: a bundle in our runtime. `pytorch`: the model in the published order of work, MMFS as
# published. `pytorch-compiled`: the same order of work with the model's own MMFS and a U-Net that
# `torch.compile` has compiled: what a user of PyTorch can have without leaving it.
BackendName = Literal["runtime", "pytorch", "pytorch-compiled"]
RUNTIME: BackendName = "runtime"
PYTORCH: BackendName = "pytorch"
COMPILED: BackendName = "pytorch-compiled"
LABELS: Mapping[BackendName, str] = {
    RUNTIME: "runtime",
    PYTORCH: "PyTorch as published",
    COMPILED: "PyTorch, U-Net compiled",
}

Generate = Callable[[Document, GenerationOptions], Iterator[Event]]


@dataclass(frozen=True)
class Settings:
    """Settings of both backends. `bundle` and `model` hold the same weights. `teacher`: the model
    that these were distilled from, which PyTorch runs instead, with `teacher_schedule`."""

    bundle: Path
    model: Path
    schedule: str
    threads: int
    library: Path | None
    unproved: bool
    target: str = CPU
    device: int = 0
    clock: ClockName = "wall"
    teacher: Path | None = None
    teacher_schedule: str = ""

    @property
    def exact(self) -> bool:
        """True if the runtime computes in float32, so that outputs must be equal."""
        return self.target in (CPU, PORTABLE) or self.target.endswith("fp32")

    def to_json(self) -> dict[str, Any]:
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Settings:
        paths = ("bundle", "model", "library", "teacher")
        return cls(**fields | {name: Path(fields[name]) for name in paths if fields[name]})


def undistilled(config: ModelConfig) -> ModelConfig:
    """Configuration of the model that a distilled one comes from."""
    return replace(config, image_decoder=replace(config.image_decoder, distillation=None))


def backend_name(name: str) -> BackendName:
    """`name` as the name of a backend; raises `ValueError` for another."""
    if name not in get_args(BackendName):
        raise ValueError(f"there is no backend {name!r}")
    return cast(BackendName, name)


def open_backend(backend: BackendName, settings: Settings) -> Generate:
    """Load a backend completely, so that the first document waits for nothing but compilation."""
    if backend == RUNTIME:
        return _runtime(settings)
    return _pytorch(settings, compiled=backend == COMPILED)


def _runtime(settings: Settings) -> Generate:
    from mmi_deploy.runtime.generation import generate
    from mmi_deploy.runtime.runtime import Runtime

    runtime = Runtime.open(
        settings.bundle,
        threads=settings.threads,
        kernels=settings.library or NONE,
        unproved=settings.unproved,
        target=settings.target,
        device=settings.device,
    )
    runtime.load()
    runtime.schedule(settings.schedule)
    return lambda document, options: generate(runtime, document, options)


def _pytorch(settings: Settings, compiled: bool) -> Generate:
    import torch

    from mmi_deploy.bundle.bundle import Bundle
    from mmi_deploy.documents.tokenizer import Tokenizer
    from mmi_export.schedules import scheduler_of
    from mmi_train.baseline.generation import generate
    from mmi_train.baseline.published_mmfs import as_published
    from mmi_train.weights.model_folder import load_model

    torch.set_num_threads(settings.threads)
    bundle = Bundle.open(settings.bundle, unproved=settings.unproved)
    model = load_model(settings.teacher or settings.model)
    if compiled:
        model.image_decoder.unet.compile()  # at its first run, which is warm-up
    else:
        model = as_published(model)
    config, schedule = bundle.config, settings.schedule
    if settings.teacher is not None:
        config = undistilled(config)
        schedule = settings.teacher_schedule
        if model.config != config:
            raise ConfigError(
                f"{settings.bundle} was not distilled from {settings.teacher}: other configuration",
                fix="give the model folder that `mmi train --distill` started from",
            )
    elif model.config != config:
        raise ConfigError(
            f"{settings.bundle} was not exported from {settings.model}: other configuration",
            fix="give the model folder with --model, or export again",
        )
    tokenizer = Tokenizer.open(bundle.tokenizer, bundle.config.tokens)
    scheduler = scheduler_of(schedule, model.config.image_decoder)
    eta = float(schedule.startswith("ddpm"))
    return lambda document, options: generate(
        model, tokenizer, document, options, scheduler, eta=eta, limits=bundle.limits
    )
