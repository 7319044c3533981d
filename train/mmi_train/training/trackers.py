"""Trackers of a run's curves: TensorBoard always, Weights & Biases or trackio where asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from torch.utils.tensorboard import SummaryWriter

from mmi_deploy.errors import MmiError

TrackerName = Literal["wandb", "trackio"]


class Tracker(Protocol):
    """Receiver of named values of a step."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take values of `step`, which never decreases."""

    def close(self) -> None:
        """End the run and write what is left."""


class TensorBoard:
    """Curves in `folder`; those of a run that was broken off are cut at `step`."""

    def __init__(self, folder: Path, step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Service:
    """Weights & Biases or trackio, which have the same calls. The name of the run is that of its
    folder, and a run that resumes goes on under it."""

    def __init__(self, name: TrackerName, out: Path, settings: Mapping[str, object]) -> None:
        try:
            self._library: Any = import_module(name)
        except ImportError:
            raise MmiError(
                f"the tracker {name} is not installed", fix=f"install it with: pip install {name}"
            ) from None
        own = out.resolve().name
        more: dict[str, Any] = {"resume": "allow"}
        if name == "wandb":
            more |= {"id": own, "dir": str(out)}
        self._library.init(project="mmi", name=own, config=dict(settings), **more)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._library.log(dict(values), step=step)

    def close(self) -> None:
        self._library.finish()


def service(name: TrackerName, out: Path, settings: Mapping[str, object]) -> Tracker:
    """Begin a run of the folder `out` at a tracker. Raises `MmiError` if it is not installed."""
    return _Service(name, out, settings)


class Trackers:
    """Several trackers as one; closed at the end of the block."""

    def __init__(self, parts: Sequence[Tracker]) -> None:
        self._parts = parts

    def log(self, values: Mapping[str, float], step: int) -> None:
        for part in self._parts:
            part.log(values, step)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *error: object) -> None:
        for part in self._parts:
            part.close()
