"""Atomic training checkpoints: a killed run resumes exactly from the newest complete one.

A checkpoint folder `step-00001200/` holds what the run changes: the weights that learn, their
exponential moving average, AdamW's two moments, and `state.json` with the settings. One process
writes the tensors to `model`, `average` and `moments.safetensors`; several ranks write their shards
(`sharded_checkpoints`). Any number of ranks reads either, each its rows. Frozen weights are the
start's, which the settings name. Random draws are keyed by (seed, step), so a resumed run needs no
other state.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmi_deploy.errors import MmiError, WeightsError
from mmi_deploy.system.output_folder import new_folder, remove_folder
from mmi_train.training.ranks import local, own_rows, shard_of
from mmi_train.weights.lazy_tensor import InFile, Shards, StoredRows
from mmi_train.weights.model_folder import Typed
from mmi_train.weights.safetensors_files import read_safetensors

_NAME = re.compile(r"step-\d{8,}")
_KIND = "checkpoint"
_STATE = "state.json"

# Kinds of tensors, and the beginnings of their names in the files of several ranks.
KINDS = ("model", "average", "moments")

# Files that several ranks write, and the entry of their headers which says where a shard begins.
_SHARDS = "shard-*.safetensors"
_PLACES = "DCP_SHARDING_INFO"


@dataclass(frozen=True)
class RunState:
    """State of a run: optimiser steps done, and the settings that decide its weights, by name."""

    step: int
    settings: Mapping[str, str]


# Receiver of a checkpoint's step and averages.
OnCheckpoint = Callable[[int, Mapping[str, StoredRows]], None]


def _moments(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state of every parameter, under `<parameter>:<key>`."""
    moments = {}
    for name, parameter in model.named_parameters():
        if (state := optimiser.state.get(local(parameter))) is None:
            continue
        for key in ("exp_avg", "exp_avg_sq"):
            moments[f"{name}:{key}"] = shard_of(parameter, state[key])
        moments[f"{name}:step"] = torch.as_tensor(state["step"])
    return moments


def learning(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that learn and stored buffers of a model, by name; nothing of frozen parameters,
    whose quantised forms have a state of several tensors."""
    own = {name for name, value in model.named_parameters() if value.requires_grad}
    own |= {name for name, _ in model.named_buffers()}
    return {name: value for name, value in model.state_dict().items() if name in own}


def tensors_of(
    model: nn.Module, average: Mapping[str, Tensor], optimiser: torch.optim.Optimizer
) -> dict[str, dict[str, Tensor]]:
    """Tensors of a checkpoint by kind (`KINDS`) and name, this rank's shards of them."""
    found = (learning(model), average, _moments(model, optimiser))
    return {
        kind: {name: shard_of(value, local(value).detach()) for name, value in tensors.items()}
        for kind, tensors in zip(KINDS, found, strict=True)
    }


class Checkpoints:
    """Writer of the checkpoints of one process, as `ShardedCheckpoints` is that of several."""

    def __init__(self, folder: Path, keep: int, on_checkpoint: OnCheckpoint | None) -> None:
        self._folder, self._keep, self._on_checkpoint = folder, keep, on_checkpoint

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is under way."""

    def save(
        self,
        model: nn.Module,
        average: Mapping[str, Tensor],
        optimiser: torch.optim.Optimizer,
        state: RunState,
        best: int | None = None,
    ) -> None:
        """Write a checkpoint and hand its averages to `on_checkpoint`."""
        save_checkpoint(self._folder, model, average, optimiser, state, self._keep, best)
        self.report(state.step)

    def report(self, step: int) -> None:
        """Hand the averages of the checkpoint of `step` to `on_checkpoint` again."""
        if self._on_checkpoint is not None:
            self._on_checkpoint(step, read_checkpoint(path_of(self._folder, step))["average"])

    def check(self) -> None:
        """Nothing is under way that could have failed."""


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    average: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    state: RunState,
    keep: int,
    best: int | None = None,
) -> Path:
    """Write `folder/step-N` atomically in one process, and prune. Returns its path."""
    with new_checkpoint(folder, state) as scratch:
        for kind, tensors in tensors_of(model, average, optimiser).items():
            whole = {name: value.contiguous() for name, value in tensors.items()}
            save_file(whole, scratch / f"{kind}.safetensors")
    prune(folder, keep, best)
    return path_of(folder, state.step)


@contextmanager
def new_checkpoint(folder: Path, state: RunState) -> Iterator[Path]:
    """Folder that is filled in a `with` block and then takes its place as `folder/step-N`, whole,
    on the disk, and with `state`."""
    with new_folder(path_of(folder, state.step), None, kind=_KIND) as scratch:
        yield scratch
        (scratch / _STATE).write_text(json.dumps(asdict(state), indent=2) + "\n")
        for path in scratch.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Remove all checkpoints but the `keep` newest, that of step `best`, and those to which
    somebody has added something."""
    for old in _folders(folder)[:-keep]:
        if best is not None and old == path_of(folder, best):
            continue
        with suppress(MmiError):
            remove_folder(old)


def path_of(folder: Path, step: int) -> Path:
    """Place of the checkpoint of `step`."""
    return folder / f"step-{step:08d}"


def _folders(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, the newest last."""
    found = (path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))
    complete = (path for path in found if (path / _STATE).is_file())
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, if any."""
    return next(reversed(_folders(folder)), None)


def read_state(path: Path) -> RunState:
    """Read a checkpoint's state. Raises `WeightsError` for a damaged one."""
    try:
        found = json.loads((path / _STATE).read_text())
        return RunState(int(found["step"]), dict(found["settings"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"the state of the checkpoint {path} cannot be read ({type(error).__name__})",
            fix="remove that folder; the run goes on from the checkpoint before it",
        ) from None


def read_checkpoint(path: Path) -> dict[str, dict[str, StoredRows]]:
    """Tensors of a checkpoint by kind and name, read when they are asked for. Raises
    `WeightsError` for damaged files and missing shards."""
    if not (files := sorted(path.glob(_SHARDS))):
        return {kind: {**read_safetensors(path / f"{kind}.safetensors")} for kind in KINDS}
    parts: defaultdict[str, dict[int, InFile]] = defaultdict(dict)
    for file in files:
        stored = read_safetensors(file)
        for name, start in _first_rows(file).items():
            if name in stored and stored[name].shape.numel():  # a rank may have no rows of it
                parts[name][start] = stored[name]
    found: dict[str, dict[str, StoredRows]] = {kind: {} for kind in KINDS}
    for name, shards in parts.items():
        kind, _, own = name.partition(":")
        row = 0
        for start, part in sorted(shards.items()):
            if start != row:
                raise WeightsError(
                    f"{path} lacks the rows {row} to {start} of {own}",
                    fix="bring back the files of all ranks, or remove that folder",
                )
            row += part.shape[0] if part.shape else 1
        ordered = [shards[start] for start in sorted(shards)]
        found[kind][own] = ordered[0] if len(ordered) == 1 else Shards(ordered)
    return found


def _first_rows(file: Path) -> dict[str, int]:
    """First row of each shard in a file, as `torch.distributed.checkpoint` notes it there."""
    with safe_open(file, framework="numpy") as opened:
        noted = (opened.metadata() or {}).get(_PLACES, "{}")
    try:
        places = {name: entry["saved_offsets"] for name, entry in json.loads(noted).items()}
        return {name: int(place[0]) if place else 0 for name, place in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{file} does not say which rows it holds ({type(error).__name__})",
            fix="remove the folder of that checkpoint; the run goes on from the one before it",
        ) from None


def load_checkpoint(
    path: Path,
    model: nn.Module,
    average: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
) -> None:
    """Restore a checkpoint in place; each rank reads its rows. Raises `WeightsError` for a
    checkpoint of another model."""
    found = read_checkpoint(path)
    moments = found["moments"]
    for kind, own in (("model", learning(model)), ("average", average)):
        if _shapes(found[kind]) != _shapes(own):
            raise WeightsError(f"{path} holds other weights than those that learn in this run")
        with torch.no_grad():
            for name, value in own.items():
                local(value).copy_(own_rows(found[kind][name], value))
    optimiser.state.clear()
    for name, parameter in model.named_parameters():
        if f"{name}:step" in moments:
            optimiser.state[local(parameter)] = {
                "step": moments[f"{name}:step"].read().to(parameter.device),
                **{
                    key: torch.empty_like(local(parameter)).copy_(
                        own_rows(moments[f"{name}:{key}"], parameter)
                    )
                    for key in ("exp_avg", "exp_avg_sq")
                },
            }


def _shapes(state: Mapping[str, Typed]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}
