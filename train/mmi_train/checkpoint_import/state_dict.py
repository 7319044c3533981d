"""Published weights into our modules: strict, with every tensor accounted for.

`plan_state` compares names, shapes and types, and says where each of our tensors comes from. What
it returns converts a whole dictionary in memory (`convert_state`) as well as tensors that are read
from files one at a time (`Plan.stored`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from mmi_deploy.errors import WeightsError
from mmi_deploy.parity import CONSTANT_TOLERANCES, compare
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


class Described(Protocol):
    """What a plan needs to know of a tensor; those in memory and those in files tell it."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class Place:
    """Where one of our tensors comes from: the published `name`, in our `shape`. `grid`: CLIP's
    positions, to be resized to this many patches along a side."""

    name: str
    shape: torch.Size
    grid: int | None = None

    def convert(self, value: Tensor) -> Tensor:
        """The published tensor as ours."""
        resized = value if self.grid is None else resize_positions(value, self.grid)
        return resized.reshape(self.shape)


@dataclass(frozen=True)
class Plan:
    """`places`: by our name. `constants`: by published name, what its values must be."""

    places: dict[str, Place]
    constants: dict[str, Tensor]

    def check_constants(self, read: Callable[[str], Tensor]) -> list[str]:
        """What is wrong with the derived constants, which `read` gives by published name."""
        return [
            _NOT_FINITE.format(name)
            if not _finite(value)
            else f"{name} differs from the values that the configuration gives"
            for name, expected in self.constants.items()
            if not _finite(value := read(name)) or not _equal(value, expected)
        ]

    def stored(self, published: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Our tensors by name, still in the files of `published`, in its order. Raises
        `WeightsError` when a derived constant there has other values."""
        if problems := self.check_constants(lambda name: published[name].read()):
            raise _misfit(problems)
        order = {name: index for index, name in enumerate(published)}
        places = sorted(self.places.items(), key=lambda item: order[item[1].name])
        found: dict[str, StoredTensor] = {}
        for name, place in places:
            if place.grid is None:
                found[name] = Reshaped(published[place.name], place.shape)
            else:
                found[name] = InMemory(place.convert(published[place.name].read()))
        return found


_FIRST_NUMBER = re.compile(r"\.(\d+)\.")
_NOT_FINITE = "{} holds NaN or infinity"


def _misfit(problems: list[str]) -> WeightsError:
    return WeightsError("the weights do not fit the configuration: " + "; ".join(problems))


def plan_state(module: nn.Module, published: Mapping[str, Described]) -> Plan:
    """Where the state of the whole model `module`, which may be a sketch on the meta device, comes
    from.

    Raises `WeightsError` that names every tensor which is missing, extra, misshapen or of another
    kind. Shapes may differ by leading dimensions of one, and CLIP's position table may be that of
    another image size: it is resized, as the published code does for 448 pixels.
    """
    plan, problems = _plan(module, published, "", "")
    if problems:
        raise _misfit(problems)
    return plan


def convert_state(
    module: nn.Module, published: Mapping[str, Tensor], *, theirs: str = "", ours: str = ""
) -> dict[str, Tensor]:
    """The state dict of `module`, a part of the model or all of it, made of `published` tensors.

    `theirs` and `ours` are the prefixes that `published` names and the names of `module` lack to be
    names of the whole model. Raises `WeightsError` as `plan_state` does, and for tensors that are
    not finite and derived constants of other values than the configuration gives.
    """
    plan, problems = _plan(module, published, theirs, ours)
    taken = [place.name for place in plan.places.values()]
    problems += [_NOT_FINITE.format(name) for name in taken if not _finite(published[name])]
    problems += plan.check_constants(lambda name: published[name])
    if problems:
        raise _misfit(problems)
    return {name: place.convert(published[place.name]) for name, place in plan.places.items()}


def published_module(
    build: Callable[[], Module],
    published: Mapping[str, Tensor],
    *,
    theirs: str = "",
    ours: str = "",
) -> Module:
    """The module that `build` makes with the weights `published`, for evaluation.

    Shapes are checked before any memory is taken for its parameters. See `convert_state`.
    """
    with torch.device("meta"):
        sketch = build()
    state = convert_state(sketch, published, theirs=theirs, ours=ours)
    module = build()
    module.load_state_dict(state)
    return module.eval()


def _plan(
    module: nn.Module, published: Mapping[str, Described], theirs: str, ours: str
) -> tuple[Plan, list[str]]:
    """The plan as far as it goes, and what is wrong."""
    own, constants = module.state_dict(), dict(module.named_buffers())
    skips = _skips(module)
    grid = _other_grid(own, published, theirs, ours)
    plan = Plan({}, {})
    extra, wrong = [], []
    for name in published:
        try:
            found = rename(theirs + name, skips)
        except WeightsError:
            extra.append(name)
            continue
        target = found.buffer if isinstance(found, DerivedConstant) else found
        target = target.removeprefix(ours) if target.startswith(ours) else ""
        given = published[name]
        if isinstance(found, DerivedConstant) and target in constants:
            expected = constants[target]
            if target == POSITION_IDS.removeprefix(ours):
                ids = expected.numel() if grid is None else 1 + grid.given**2
                expected = torch.arange(ids, device="cpu")
            if problem := _shape_problem(name, given.shape, expected.shape):
                wrong.append(problem)
            else:
                plan.constants[name] = expected
        elif isinstance(found, DerivedConstant) or target not in own or target in plan.places:
            extra.append(name)
        else:
            resized = grid is not None and target == POSITION_TABLE.removeprefix(ours)
            place = Place(name, own[target].shape, grid.own if grid and resized else None)
            plan.places[target] = place
            problem = None if resized else _shape_problem(name, given.shape, place.shape)
            problem = problem or _kind_problem(name, given.dtype, own[target])
            wrong += [problem] if problem else []
    missing = [_their_name(ours + name, theirs, skips) for name in own if name not in plan.places]
    missing += [
        name for name in _constants_of(module, theirs, ours, skips) if name not in published
    ]
    if extra and not plan.places:
        return plan, [
            f"none of its {len(published)} tensors belongs to this model, {extra[0]} first"
        ]
    return plan, misfits(missing, extra, wrong)


@dataclass(frozen=True)
class _Grids:
    """Patches along a side: of the published position table, and of ours."""

    given: int
    own: int


def _other_grid(
    own: Mapping[str, Tensor], published: Mapping[str, Described], theirs: str, ours: str
) -> _Grids | None:
    """The grids, if CLIP's published position table is that of another image size."""
    table = published.get(str(published_name(POSITION_TABLE)).removeprefix(theirs))
    wanted = own.get(POSITION_TABLE.removeprefix(ours))
    if table is None or wanted is None or len(table.shape) != 2:
        return None
    if table.shape[0] == wanted.shape[0] or table.shape[1] != wanted.shape[1]:
        return None
    given = round((table.shape[0] - 1) ** 0.5)
    if given**2 != table.shape[0] - 1:
        return None  # no square grid: refused for its shape
    return _Grids(given, round((wanted.shape[0] - 1) ** 0.5))


def bare_shape(shape: torch.Size) -> tuple[int, ...]:
    """`shape` without its leading dimensions of one."""
    sides = list(shape)
    while sides and sides[0] == 1:
        del sides[0]
    return tuple(sides)


def _skips(module: nn.Module) -> int:
    """How many skip connections the U-Net in `module` has, if there is one."""
    for part in module.modules():
        if isinstance(part, UNet):
            return len(part.look_back) - 1
    return RELEASED_SKIPS


def _constants_of(module: nn.Module, theirs: str, ours: str, skips: int) -> list[str]:
    """Published names of the derived constants that `module` holds as buffers."""
    names = (published_name(ours + name, skips) for name, _ in module.named_buffers())
    return [name.removeprefix(theirs) for name in names if name is not None]


def misfits(missing: Sequence[str], unknown: Sequence[str], wrong: Sequence[str]) -> list[str]:
    """What is wrong with a set of tensors: names that are missing, names of no tensor of ours, and
    lines about the others."""
    return [
        *([f"missing: {', '.join(compact(missing))}"] if missing else []),
        *([f"unknown: {', '.join(compact(unknown))}"] if unknown else []),
        *compact(wrong),
    ]


def compact(lines: Sequence[str]) -> list[str]:
    """`lines` with those that differ in their first number alone made into one:
    `layers.{0-39}.norm`."""
    groups: dict[str, list[int]] = {}
    for line in lines:
        found = _FIRST_NUMBER.search(line)
        template = line if found is None else f"{line[: found.start()]}.{{}}.{line[found.end() :]}"
        groups.setdefault(template, []).extend([int(found[1])] if found else [])
    return [
        template.replace("{}", _spans(numbers), 1) if numbers else template
        for template, numbers in groups.items()
    ]


def _spans(numbers: list[int]) -> str:
    """`3`, `{0-39}`, `{0,4-7}`."""
    ordered = sorted(set(numbers))
    starts = [n for n in ordered if n - 1 not in ordered]
    ends = [n for n in ordered if n + 1 not in ordered]
    spans = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    return spans[0] if len(ordered) == 1 else "{" + ",".join(spans) + "}"


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


def _their_name(ours: str, theirs: str, skips: int) -> str:
    name = published_name(ours, skips)
    return name.removeprefix(theirs) if name else f"{ours} (ours)"
