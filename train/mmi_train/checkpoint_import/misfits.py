"""Messages about tensors that do not fit: every missing, unknown and misshapen one, by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from mmi_train.weights.lazy_tensor import StoredTensor

_FIRST_NUMBER = re.compile(r"\.(\d+)\.")


def shape_misfits(
    given: Mapping[str, StoredTensor],
    expected: Mapping[str, torch.Size],
    required: Iterable[str],
    wrong: Sequence[str] = (),
) -> list[str]:
    """Messages from comparing `given` tensors with `expected` shapes, and those in `wrong`.

    required: the expected names that must be given. Empty when all fits.
    """
    missing = [name for name in required if name not in given]
    unknown = [name for name in given if name not in expected]
    misshapen = [
        f"{name} has shape {list(tensor.shape)}, expected {list(expected[name])}"
        for name, tensor in given.items()
        if name in expected and tensor.shape != expected[name]
    ]
    return misfits(missing, unknown, [*misshapen, *wrong])


def misfits(missing: Sequence[str], unknown: Sequence[str], wrong: Sequence[str]) -> list[str]:
    """Messages from names of missing and unknown tensors, and lines about the others."""
    return [
        *([f"missing: {', '.join(compact(missing))}"] if missing else []),
        *([f"unknown: {', '.join(compact(unknown))}"] if unknown else []),
        *compact(wrong),
    ]


def compact(lines: Sequence[str]) -> list[str]:
    """Merge `lines` that differ only in their first number (of a layer): `layers.{0-39}.norm`."""
    groups: dict[str, list[int]] = {}
    for line in lines:
        found = _FIRST_NUMBER.search(line)
        template = line if found is None else f"{line[: found.start()]}.{{}}.{line[found.end() :]}"
        groups.setdefault(template, []).extend([int(found[1])] if found else [])
    return [
        template.replace("{}", _ranges(numbers), 1) if numbers else template
        for template, numbers in groups.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """Ranges of numbers as text: `3`, `{0-39}`, `{0,4-7}`."""
    ordered = sorted(set(numbers))
    starts = [n for n in ordered if n - 1 not in ordered]
    ends = [n for n in ordered if n + 1 not in ordered]
    ranges = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    return ranges[0] if len(ordered) == 1 else "{" + ",".join(ranges) + "}"
