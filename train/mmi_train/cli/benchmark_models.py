"""Models that answer benchmarks: a bundle over the batching engine, or a model folder."""

from __future__ import annotations

from asyncio import wrap_future
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any, Protocol

from mmi_deploy.batching.batch_engine import BatchEngine
from mmi_deploy.bundle.bundle import MANIFEST
from mmi_deploy.cli.documents_at_once import AHEAD, Board, check_fits, generated, opened_engine
from mmi_deploy.cli.machine import Machine
from mmi_deploy.documents.document import Document
from mmi_deploy.documents.story import Story
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime

# Ending of the weights of a model folder.
_WEIGHTS = "*.safetensors"


class Answering(Protocol):
    """A loaded model. side: of the pictures that it is given. most: questions at once, and some
    that wait. most_beams: of a search."""

    side: int
    most: int
    most_beams: int

    def check(self, document: Document, options: GenerationOptions) -> None:
        """Raise `MmiError` if the model cannot take a document."""

    async def story(
        self, name: str, document: Document, options: GenerationOptions, board: Board
    ) -> Story:
        """Generate one document."""

    async def scores(self, document: Document, options: Sequence[str]) -> list[float]:
        """Log probability of each of `options` as the text that follows a document."""


class BenchmarkModel(Protocol):
    """A model that is not loaded yet. most_beams: of a search."""

    most_beams: int

    def record(self, options: GenerationOptions) -> dict[str, Any]:
        """Everything that answers depend on besides the questions, for JSON."""

    def opened(self, board: Board) -> AbstractContextManager[Answering]:
        """Load the model."""


def benchmark_model(machine: Machine, steps: int | None) -> BenchmarkModel:
    """The bundle or model folder at `machine.bundle`. steps: of a picture's denoising in PyTorch,
    None for the usual number. Raises `MmiError`."""
    folder = machine.bundle
    if not (folder / MANIFEST).is_file() and next(folder.glob(_WEIGHTS), None) is not None:
        from mmi_train.cli.benchmark_pytorch import STEPS, ModelFolder

        return ModelFolder(machine, steps or STEPS)
    if steps is not None:
        raise ConfigError("--steps is of a model folder; a bundle has its own sampler")
    return _BundleModel(machine)


class _BundleModel:
    def __init__(self, machine: Machine) -> None:
        self._machine, self._bundle = machine, machine.open_bundle()
        self.most_beams = self._bundle.limits.batch

    def record(self, options: GenerationOptions) -> dict[str, Any]:
        return self._machine.record(self._bundle, options)

    @contextmanager
    def opened(self, board: Board) -> Iterator[_Engine]:
        kernels = self._machine.find_kernels()
        with closing(self._machine.open_runtime(self._bundle, kernels)) as runtime:
            with opened_engine(runtime, self._machine, board) as engine:
                yield _Engine(runtime, engine)


class _Engine:
    def __init__(self, runtime: Runtime, engine: BatchEngine) -> None:
        self._runtime, self._engine = runtime, engine
        self.side = runtime.config.vision.image_size
        slots = engine.stats().slots
        self.most, self.most_beams = slots + AHEAD, slots

    def check(self, document: Document, options: GenerationOptions) -> None:
        check_fits(document, options, self._runtime)

    async def story(
        self, name: str, document: Document, options: GenerationOptions, board: Board
    ) -> Story:
        output, _ = await generated(self._engine, name, document, options, board)
        return output.story

    async def scores(self, document: Document, options: Sequence[str]) -> list[float]:
        found = await wrap_future(self._engine.score(document, options))
        return [one.logprob for one in found]
