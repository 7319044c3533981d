"""PyTorch checkpoints: zip files of a pickle and the tensors' bytes, read lazily and safely.

The pickle is unpickled without running code that it may hold (`weights_only`), under fake tensors,
so that only its few kilobytes are read: names, shapes, and each tensor's offset in the file.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmi_deploy.errors import WeightsError
from mmi_deploy.system.safetensors_reader import reject_duplicates
from mmi_train.weights.lazy_tensor import PLAIN_TYPES, InFile, StoredTensor

# Files that trainers write beside the weights; never opened.
_NO_WEIGHTS = {"training_args.bin", "optimizer.bin", "scheduler.bin"}

# Integers too: checkpoints hold position ids beside the weights.
_TYPES = (*PLAIN_TYPES, torch.int64, torch.int32)

# First bytes of a zip file, and of files that PyTorch wrote before version 1.6: one stream, which
# cannot be read in parts.
_ZIP = b"PK\x03\x04"
_OLD_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

_FIX_DAMAGED = "download it again"
_FIX_FOLDER = (
    "give a folder of .bin files that hold one dictionary of tensors each, as torch.save wrote"
)


def pickle_files(folder: Path) -> list[Path]:
    """Weights files in `folder`: those that its index names, or all `.bin` without an index."""
    indices = sorted(folder.glob("*.bin.index.json"))
    if len(indices) > 1:
        raise WeightsError(
            f"{folder} holds two checkpoints",
            expected="one index",
            got=", ".join(path.name for path in indices),
            fix="leave only the files of one checkpoint in the folder",
        )
    if indices:
        paths = [folder / name for name in sorted(set(weight_map(indices[0]).values()))]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise WeightsError(
                f"{folder} lacks files that {indices[0].name} names: {', '.join(missing)}",
                fix="download them too",
            )
        return paths
    paths = sorted(path for path in folder.glob("*.bin") if path.name not in _NO_WEIGHTS)
    if not paths:
        raise WeightsError(
            f"{folder} holds no weights", expected="files that end in .bin", fix=_FIX_FOLDER
        )
    return paths


def weight_map(index: Path) -> dict[str, str]:
    """Read an index: the file name of each tensor; raises `WeightsError`."""
    try:
        files = json.loads(index.read_text(), object_pairs_hook=reject_duplicates)["weight_map"]
        if all(isinstance(file, str) and Path(file).name == file for file in files.values()):
            return files
    except (OSError, ValueError, RecursionError, KeyError, AttributeError, TypeError):
        pass
    raise WeightsError(f"{index} is not an index of a checkpoint", fix=_FIX_DAMAGED)


def read_pickles(checkpoint: Path) -> dict[str, StoredTensor]:
    """Read the tensors of a folder of pickles, or of one pickle; raises `WeightsError`."""
    if checkpoint.is_dir():
        paths = pickle_files(checkpoint)
    elif checkpoint.is_file():
        paths = [checkpoint]
    else:
        raise WeightsError(f"there is no checkpoint {checkpoint}", fix=_FIX_FOLDER)
    return read_together(checkpoint, paths, read_pickle)


def read_together(
    checkpoint: Path, paths: Iterable[Path], read: Callable[[Path], Mapping[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    """Read the tensors of several files of one `checkpoint`; raises `WeightsError` for a name that
    two files hold."""
    found: dict[str, StoredTensor] = {}
    for path in paths:
        tensors = read(path)
        if twice := sorted(found.keys() & tensors.keys()):
            raise WeightsError(
                f"{path} holds {len(twice)} tensors that another file of {checkpoint} holds too, "
                f"the first of them {twice[0]}",
                fix="leave only the files of one checkpoint in the folder",
            )
        found.update(tensors)
    return found


def read_pickle(path: Path) -> dict[str, StoredTensor]:
    """Read the tensors of one file that `torch.save` wrote; raises `WeightsError`, runs no code."""
    _check_container(path)
    try:
        with FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"calls {named[1]}" if named else "holds more than tensors"
        raise WeightsError(
            f"{path} {what}: it is code, and was not run",
            fix="use a checkpoint that holds tensors alone; never load this one elsewhere "
            "unless you trust who made it",
        ) from None
    except (RuntimeError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise WeightsError(
            f"{path} is damaged or not a PyTorch checkpoint", fix=_FIX_DAMAGED
        ) from None
    if not isinstance(state, Mapping) or not state:
        raise WeightsError(
            f"{path} holds no dictionary of tensors", got=type(state).__name__, fix=_FIX_FOLDER
        )
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise WeightsError(
            f"{path} holds more than tensors: {', '.join(others[:5])}",
            fix="save the model's state dict alone",
        )
    size = path.stat().st_size
    return {str(name): _stored(path, size, str(name), value) for name, value in state.items()}


def _check_container(path: Path) -> None:
    """Raise `WeightsError` unless `path` is a whole zip file of plain records."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_OLD_PICKLE))
        if start.startswith(_ZIP):
            with zipfile.ZipFile(path) as archive:
                records = archive.infolist()
                orders = [record for record in records if record.filename.endswith("/byteorder")]
                big = any(archive.read(record) != b"little" for record in orders)
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise WeightsError(
                    f"{path} is a compressed zip file", fix="save it again with torch.save"
                )
            if big:
                raise WeightsError(
                    f"{path} was written by a machine with another byte order",
                    fix="load and save it on a machine with little-endian numbers",
                )
            return
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from None
    except (zipfile.BadZipFile, NotImplementedError, EOFError):
        raise WeightsError(f"{path} is cut off or damaged", fix=_FIX_DAMAGED) from None
    if start == _OLD_PICKLE:
        raise WeightsError(
            f"{path} is in the format that PyTorch wrote before version 1.6",
            fix='save it again: torch.save(torch.load(path, weights_only=True, map_location="cpu"),'
            " path)",
        )
    raise WeightsError(
        f"{path} is not a PyTorch checkpoint",
        expected="a zip file, as torch.save writes",
        got="an empty file" if not start else "something else",
        fix=_FIX_DAMAGED,
    )


def _stored(path: Path, size: int, name: str, value: Tensor) -> StoredTensor:
    """Locate `value`, a fake tensor, in the file `path` of `size` bytes; raises `WeightsError`."""
    if value.is_quantized or value.layout != torch.strided or value.dtype not in _TYPES:
        kind = "quantised" if value.is_quantized else str(value.dtype).removeprefix("torch.")
        raise WeightsError(
            f"{path}: {name} is {kind}",
            expected="float32, float16 or bfloat16",
            fix="use the checkpoint as it was before it was quantised",
        )
    start = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise WeightsError(f"{path}: {name} is in no record of the file", fix=_FIX_DAMAGED)
    offset = start + value.storage_offset() * value.dtype.itemsize
    strides = None if value.is_contiguous() else tuple(value.stride())
    found = InFile(path, offset, value.dtype, value.shape, strides)
    if offset + found.span * found.dtype.itemsize > size:
        raise WeightsError(f"{path}: {name} reaches beyond the end of the file", fix=_FIX_DAMAGED)
    return found
