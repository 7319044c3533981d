"""Atomic training checkpoints: a killed run resumes exactly from the newest complete one.

A checkpoint folder `step-00001200/` holds `model.safetensors`, `average.safetensors` (the
exponential moving average of the weights), `moments.safetensors` (AdamW's two moments) and
`state.json`. Random draws are keyed by (seed, step), so a resumed run needs no other state.
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
    """State of a run: optimiser steps done, and the fingerprint of its settings."""

    step: int
    fingerprint: str


def _moments(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state of every parameter, under `<parameter>:<key>`."""
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
    state: RunState,
    keep: int,
) -> Path:
    """Write `folder/step-N` atomically and remove all but the `keep` newest. Returns its path."""
    target = folder / f"{_PREFIX}{state.step:08d}"
    scratch = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        save_file(_contiguous(model.state_dict()), scratch / "model.safetensors")
        save_file(_contiguous(average), scratch / "average.safetensors")
        save_file(_contiguous(_moments(model, optimiser)), scratch / "moments.safetensors")
        (scratch / "state.json").write_text(json.dumps(state.__dict__) + "\n")
        for path in scratch.iterdir():  # on disk before the rename makes the folder visible
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
    """The complete checkpoints of `folder`."""
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
    """Restore model, average and optimiser in place and return the number of steps done.

    Raises `WeightsError` if the checkpoint is from a run with other settings.
    """
    saved = RunState(**json.loads((path / "state.json").read_text()))
    if saved.fingerprint != fingerprint:
        raise WeightsError(
            f"{path} was written by a run with other settings",
            expected=fingerprint,
            got=saved.fingerprint,
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
    return saved.step
