"""Ranks: processes that train one model together, as `torchrun` starts them.

Parameters, gradients and moments are sharded over the ranks (FSDP2), and each rank computes its own
micro-batches. The processes talk through gloo on CPUs and NCCL on GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import mmi_deploy
from mmi_deploy.errors import ConfigError, MmiError
from mmi_train.model.llama import Block, GatedMmfs
from mmi_train.model.unet import UNet
from mmi_train.weights.lazy_tensor import StoredRows

# A rank may wait for others that load a model, draw samples or write a checkpoint.
PATIENCE = timedelta(hours=2)

# Attribute of a sharded tensor that holds what `local` returned.
_PART = "_part_of_this_rank"

# Characters of a setting's value that an error shows.
_MOST_TOLD = 40


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run as one of them sees them; without a mesh the process trains alone.

    All ranks must call `gather`, `check_agreement` and `shard` in the same order. `writers`: group
    in which they talk on CPUs meanwhile, in another thread.
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    writers: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """True for the rank that writes files and reports progress."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, in their order."""
        if self.mesh is None:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def check_agreement(self, settings: Mapping[str, str]) -> None:
        """Raise `ConfigError`, which names the differences, unless all ranks have these settings
        and run the same code."""
        versions = {"mmi_deploy": mmi_deploy.__version__, "torch": str(torch.__version__)}
        everyone = self.gather({**settings, **versions})
        for rank, other in enumerate(everyone):
            names = sorted({*everyone[0], *other})
            if differing := [n for n in names if everyone[0].get(n) != other.get(n)]:
                raise ConfigError(
                    f"ranks 0 and {rank} disagree",
                    expected=_told(everyone[0], differing),
                    got=_told(other, differing),
                    fix="start all ranks with the same command, files and versions",
                )

    def shard(self, module: nn.Module) -> None:
        """Shard the parameters of `module` over the ranks, in place, and move it to their device;
        those on the meta device stay there, to be filled by the rows of each rank.

        Units (`sharded_units`): the MMFS layers of the LLM, whose values are computed beside their
        calls, its blocks, the U-Net as a whole, because parts of its layers are called from outside
        of them, and the rest. Quantised weights, which no
        arithmetic can cut, stay whole on every rank. Parameters that learn must have one type.
        """
        if self.mesh is None:
            return
        parameters = list(module.parameters())
        for parameter in parameters:
            if not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
        whole = {parameter for parameter in parameters if not parameter.is_floating_point()}
        for part in sharded_units(module):
            fully_shard(part, mesh=self.mesh, ignored_params=whole)
            if isinstance(part, GatedMmfs):
                register_fsdp_forward_method(part, "values")

    def reduce_gradients(self, module: nn.Module, now: bool) -> None:
        """Let the next backward pass average gradients over the ranks, or only add them up."""
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(now)

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """Keep whole parameters on every rank, for calls beside the forward pass of `module`, which
        must have run before."""
        units = [part for part in module.modules() if isinstance(part, FSDPModule)]
        for unit in units:
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.reshard()

    def gradient_norm(self, own: Sequence[Tensor]) -> Tensor:
        """Norm of the gradients of all ranks; own: this rank's parts of the parameters."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in own if p.grad is not None])
        if self.mesh is None:
            return norm
        squared = norm.to(self.mesh.device_type).square()
        dist.all_reduce(squared, group=self.mesh.get_group())
        return squared.sqrt()


ALONE = Ranks()


def sharded_units(module: nn.Module) -> list[nn.Module]:
    """Parts of `module` whose parameters are gathered and given up again together, in the order in
    which they are sharded: each has the parameters that no part before it has; the last one is the
    module itself."""
    parts = list(module.modules())
    found = [
        part
        for kind in (GatedMmfs, Block, UNet)
        for part in parts
        if isinstance(part, kind) and part is not module
    ]
    return [*found, module]


def _told(settings: Mapping[str, str], names: list[str]) -> str:
    """Settings in a line, the beginnings of long ones."""
    return ", ".join(f"{name} {settings.get(name, 'none')[:_MOST_TOLD]}" for name in names)


@torch.no_grad()
def local(value: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded, in the same memory; of a parameter the same
    object at every call.

    The optimiser works on these, because operators on long lists of sharded tensors take seconds.
    """
    if not isinstance(value, DTensor):
        return value
    if (part := value.__dict__.get(_PART)) is None:
        part = value.to_local().detach()
        setattr(value, _PART, part)
    return part


def show_gradients(parameters: Iterable[Tensor]) -> None:
    """Give each part that `local` returns its part of the gradient."""
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            gradient = parameter.grad
            local(parameter).grad = None if gradient is None else local(gradient)


def shard_of(other: Tensor, part: Tensor) -> Tensor:
    """The tensor whose parts on the ranks are `part`, sharded as `other` is."""
    if not isinstance(other, DTensor):
        return part
    return DTensor.from_local(
        part,
        other.device_mesh,
        other.placements,
        run_check=False,
        shape=other.shape,
        stride=other.stride(),
    )


def own_rows(source: StoredRows, other: Tensor) -> Tensor:
    """Read from `source` what `local` returns of `other`, which may be sharded: those rows."""
    if not isinstance(other, DTensor):
        return source.read()
    rows, most = other.shape[0], -(-other.shape[0] // other.device_mesh.size())
    start = min(most * other.device_mesh.get_local_rank(), rows)
    return source.read_rows(start, min(start + most, rows))


@contextmanager
def joined_ranks(device: str = "auto", rendezvous: str | None = None) -> Iterator[Ranks]:
    """Join the other processes that `torchrun` started, or train alone without it.

    device: `cpu`, `cuda` or `auto`, as `device_called` takes it; each rank takes the GPU of its
    number on the machine. rendezvous: URL where the ranks meet; None: where `torchrun` says. If
    another rank ends, the block ends with `MmiError`.
    """
    size, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    if size == 1:
        yield ALONE
        return
    kind = "cpu" if device == "cpu" or not torch.cuda.is_available() else "cuda"
    if kind == "cuda":
        own, found = _number("LOCAL_RANK", rank), torch.cuda.device_count()
        if own >= found:
            raise ConfigError(
                "there are more ranks than GPUs on this machine",
                got=f"{found} GPUs",
                fix=f"give torchrun --nproc_per_node {found}",
            )
        torch.cuda.set_device(own)
    with _lost_ranks():
        try:
            dist.init_process_group(
                "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl",
                init_method=rendezvous,
                rank=rank,
                world_size=size,
                timeout=PATIENCE,
            )
        except ValueError as error:
            raise ConfigError(f"the ranks cannot meet: {error}", fix="start by torchrun") from None
        writers = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Ranks(rank, size, init_device_mesh(kind, (size,)), writers)
        dist.destroy_process_group()


@contextmanager
def _lost_ranks() -> Iterator[None]:
    """Convert the errors of a lost connection to `MmiError`."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise MmiError(
            "another rank of this run has ended, and so does this one",
            fix="see why in its own message; the same command resumes from the last checkpoint",
        ) from None


def _number(name: str, default: int) -> int:
    """An integer of the environment. Raises `ConfigError`."""
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"the environment variable {name} is no number", got=text, fix="unset it, or torchrun"
        ) from None
