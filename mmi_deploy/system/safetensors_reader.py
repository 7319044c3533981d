"""Read and validate the header of safetensors files.

A file is accepted if the safetensors package opens it and its header has no duplicate name, which
the format forbids and the package overlooks. Contents are then read by offset
(`mmi_train.weights.lazy_tensor`) or by the package itself.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from mmi_deploy.errors import WeightsError

# Longest header that the format allows, in bytes.
_MOST_HEADER = 100_000_000

Value = TypeVar("Value")


@dataclass(frozen=True)
class Entry:
    """One tensor: type as the format names it, shape, and its byte range [start, end) in the
    file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of the file at `path` by name, in the order of the header.

    Raises `WeightsError` for a file that cannot be read, is cut off, has bytes after its last
    tensor, or is refused by the safetensors package.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else size
            if length > min(size - 8, _MOST_HEADER):
                raise ValueError("its header has no end")
            fields = json.loads(file.read(length).decode(), object_pairs_hook=reject_duplicates)
        fields.pop("__metadata__", None)
        first = 8 + length
        end = first + max((entry["data_offsets"][1] for entry in fields.values()), default=0)
        if end != size:
            what = "is cut off" if end > size else "has bytes after its last tensor"
            raise WeightsError(
                f"{path} {what}", expected=f"{end} bytes", got=size, fix="copy or download it again"
            )
        with safe_open(path, framework="numpy"):
            pass
        return {name: _entry(first, **entry) for name, entry in fields.items()}
    except OSError as error:
        raise WeightsError(
            f"cannot read {path}: {error.strerror or error}", fix="give a folder that holds it"
        ) from None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _damaged(path, error) from None
    except SafetensorError as error:
        raise _damaged(path, error) from None


def reject_duplicates(pairs: Iterable[tuple[str, Value]]) -> dict[str, Value]:
    """Reject duplicate names in a JSON object: an `object_pairs_hook` that raises `ValueError`."""
    found: dict[str, Value] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} stands in it twice")
        found[name] = value
    return found


def _entry(first: int, dtype: str, shape: list[int], data_offsets: list[int], **_: Any) -> Entry:
    start, end = data_offsets
    return Entry(dtype, tuple(shape), first + start, first + end)


def _damaged(path: Path, error: Exception) -> WeightsError:
    reason = " ".join(str(error).removeprefix("Error while deserializing header: ").split())
    return WeightsError(
        f"{path} is not a safetensors file, or is damaged: {reason:.200}",
        fix="copy or download it again",
    )
