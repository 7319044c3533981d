"""Training loop of any stage: resumable, with the same weights whether or not it was interrupted.

Micro-batches are numbered through the run, and every random draw is keyed by (seed, number), so a
killed run resumes from its last checkpoint and ends with the weights of an uninterrupted run,
whatever the number of worker processes. Ranks take turns at the numbers: R ranks with A
micro-batches a step each see what one process sees with R * A.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mmi_deploy.errors import WeightsError
from mmi_deploy.system.progress import Progress, silent
from mmi_train.model.autocast import mixed_precision, without_norm_warnings
from mmi_train.model.layout import moved
from mmi_train.training.checkpoints import (
    Checkpoints,
    OnCheckpoint,
    RunState,
    latest_checkpoint,
    learning,
    load_checkpoint,
    read_state,
)
from mmi_train.training.optimiser import (
    OptimiserConfig,
    make_optimiser,
    parameter_groups,
    set_rate,
    trainable,
)
from mmi_train.training.profiling import profiled
from mmi_train.training.ranks import ALONE, Ranks, local, show_gradients
from mmi_train.training.sharded_checkpoints import ShardedCheckpoints
from mmi_train.training.trackers import TensorBoard, Tracker, Trackers


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RunConfig:
    """Settings of a run. `accumulate`: micro-batches of one optimiser step on each rank. `average`:
    decay of the exponential moving average (EMA) of the weights. `keep`: checkpoints kept.
    Intervals are in optimiser steps. `workers`: processes that make batches ahead; 0: made in the
    loop. `most_skipped`: steps in a row that may be left out because a loss or a gradient is not
    finite.
    """

    seed: int = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    accumulate: int = 1
    average: float = 0.999
    log_every: int = 50
    checkpoint_every: int = 250
    keep: int = 2
    workers: int = 0
    most_skipped: int = 3


class Stage(Protocol):
    """Training stage: a module, its micro-batches and their losses."""

    name: str

    @property
    def module(self) -> nn.Module:
        """The module to train, which checkpoints hold."""

    def batch(self, index: int, rng: np.random.Generator) -> Any:
        """Micro-batch `index` of the run, on the CPU; every draw comes from `rng`. A worker process
        may call it."""

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Losses of a micro-batch, on the module's device, by name; `total` is minimised. Draws
        come from torch's global generator, which the loop seeds."""

    def describe(self) -> Mapping[str, object]:
        """Settings that decide the weights, by name; a checkpoint of other settings is refused."""


@runtime_checkable
class SharedStage(Protocol):
    """Stage whose ranks must know something of each other's micro-batches before they compute, as
    which parts of the module these run."""

    def shared(self, batch: Any) -> Any:
        """Small value that all ranks are to know of a micro-batch."""

    def agreed(self, batches: Sequence[Any], known: Sequence[Sequence[Any]]) -> Sequence[Any]:
        """This rank's micro-batches of a step, adapted to what all ranks share of theirs:
        `known[rank][part]`. All that any part of a step runs must run in the last one too, where
        gradients are averaged."""


@runtime_checkable
class AveragedStage(Protocol):
    """Stage whose losses depend on the average (EMA) of the weights that learn."""

    def follow(self, average: Mapping[str, Tensor]) -> None:
        """Called before the first step with the averages by name, which every step updates in
        place."""


class Validation(Protocol):
    """Measurement of the module between steps; all ranks call all methods."""

    def resume(self, step: int) -> None:
        """Forget what was measured after `step`, from which the run goes on."""

    def due(self, step: int, last: int) -> bool:
        """True if the module is to be measured at `step` of `last`."""

    def measure(self, step: int) -> Mapping[str, float]:
        """Measure the module, which is in evaluation mode and has the weights to be written."""

    def best(self, checkpoints: int, last: int) -> int | None:
        """The best step among those with a checkpoint: every `checkpoints` steps, and the last."""


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class Watch:
    """Measurements beside the losses of the steps; the weights of a run stay the same without.

    `tracker`: another receiver of the curves beside TensorBoard, on the first rank. `profile`:
    optimiser steps, after the first one, of which `out/profile` gets a trace of all operators.
    """

    validation: Any = None  # Validation | None; pydantic checks no protocols
    tracker: Any = None  # Tracker | None
    profile: int = 0


UNWATCHED = Watch()

# Characters of a setting's value that an error shows.
MOST_TOLD = 40

# Settings of a run that leave its weights as they are.
FREE = ("log_every", "checkpoint_every", "keep", "workers", "most_skipped")


def settings_of(
    stage: Stage, optimiser: OptimiserConfig, run: RunConfig, start: str
) -> dict[str, str]:
    """All settings that decide the weights of a run, by name. start: names the weights that it
    starts from."""
    found: dict[str, object] = {"stage": stage.name, **stage.describe()}
    for part in (optimiser, run):
        found |= TypeAdapter(type(part)).dump_python(part, mode="json")
    found["start"] = start
    return {name: str(value) for name, value in found.items() if name not in FREE}


def checksum_of(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Short checksum of named tensors."""
    found = hashlib.sha256()
    for name, value in parameters:
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        found.update(name.encode())
        found.update(data.numpy().data)
    return found.hexdigest()[:16]


def check_same_run(
    path: Path, saved: RunState, settings: Mapping[str, str], optimiser: OptimiserConfig
) -> None:
    """Raise `WeightsError`, which names the differences, unless a run of `settings` can go on from
    the checkpoint at `path`. The number of steps may differ where the rate was the same with
    both numbers up to there."""
    names = sorted({*settings, *saved.settings})
    other = [name for name in names if settings.get(name) != saved.settings.get(name)]
    if other == ["steps"] and optimiser.is_flat_at(
        saved.step, min(optimiser.steps, int(saved.settings["steps"]))
    ):
        return
    if other:
        raise WeightsError(
            f"{path} was written by a run with other settings",
            expected=_told(saved.settings, other),
            got=_told(settings, other),
            fix="go on with the settings of that run, or choose another folder with --out",
        )


def _told(settings: Mapping[str, str], names: Sequence[str]) -> str:
    """Settings in a line; long ones, as a whole configuration, by their checksum."""
    told = []
    for name in names:
        value = settings.get(name, "none")
        if len(value) > MOST_TOLD:
            value = f"...{hashlib.sha256(value.encode()).hexdigest()[:8]}"
        told.append(f"{name} {value}")
    return ", ".join(told)


class _MicroBatches(Dataset):
    """Micro-batches of a stage by their numbers."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self.stage, self.seed = stage, seed

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.stage.batch(index, np.random.default_rng([self.seed, index]))


def _same(item: Any) -> Any:
    return item


def micro_batches(
    stage: Stage, seed: int, indices: range, workers: int, device: torch.device
) -> Iterator[tuple[int, Any]]:
    """Number and micro-batch, on `device`, for each of `indices`; made ahead by `workers`
    processes."""
    loader = DataLoader(
        _MicroBatches(stage, seed),
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        collate_fn=_same,
        pin_memory=device.type == "cuda",
        # Workers need neither the module's copy nor its device.
        multiprocessing_context="fork" if workers else None,
    )
    return ((index, moved(batch, device)) for index, batch in loader)


def _refuse_not_finite(name: str, step: int, losses: Mapping[str, Tensor]) -> None:
    """Raise `WeightsError`, which reports the `losses`."""
    what = "gradient" if bool(torch.isfinite(losses["total"])) else "loss"
    raise WeightsError(
        f"the {what} of {name} is not finite at step {step}",
        got={name: float(loss.detach()) for name, loss in losses.items()},
        fix="lower the rate or train in fp32; the last checkpoint is intact",
    )


class _RunningMeans:
    """Means of the losses since the last call of `take`; added up where they are computed."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: defaultdict[str, int] = defaultdict(int)

    def add(self, losses: Mapping[str, Tensor]) -> None:
        for name, value in losses.items():
            now = value.detach().double()
            self._sums[name] = self._sums[name] + now if name in self._sums else now
            self._counts[name] += 1

    def take(self, ranks: Ranks) -> dict[str, float]:
        """Means over all ranks, which call this at the same step."""
        own = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        everyone = ranks.gather(own)
        self._sums.clear()
        self._counts.clear()
        return {name: sum(means[name] for means in everyone) / ranks.size for name in own}


def _average(
    average: Mapping[str, Tensor], module: nn.Module, names: Sequence[str], decay: float
) -> None:
    """Move the averages of the weights `names` towards the module's."""
    current = dict(module.named_parameters())
    with torch.no_grad():
        torch._foreach_lerp_(
            [local(average[name]) for name in names],
            [local(current[name]) for name in names],
            1 - decay,
        )


@contextmanager
def _exchanged(
    average: Mapping[str, Tensor], module: nn.Module, names: Sequence[str]
) -> Iterator[None]:
    """Give the module the averages, if there are any, as its weights; afterwards its own again, to
    the bit."""
    current = dict(module.named_parameters())
    pairs = [(local(average[n]), local(current[n])) for n in names] if average else []

    def exchange() -> None:
        with torch.no_grad():
            for one, other in pairs:
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)

    exchange()
    try:
        yield
    finally:
        exchange()


def _step_batches(
    stage: Stage, batches: Iterator[tuple[int, Any]], accumulate: int, ranks: Ranks
) -> Iterable[tuple[int, Any]]:
    """Number and micro-batch of each part of a step, which ranks have agreed on."""
    parts = islice(batches, accumulate)
    if ranks.size == 1 or not isinstance(stage, SharedStage):
        return parts
    numbers, own = zip(*parts, strict=True)
    known = ranks.gather([stage.shared(batch) for batch in own])
    return zip(numbers, stage.agreed(own, known), strict=True)


def _checkpoints(
    folder: Path, keep: int, on_checkpoint: OnCheckpoint | None, ranks: Ranks
) -> Checkpoints | ShardedCheckpoints:
    """Writer of checkpoints: those of one process, or of several."""
    if ranks.size == 1:
        return Checkpoints(folder, keep, on_checkpoint)
    return ShardedCheckpoints(folder, keep, ranks, on_checkpoint)


def train(
    stage: Stage,
    optimiser_config: OptimiserConfig,
    run: RunConfig,
    out: Path,
    on_checkpoint: OnCheckpoint | None = None,
    progress: Progress = silent,
    start: str = "new weights",
    frozen: str | None = None,
    ranks: Ranks = ALONE,
    watch: Watch = UNWATCHED,
) -> dict[str, Tensor]:
    """Train `stage` to its last step, resuming from the newest checkpoint in `out`.

    Curves go to `out/curves` (TensorBoard). Returns the averages (EMA) of the weights that learn.
    `on_checkpoint` gets (step, averages) of every checkpoint, and when the run resumes, because the
    run may have been killed between a checkpoint and its callback. `start` names the weights that
    the run starts from, `frozen` those that do not learn; None: a checksum does. Raises
    `WeightsError` if losses or gradients are not finite again and again, or if `out` belongs to a
    run with other settings.

    `watch`: what is measured and shown meanwhile.

    `ranks`: all of them call this function with the module sharded (`Ranks.shard`). Each writes its
    shards in the background; only the first one writes all else and calls `on_checkpoint`, in
    another thread. The averages are sharded too. Raises `ConfigError` if their settings differ, and
    `MmiError` if a checkpoint could not be written.
    """
    module = stage.module
    parameter_groups(module, optimiser_config)  # freezes
    whole_step = replace(run, accumulate=run.accumulate * ranks.size)
    settings = settings_of(stage, optimiser_config, whole_step, start)
    # Checkpoints do not hold these weights.
    settings["frozen"] = frozen or checksum_of(
        (name, value) for name, value in module.named_parameters() if not value.requires_grad
    )
    ranks.check_agreement(settings)
    optimiser = make_optimiser(module, optimiser_config)
    average = {name: value.detach().clone() for name, value in learning(module).items()}
    step = 0
    if (path := ranks.gather(latest_checkpoint(out))[0]) is not None:
        saved = read_state(path)
        check_same_run(path, saved, settings, optimiser_config)
        load_checkpoint(path, module, average, optimiser)
        step = saved.step
        progress(f"{stage.name}: going on from {path}", step, optimiser_config.steps)
    if isinstance(stage, AveragedStage):
        stage.follow(average)
    parameters = list(trainable(module))
    own = [local(parameter) for parameter in parameters]
    names = [name for name, value in module.named_parameters() if value.requires_grad]
    device = parameters[0].device
    meter, losses_now, skipped = _RunningMeans(), "", 0
    first, last = (count * whole_step.accumulate for count in (step, optimiser_config.steps))
    numbers = range(first + ranks.rank, last, ranks.size)
    batches = micro_batches(stage, run.seed, numbers, run.workers, device)
    validation: Validation | None = watch.validation
    if validation is not None:
        validation.resume(step)

    def validate() -> None:
        """Measure the averages, where there are any."""
        if validation is None or not validation.due(step, optimiser_config.steps):
            return
        module.eval()
        with (
            torch.no_grad(),
            _exchanged(average if run.average else {}, module, names),
            mixed_precision(run.precision, device),
        ):
            found = validation.measure(step)
        module.train()
        curves.log({f"{stage.name}/validation/{name}": v for name, v in found.items()}, step)

    trackers: list[Tracker] = [TensorBoard(out / "curves", step)] if ranks.main else []
    if ranks.main and watch.tracker is not None:
        trackers.append(watch.tracker)
    with (
        without_norm_warnings(),
        _checkpoints(out, run.keep, on_checkpoint, ranks) as checkpoints,
        Trackers(trackers) as curves,
        profiled(out / "profile", watch.profile, ranks.rank, device) as profiled_step,
    ):
        if path is not None:
            checkpoints.report(step)
        module.train()  # the callback may have evaluated the module
        progress(stage.name, step, optimiser_config.steps)
        validate()
        while step < optimiser_config.steps:
            rate = set_rate(optimiser, optimiser_config, step)
            for part, (index, batch) in enumerate(
                _step_batches(stage, batches, run.accumulate, ranks), 1
            ):
                ranks.reduce_gradients(module, part == run.accumulate)
                draws = np.random.default_rng([run.seed, index, 1])
                torch.manual_seed(int(draws.integers(2**62)))
                with mixed_precision(run.precision, device):
                    losses = stage.losses(batch)
                (losses["total"] / run.accumulate).backward()
                meter.add(losses)
            # The norm over all ranks, so that all of them take or leave out a step.
            show_gradients(parameters)
            norm = ranks.gradient_norm(own)
            torch.nn.utils.clip_grads_with_norm_(own, optimiser_config.clip, norm)
            meter.add({"gradient_norm": norm})
            step += 1
            if bool(torch.isfinite(norm)):
                skipped = 0
                optimiser.step()
                # A short average while the run is young.
                _average(average, module, names, min(run.average, step / (step + 10)))
            elif (skipped := skipped + 1) > run.most_skipped:
                _refuse_not_finite(stage.name, step - 1, losses)
            optimiser.zero_grad(set_to_none=True)
            module.zero_grad(set_to_none=True)
            if step % run.log_every == 0 or step == optimiser_config.steps:
                means = meter.take(ranks)
                values = {f"{stage.name}/{name}": value for name, value in means.items()}
                curves.log({**values, f"{stage.name}/rate": rate}, step)
                losses_now = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
                checkpoints.check()
            progress(stage.name, step, optimiser_config.steps, detail=losses_now)
            profiled_step()
            validate()
            if step % run.checkpoint_every == 0 or step == optimiser_config.steps:
                state = RunState(step, settings)
                best = None
                if validation is not None:
                    best = validation.best(run.checkpoint_every, optimiser_config.steps)
                checkpoints.save(module, average, optimiser, state, best)
                module.train()  # the callback may have evaluated the module
    module.eval()
    return average
