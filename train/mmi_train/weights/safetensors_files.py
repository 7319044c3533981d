"""Hugging Face checkpoints: safetensors files, one or several with an index, read lazily."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmi_deploy.errors import WeightsError
from mmi_deploy.system.safetensors_reader import Entry, read_header
from mmi_train.weights.lazy_tensor import InFile, StoredTensor
from mmi_train.weights.pickles import read_pickle, read_together, weight_map

# Types by the format's names.
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}


def read_safetensors(path: Path) -> dict[str, InFile]:
    """Read the tensors of one file, lazily; raises `WeightsError`."""
    return {name: _tensor(path, name, entry) for name, entry in read_header(path).items()}


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of one file into memory; raises `WeightsError`."""
    read_header(path)  # checks the file, which `load_file` reports less readably
    return load_file(path)


def _tensor(path: Path, name: str, entry: Entry) -> InFile:
    if entry.dtype not in _TYPES:
        raise WeightsError(
            f"{path}: {name} is stored as {entry.dtype}",
            expected="F32, F16 or BF16",
            fix="use the checkpoint as it was before it was quantised",
        )
    return InFile(path, entry.start, _TYPES[entry.dtype], torch.Size(entry.shape))


def read_folder(folder: Path, stems: Sequence[str]) -> dict[str, StoredTensor]:
    """Read the tensors of a Hugging Face folder, lazily; raises `WeightsError`.

    stems: names of its weights files without the suffix. For the first stem that is there:
    safetensors, one file or several with an index, else pickles.
    """
    for stem in stems:
        readers: tuple[tuple[str, Callable[[Path], Mapping[str, StoredTensor]]], ...] = (
            (".safetensors", read_safetensors),
            (".bin", read_pickle),
        )
        for suffix, read in readers:
            index, single = folder / f"{stem}{suffix}.index.json", folder / (stem + suffix)
            if index.is_file():
                files = sorted({*weight_map(index).values()})
                return read_together(folder, [folder / name for name in files], read)
            if single.is_file():
                return dict(read(single))
    raise WeightsError(
        f"{folder} holds no weights",
        expected=" or ".join(f"{stem}.safetensors" for stem in stems),
        fix="download the folder whole",
    )
