"""Atomic training checkpoints: a killed run resumes exactly from the newest complete one.

A checkpoint folder `step-00001200/` holds what the run changes: `model.safetensors` (the weights
that learn), `average.safetensors` (their exponential moving average), `moments.safetensors`
(AdamW's two moments) and `state.json` with the settings. Frozen weights are the start's, whose
checksum is among the settings. Random draws are keyed by (seed, step), so a resumed run needs no
other state.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmi_deploy.errors import MmiError, WeightsError
from mmi_deploy.system.output_folder import new_folder, remove_folder
from mmi_train.training.ranks import ALONE, Ranks, local, shard_of, sharded_as
from mmi_train.weights.safetensors_files import load_tensors

_NAME = re.compile(r"step-\d{8,}")
_KIND = "checkpoint"


@dataclass(frozen=True)
class RunState:
    """State of a run: optimiser steps done, and the settings that decide its weights, by name."""

    step: int
    settings: Mapping[str, str]


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


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in state.items()}


def learning(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that learn and stored buffers of a model, by name; nothing of frozen parameters,
    whose quantised forms have a state of several tensors."""
    own = {name for name, value in model.named_parameters() if value.requires_grad}
    own |= {name for name, _ in model.named_buffers()}
    return {name: value for name, value in model.state_dict().items() if name in own}


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    average: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
    state: RunState,
    keep: int,
    ranks: Ranks = ALONE,
    best: int | None = None,
) -> Path:
    """Write `folder/step-N` atomically and remove all but the `keep` newest, that of step `best`,
    and those to which somebody has added something. Returns its path. The first of several ranks
    writes what one process would write."""
    target = folder / _name(state.step)
    with new_folder(target, None, kind=_KIND) if ranks.main else nullcontext() as scratch:
        for name, part in (
            ("model", learning(model)),
            ("average", average),
            ("moments", _moments(model, optimiser)),
        ):
            whole = ranks.whole(part)
            if scratch is not None:
                save_file(_contiguous(whole), scratch / f"{name}.safetensors")
        if scratch is None:
            return target
        (scratch / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n")
        for path in scratch.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for old in _folders(folder)[:-keep]:
        if old.name == _name(best):
            continue
        with suppress(MmiError):
            remove_folder(old)
    return target


def _name(step: int | None) -> str:
    return "" if step is None else f"step-{step:08d}"


def _folders(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, the newest last."""
    found = (path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))
    complete = (path for path in found if (path / "state.json").is_file())
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, if any."""
    return next(reversed(_folders(folder)), None)


def read_state(path: Path) -> RunState:
    """Read a checkpoint's state. Raises `WeightsError` for a damaged one."""
    try:
        found = json.loads((path / "state.json").read_text())
        return RunState(int(found["step"]), dict(found["settings"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"the state of the checkpoint {path} cannot be read ({type(error).__name__})",
            fix="remove that folder; the run goes on from the checkpoint before it",
        ) from None


def load_checkpoint(
    path: Path,
    model: nn.Module,
    average: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
) -> None:
    """Restore what `save_checkpoint` wrote in place, on any number of ranks. Raises `WeightsError`
    for a checkpoint of another model."""
    state, means = (load_tensors(path / f"{name}.safetensors") for name in ("model", "average"))
    for held, own in ((state, learning(model)), (means, average)):
        if _shapes(held) != _shapes(own):
            raise WeightsError(f"{path} holds other weights than those that learn in this run")
        with torch.no_grad():
            for name, value in held.items():
                own[name].copy_(sharded_as(value, own[name]))
    optimiser.state.clear()
    moments = load_tensors(path / "moments.safetensors")
    for name, parameter in model.named_parameters():
        if f"{name}:step" in moments:
            optimiser.state[local(parameter)] = {
                "step": moments[f"{name}:step"].to(parameter.device),
                **{
                    key: torch.empty_like(local(parameter)).copy_(
                        local(sharded_as(moments[f"{name}:{key}"], parameter))
                    )
                    for key in ("exp_avg", "exp_avg_sq")
                },
            }


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}
