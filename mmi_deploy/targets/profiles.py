"""Optimisation profiles: the shapes that an engine accepts, and those that it is tuned for.

Profiles are derived from the ranges of `mmi_deploy.spec.graphs` alone. `llm` has two, prefill and
decode, in one engine, so that its weights exist once. Letters as in `graphs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.spec.graphs import Graph, Limits, Range

Shape = tuple[int, ...]

DEFAULT = "default"
PREFILL = "prefill"
DECODE = "decode"

# Prompt length in tokens that prefill is tuned for, clamped to the context.
OPT_PREFILL = 256

# Range of a dimension that is one: TensorRT then knows the size when it fuses layers.
ONE = Range(1, 1, 1)


@dataclass(frozen=True)
class Profile:
    """Ranges of the dynamic dimensions, and the (min, opt, max) shapes of each dynamic input."""

    name: str
    ranges: Mapping[str, Range]
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Return True if a request of these sizes lies within the profile."""
        return not self.misfits(sizes)

    def misfits(self, sizes: Mapping[str, int]) -> list[str]:
        """Letters of the dimensions whose size lies outside the profile."""
        return [
            letter
            for letter, allowed in self.ranges.items()
            if not allowed.min <= sizes[letter] <= allowed.max
        ]

    def record(self) -> dict[str, list[int]]:
        """Ranges as plain numbers, for reports and cache keys."""
        return {
            letter: [allowed.min, allowed.opt, allowed.max]
            for letter, allowed in sorted(self.ranges.items())
        }


def profiles(graph: Graph, limits: Limits | None = None) -> tuple[Profile, ...]:
    """Profiles of `graph`, narrowed to `limits`: fewer rows or images take less memory at run time,
    and one row is a static shape.

    The runtime asks for the logits of one position of a row, so both profiles of `llm` compute no
    more. Raises `ConfigError` for limits beyond those of the graph.
    """
    ranges = dict(graph.ranges) if limits is None else _narrowed(graph, limits)
    if "t" not in ranges:
        return (_profile(graph, DEFAULT, ranges),)
    ranges["w"] = ONE
    prompt = {**ranges, "t": replace(ranges["t"], opt=OPT_PREFILL)}
    return (
        _profile(graph, PREFILL, prompt),
        _profile(graph, DECODE, {**ranges, "t": ONE}),
    )


def choose(offered: Sequence[Profile], graph: str, sizes: Mapping[str, int]) -> int:
    """Index of the narrowest profile for a request of these sizes. Raises `EngineError` that names
    the dimension beyond all profiles, and the option to build for more."""
    fitting = [index for index, profile in enumerate(offered) if profile.holds(sizes)]
    if fitting:
        return min(fitting, key=lambda index: _width(offered[index]))
    nearest = min(offered, key=lambda profile: len(profile.misfits(sizes)))
    letter = nearest.misfits(sizes)[0]
    allowed = nearest.ranges[letter]
    raise EngineError(
        f"no profile of the engine of {graph} takes {letter} = {sizes[letter]}",
        expected=f"{allowed.min} to {allowed.max}",
        fix=f"build it for more with `mmi build {_OPTIONS.get(letter, '--graph ' + graph)}`",
    )


_OPTIONS = {"b": "--rows", "n": "--max-images", "m": "--max-images"}


def _narrowed(graph: Graph, limits: Limits) -> dict[str, Range]:
    """Batches are letters b, and n where images are the batch; n is the pool where rows look at
    images (m)."""
    pooled = "m" in graph.ranges
    most = {
        "b": limits.batch,
        "n": limits.pool if pooled else limits.batch,
        "m": limits.images,
    }
    narrowed = {}
    for letter, allowed in graph.ranges.items():
        limit = most.get(letter, allowed.max)
        if limit < allowed.min:
            raise ConfigError(
                f"{graph.name} takes no fewer than {allowed.min} for {letter}", got=limit
            )
        narrowed[letter] = replace(allowed, max=min(limit, allowed.max))
    return narrowed


def _profile(graph: Graph, name: str, ranges: Mapping[str, Range]) -> Profile:
    def sizes(end: str) -> dict[str, int]:
        return {letter: getattr(allowed, end) for letter, allowed in ranges.items()}

    ends = [sizes(end) for end in ("min", "opt", "max")]
    shapes = {
        tensor.name: tuple(tensor.resolve(**end) for end in ends)
        for tensor in graph.inputs
        if any(isinstance(side, str) for side in tensor.shape)
    }
    return Profile(name, dict(ranges), shapes)  # type: ignore[arg-type]


def _width(profile: Profile) -> int:
    return sum(allowed.max - allowed.min for allowed in profile.ranges.values())
