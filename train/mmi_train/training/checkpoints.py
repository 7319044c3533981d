"""Checkpoints that survive being killed: a folder appears whole or not at all, and says all there
is.

A checkpoint folder `step-00001200/` holds `model.safetensors`, `average.safetensors` (the averaged
weights), `moments.safetensors` (AdamW's two moments) and `state.json`. Random draws are keyed by
(seed, step), so nothing else is needed to go on exactly as if the run had never stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmi_deploy.errors import WeightsError

_PREFIX = "step-"


@dataclass(frozen=True)
class RunState:
    """Where a run stands: optimiser steps done, and a fingerprint of the settings it was begun
    with."""

    step: int
    fingerprint: str


def _moments(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {value: name for name, value in model.named_parameters()}
    moments = {}
    for parameter, state in optimiser.state.items():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            moments[f"{names[parameter]}:{key}"] = torch.as_tensor(state[key])
    return moments


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in state.items()}


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    average: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
    progress: RunState,
    keep: int,
) -> Path:
    """Write `folder/step-N` atomically and remove all but the `keep` newest. Returns its path."""
    target = folder / f"{_PREFIX}{progress.step:08d}"
    scratch = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        save_file(_contiguous(model.state_dict()), scratch / "model.safetensors")
        save_file(_contiguous(average), scratch / "average.safetensors")
        save_file(_contiguous(_moments(model, optimiser)), scratch / "moments.safetensors")
        (scratch / "state.json").write_text(json.dumps(progress.__dict__) + "\n")
        for path in scratch.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if target.exists():
            shutil.rmtree(target)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for old in sorted(_folders(folder))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for leftover in folder.glob(f".{_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return target


def _folders(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob(f"{_PREFIX}*") if (path / "state.json").is_file())


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, if any."""
    return max(_folders(folder), default=None)


def load_checkpoint(
    path: Path,
    model: nn.Module,
    average: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
    fingerprint: str,
) -> int:
    """Restore everything in place and return the number of steps done.

    Raises `WeightsError` when the run was begun with other settings.
    """
    progress = RunState(**json.loads((path / "state.json").read_text()))
    if progress.fingerprint != fingerprint:
        raise WeightsError(
            f"{path} was written by a run with other settings",
            expected=fingerprint,
            got=progress.fingerprint,
            fix="go on with the settings of that run, or choose another folder with --out",
        )
    model.load_state_dict(load_file(path / "model.safetensors"))
    optimiser.state.clear()
    for name, value in load_file(path / "average.safetensors").items():
        average[name].copy_(value)
    moments = load_file(path / "moments.safetensors")
    for name, parameter in model.named_parameters():
        if f"{name}:step" in moments:
            optimiser.state[parameter] = {
                "step": moments[f"{name}:step"],
                "exp_avg": torch.empty_like(parameter).copy_(moments[f"{name}:exp_avg"]),
                "exp_avg_sq": torch.empty_like(parameter).copy_(moments[f"{name}:exp_avg_sq"]),
            }
    return progress.step
