"""Mapping of published state dicts to our modules, strict: every tensor is accounted for.

`plan_state` compares names, shapes and types, and plans the source of each of our tensors. The plan
converts a whole state dict in memory (`convert_state`), or lazily, from files, one tensor at a time
(`Plan.lazy_tensors`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from mmi_deploy.errors import WeightsError
from mmi_deploy.parity import CONSTANT_TOLERANCES, compare
from mmi_train.checkpoint_import.misfits import misfits
from mmi_train.checkpoint_import.published import (
    RELEASED_SKIPS,
    DerivedConstant,
    published_name,
    rename,
)
from mmi_train.checkpoint_import.published.vision import POSITION_IDS, POSITION_TABLE
from mmi_train.model.unet import UNet
from mmi_train.model.vit_adapter import resize_positions
from mmi_train.weights.lazy_tensor import InMemory, Reshaped, StoredTensor
from mmi_train.weights.model_folder import kind_of

Module = TypeVar("Module", bound=nn.Module)

_NOT_FINITE = "{} holds NaN or infinity"


class TensorLike(Protocol):
    """Shape and type of a tensor, in memory or in a file: all that planning reads."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class Source:
    """Source of one of our tensors: its published `name`, and our `shape`. `grid`: patches per side
    to which CLIP's position table is resized; None for every other tensor."""

    name: str
    shape: torch.Size
    grid: int | None = None

    def convert(self, value: Tensor) -> Tensor:
        """Resize and reshape the published tensor to ours."""
        resized = value if self.grid is None else resize_positions(value, self.grid)
        return resized.reshape(self.shape)


@dataclass(frozen=True)
class Plan:
    """Sources by our name, and expected values of derived constants by published name."""

    sources: dict[str, Source]
    constants: dict[str, Tensor]

    def check_constants(self, read: Callable[[str], Tensor]) -> list[str]:
        """Messages about derived constants with other values; `read` takes published names."""
        return [
            _NOT_FINITE.format(name)
            if not _finite(value)
            else f"{name} differs from the values that the configuration gives"
            for name, expected in self.constants.items()
            if not _finite(value := read(name)) or not _equal(value, expected)
        ]

    def lazy_tensors(self, published: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Our tensors by name, still in the files of `published`, in the order of `published`.

        Raises `WeightsError` when a derived constant has other values.
        """
        if problems := self.check_constants(lambda name: published[name].read()):
            raise _misfit(problems)
        order = {name: index for index, name in enumerate(published)}
        sources = sorted(self.sources.items(), key=lambda item: order[item[1].name])
        found: dict[str, StoredTensor] = {}
        for name, source in sources:
            if source.grid is None:
                found[name] = Reshaped(published[source.name], source.shape)
            else:
                found[name] = InMemory(source.convert(published[source.name].read()))
        return found


def _misfit(problems: list[str]) -> WeightsError:
    return WeightsError("the weights do not fit the configuration: " + "; ".join(problems))


def plan_state(module: nn.Module, published: Mapping[str, TensorLike]) -> Plan:
    """Plan the source of every tensor of the whole model `module`, which may be on the meta device.

    Raises `WeightsError` that names every tensor which is missing, unknown, misshapen or of another
    kind. Shapes may differ by leading dimensions of one, and CLIP's position table may be that of
    another image size: it is resized, as the published code does for 448 pixels.
    """
    plan, problems = _plan(module, published, theirs="", ours="")
    if problems:
        raise _misfit(problems)
    return plan


def convert_state(
    module: nn.Module, published: Mapping[str, Tensor], *, theirs: str = "", ours: str = ""
) -> dict[str, Tensor]:
    """Convert `published` tensors to the state dict of `module`, the model or a part of it.

    theirs, ours: prefixes that complete the names of `published` and of `module` to names of the
    whole model. Raises `WeightsError` as `plan_state` does, and for tensors that are
    not finite and derived constants of other values than the configuration gives.
    """
    plan, problems = _plan(module, published, theirs, ours)
    taken = [source.name for source in plan.sources.values()]
    problems += [_NOT_FINITE.format(name) for name in taken if not _finite(published[name])]
    problems += plan.check_constants(lambda name: published[name])
    if problems:
        raise _misfit(problems)
    return {name: src.convert(published[src.name]) for name, src in plan.sources.items()}


def published_module(
    build: Callable[[], Module],
    published: Mapping[str, Tensor],
    *,
    theirs: str = "",
    ours: str = "",
) -> Module:
    """Build a module and load the weights `published`, in evaluation mode.

    Names and shapes are checked before memory is allocated. theirs, ours: see `convert_state`.
    """
    with torch.device("meta"):
        module = build()
    state = convert_state(module, published, theirs=theirs, ours=ours)
    own = module.state_dict()
    module.load_state_dict(
        {name: value.to(own[name].dtype) for name, value in state.items()}, assign=True
    )
    return module.eval()


def _plan(
    module: nn.Module, published: Mapping[str, TensorLike], theirs: str, ours: str
) -> tuple[Plan, list[str]]:
    """The plan of all tensors that fit, and messages about the others."""
    planner = _Planner(module, published, theirs, ours)
    for name in published:
        planner.add(name)
    return planner.plan, planner.problems()


class _Planner:
    """A plan while it is made: each published tensor becomes a source, a constant or a misfit."""

    def __init__(
        self, module: nn.Module, published: Mapping[str, TensorLike], theirs: str, ours: str
    ) -> None:
        self.published, self.theirs, self.ours = published, theirs, ours
        self.own, self.buffers = module.state_dict(), dict(module.named_buffers())
        self.skips = _skips(module)
        self.grids = self._resized_grids()
        self.plan = Plan({}, {})
        self.unknown: list[str] = []
        self.wrong: list[str] = []

    def add(self, name: str) -> None:
        """Plan the published tensor `name`."""
        try:
            found = rename(self.theirs + name, self.skips)
        except WeightsError:
            self.unknown.append(name)
            return
        derived = isinstance(found, DerivedConstant)
        target = found.buffer if isinstance(found, DerivedConstant) else found
        target = target.removeprefix(self.ours) if target.startswith(self.ours) else ""
        if derived and target in self.buffers:
            self._add_constant(name, target)
        elif not derived and target in self.own and target not in self.plan.sources:
            self._add_source(name, target)
        else:
            self.unknown.append(name)

    def _add_constant(self, name: str, target: str) -> None:
        expected = self.buffers[target]
        if target == POSITION_IDS.removeprefix(self.ours):
            ids = expected.numel() if self.grids is None else 1 + self.grids.given**2
            expected = torch.arange(ids, device="cpu")
        if problem := _shape_problem(name, self.published[name].shape, expected.shape):
            self.wrong.append(problem)
        else:
            self.plan.constants[name] = expected

    def _add_source(self, name: str, target: str) -> None:
        given, own, grid = self.published[name], self.own[target], None
        if self.grids is not None and target == POSITION_TABLE.removeprefix(self.ours):
            grid = self.grids.own
        self.plan.sources[target] = Source(name, own.shape, grid)
        problem = None if grid is not None else _shape_problem(name, given.shape, own.shape)
        if problem := problem or _kind_problem(name, given.dtype, own):
            self.wrong.append(problem)

    def problems(self) -> list[str]:
        """Messages about tensors that are missing, unknown, misshapen or of another kind."""
        sources = self.plan.sources
        if self.unknown and not sources:
            return [
                f"none of its {len(self.published)} tensors belongs to this model, "
                f"{self.unknown[0]} first"
            ]
        missing = [
            self._published(name) or f"{self.ours}{name} (ours)"
            for name in self.own
            if name not in sources
        ]
        constants = [self._published(name) for name in self.buffers]
        missing += [name for name in constants if name and name not in self.published]
        return misfits(missing, self.unknown, self.wrong)

    def _published(self, name: str) -> str | None:
        """The published name of our tensor `name`, as this checkpoint spells it."""
        found = published_name(self.ours + name, self.skips)
        return None if found is None else found.removeprefix(self.theirs)

    def _resized_grids(self) -> _Grids | None:
        """The two grids, where CLIP's published position table is of another image size."""
        table = self.published.get(str(published_name(POSITION_TABLE)).removeprefix(self.theirs))
        wanted = self.own.get(POSITION_TABLE.removeprefix(self.ours))
        if table is None or wanted is None or len(table.shape) != 2:
            return None
        if table.shape[0] == wanted.shape[0] or table.shape[1] != wanted.shape[1]:
            return None
        given = round((table.shape[0] - 1) ** 0.5)
        if given**2 != table.shape[0] - 1:
            return None  # not a square grid: refused later for its shape
        return _Grids(given, round((wanted.shape[0] - 1) ** 0.5))


@dataclass(frozen=True)
class _Grids:
    """Patches per side: of the published position table, and of our encoder."""

    given: int
    own: int


def bare_shape(shape: torch.Size) -> tuple[int, ...]:
    """`shape` without its leading dimensions of one."""
    sides = list(shape)
    while sides and sides[0] == 1:
        del sides[0]
    return tuple(sides)


def _skips(module: nn.Module) -> int:
    """Number of the U-Net's skip connections; the released model's in a part without a U-Net."""
    for part in module.modules():
        if isinstance(part, UNet):
            return len(part.look_back) - 1
    return RELEASED_SKIPS


def _shape_problem(name: str, given: torch.Size, expected: torch.Size) -> str | None:
    if bare_shape(given) == bare_shape(expected):
        return None
    return f"{name} has shape {list(given)}, expected {list(expected)}"


def _kind_problem(name: str, dtype: torch.dtype, expected: Tensor) -> str | None:
    given, kind = kind_of(torch.empty(0, dtype=dtype, device="meta")), kind_of(expected)
    return None if given == kind else f"{name} holds {given} numbers, expected {kind}"


def _finite(value: Tensor) -> bool:
    if value.is_meta or not value.is_floating_point():
        return True
    return bool(torch.isfinite(value).all())


def _equal(value: Tensor, expected: Tensor) -> bool:
    if value.is_meta or expected.is_meta:  # only shapes are known
        return True
    if not value.is_floating_point():
        return bool(torch.equal(value.reshape(expected.shape), expected.to(value.dtype)))
    stored = str(value.dtype).removeprefix("torch.")
    return compare(
        "constant",
        value.detach().float().reshape(expected.shape).numpy(),
        expected.detach().float().numpy(),
        CONSTANT_TOLERANCES.get(stored, CONSTANT_TOLERANCES["float32"]),
    ).passed
