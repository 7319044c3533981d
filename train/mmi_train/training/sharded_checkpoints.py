"""Checkpoints of several ranks: each writes its shards in the background, training goes on.

`torch.distributed.checkpoint` copies the shards of a rank into host memory, and a thread writes
that copy as safetensors, with the first row of each shard in the header. When all ranks have
written, the first one gives the folder its state and its name, and hands the averages, joined from
the files, to `on_checkpoint`. At most one checkpoint is under way.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter, async_save
from torch.distributed.checkpoint.api import CheckpointException

from mmi_deploy.errors import MmiError
from mmi_train.training.checkpoints import (
    OnCheckpoint,
    RunState,
    new_checkpoint,
    path_of,
    prune,
    read_checkpoint,
    tensors_of,
)
from mmi_train.training.ranks import Ranks, local

# Bytes of a rank's shards after which it begins another file: each is made in memory, whole.
FILE_BYTES = 1 << 30


class ShardedCheckpoints:
    """Writer of the checkpoints of several ranks, all of which call all methods.

    A context manager: at its end the checkpoint that is under way is whole, also after an error.
    """

    def __init__(
        self, folder: Path, keep: int, ranks: Ranks, on_checkpoint: OnCheckpoint | None
    ) -> None:
        self._folder, self._keep, self._ranks = folder, keep, ranks
        self._on_checkpoint = on_checkpoint
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._under_way: Future[None] | None = None

    def __enter__(self) -> ShardedCheckpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(wait=True)
        if kind is None:
            self._finish()

    def save(
        self,
        model: nn.Module,
        average: Mapping[str, Tensor],
        optimiser: torch.optim.Optimizer,
        state: RunState,
        best: int | None = None,
    ) -> None:
        """Copy this rank's shards and begin to write them. Waits for the checkpoint before. Raises
        `MmiError` where that one could not be written."""
        self._finish()
        with ExitStack() as stack:
            scratch = None
            if self._ranks.main:
                scratch = stack.enter_context(new_checkpoint(self._folder, state))
            place = self._ranks.gather(scratch)[0]
            tensors = {
                f"{kind}:{name}": value
                for kind, own in tensors_of(model, average, optimiser).items()
                for name, value in own.items()
            }
            written = async_save(
                tensors,
                storage_writer=HuggingFaceStorageWriter(
                    str(place), _files(tensors), save_distributed=True
                ),
                process_group=self._ranks.writers,
            )
            assert isinstance(written, Future)
            self._under_way = self._thread.submit(
                self._complete, written, stack.pop_all(), state.step, best
            )

    def report(self, step: int) -> None:
        """Hand the averages of the checkpoint of `step` to `on_checkpoint` again."""
        self._under_way = self._thread.submit(self._hand_over, step)

    def check(self) -> None:
        """Raise `MmiError` if the checkpoint under way has failed; does not wait for it."""
        own = self._under_way
        failed = own is not None and own.done() and own.exception() is not None
        if any(self._ranks.gather(failed)):
            self._finish()

    def _complete(
        self, written: Future[object], folder: ExitStack, step: int, best: int | None
    ) -> None:
        with folder:
            written.result()
        if self._ranks.main:
            prune(self._folder, self._keep, best)
        self._hand_over(step)

    def _hand_over(self, step: int) -> None:
        if self._ranks.main and self._on_checkpoint is not None:
            found = read_checkpoint(path_of(self._folder, step))
            self._on_checkpoint(step, found["average"])

    def _finish(self) -> None:
        """Wait for the checkpoint under way. All ranks raise if one of them failed."""
        error = None
        if self._under_way is not None:
            error = self._under_way.exception()
            self._under_way = None
        told = self._ranks.gather(None if error is None else _reason(error))
        if isinstance(error, MmiError):
            raise error
        for reason in told:
            if reason is not None:
                raise MmiError(
                    f"a checkpoint could not be written: {reason}",
                    fix="make room in OUT; the same command resumes from the last checkpoint",
                ) from error


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Number of the file, from 1 on, to which each tensor of a rank goes."""
    found: dict[str, int] = {}
    number, size = 1, 0
    for name, value in tensors.items():
        own = local(value)
        size += own.numel() * own.dtype.itemsize
        if size > FILE_BYTES and found:
            number, size = number + 1, own.numel() * own.dtype.itemsize
        found[name] = number
    return found


def _reason(error: BaseException) -> str:
    """The reason of an error in a line, with the rank where one of several failed."""
    if isinstance(error, CheckpointException):
        rank, (inner, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_reason(inner)}"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return " ".join(str(error).split()) or type(error).__name__
