"""Tensors in files: read in pieces, written one by one, never whole checkpoints in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmi_deploy.cli.inspect.parts import parameter_counts
from mmi_deploy.errors import MmiError
from mmi_deploy.spec.config import to_json
from mmi_deploy.spec.graphs import STATE, TERMS
from mmi_deploy.spec.presets import tiny
from mmi_deploy.spec.schedule import Schedule, read_schedule
from mmi_deploy.system.safetensors_writer import ALIGNMENT
from mmi_export.tracing.stored_weights import stored_weights
from mmi_train.training.checkpoints import (
    RunState,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from mmi_train.weights import lazy_tensor
from mmi_train.weights.lazy_tensor import InFile, InMemory, Rows, Stacked
from mmi_train.weights.model_folder import WEIGHTS, load_model
from mmi_train.weights.pickles import read_pickles, weight_map
from mmi_train.weights.safetensors_files import load_tensors, read_folder, read_safetensors
from mmi_train.weights.writer import write_safetensors

# The largest tensor of the published checkpoint.
EMBEDDING = (32002, 5120)


def kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which the memory of this process grew at most while `work` ran."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget earlier peaks
        before = kilobytes("VmRSS")
    except OSError:
        pytest.skip("needs Linux to measure the memory of a process")
    work()
    return 1024 * (kilobytes("VmHWM") - before)


def test_memory_does_not_grow_with_the_tensor(tmp_path):
    """The published embedding in half precision, 328 MB on disk (a sparse file: its bytes are zeros
    that take no room), and one that is not laid out row by row."""
    names = ("mm_decoder.embed_tokens.weight", "text_decoder.head.weight")
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        state = {name: torch.empty(EMBEDDING, dtype=torch.float16) for name in names}
        torch.save(state, tmp_path / "pytorch_model.bin")
    largest = 2 * EMBEDDING[0] * EMBEDDING[1]
    assert (tmp_path / "pytorch_model.bin").stat().st_size > 2 * largest

    def convert() -> None:
        tensors = read_pickles(tmp_path)
        write_safetensors(tmp_path / "model.safetensors", {names[0]: tensors[names[0]]})

    convert_once = peak_growth(convert)
    assert convert_once < largest / 2, f"{convert_once / 1e6:.0f} MB"
    assert read_safetensors(tmp_path / "model.safetensors")[names[0]].shape == EMBEDDING


def test_pieces_make_up_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(lazy_tensor, "PIECE_BYTES", 64)
    value = torch.randn(11, 7)
    torch.save({"plain": value, "turned": value.t(), "row": value[3:5]}, tmp_path / "a.bin")
    for name, tensor in read_pickles(tmp_path).items():
        wanted = {"plain": value, "turned": value.t(), "row": value[3:5]}[name]
        assert torch.equal(tensor.read(), wanted)
        pieces = list(tensor.pieces())
        assert torch.equal(torch.cat(pieces).view(wanted.shape), wanted)
        assert max(piece.numel() for piece in pieces) <= 16
    file = read_pickles(tmp_path)["plain"]
    stacked = Stacked([Rows(file, 4), InMemory(torch.ones(2, 7)), Rows(InMemory(value), 1)])
    wanted = torch.cat([value[:4], torch.ones(2, 7), value[:1]])
    assert stacked.shape == wanted.shape
    assert torch.equal(stacked.read(), wanted)
    assert torch.equal(torch.cat(list(stacked.pieces())).view(wanted.shape), wanted)


def test_written_files_are_safetensors(tmp_path):
    tensors = {
        "small": torch.randn(3),
        "empty": torch.randn(0, 5),
        "scalar": torch.tensor(2.5),
        "half": torch.randn(40, 3).half(),
        "brain": torch.randn(7).bfloat16(),
        "double": torch.randn(9).double(),
    }
    path = tmp_path / "x.safetensors"
    size = write_safetensors(path, {name: InMemory(value) for name, value in tensors.items()})
    assert size == path.stat().st_size
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(found[name], value.float() if name == "double" else value)
    largest = read_safetensors(path)["half"]
    assert isinstance(largest, InFile) and largest.offset % ALIGNMENT == 0


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path):
    save_file({"a": torch.ones(100)}, tmp_path / "a.safetensors")
    tensor = read_safetensors(tmp_path / "a.safetensors")["a"]
    os.truncate(tmp_path / "a.safetensors", 200)
    with pytest.raises(MmiError, match="ends in the middle of a tensor"):
        tensor.read()


def test_progress_is_told_a_few_times_whatever_the_number_of_tensors(tmp_path):
    told: list[int] = []
    tensors = {str(k): InMemory(torch.zeros(1000)) for k in range(500)}
    write_safetensors(
        tmp_path / "x.safetensors",
        tensors,
        progress=lambda what, done, *_, **unit: told.append(done),
    )
    assert 10 <= len(told) <= 21 and told == sorted(told)


def test_a_file_has_no_name_until_it_is_whole(tmp_path):
    """So that a process that is killed leaves nothing, however it is killed."""
    seen: list[list[str]] = []
    write_safetensors(
        tmp_path / "x.safetensors",
        {"a": InMemory(torch.ones(5))},
        progress=lambda *_, **unit: seen.append(os.listdir(tmp_path)),
    )
    assert seen and all(not names for names in seen)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_file_systems_without_unnamed_files_are_written_to_as_well(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE")
    write_safetensors(tmp_path / "x.safetensors", {"a": InMemory(torch.ones(5))})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], torch.ones(5))


TRAILING = "has bytes after its last tensor"


def test_every_reader_refuses_bytes_after_the_last_tensor(tmp_path):
    """The library alone would be asked by one of them, and nobody by another."""
    model = write_model(tmp_path / "model")
    read_schedule(write_schedule(tmp_path / "ddim-2.safetensors"))
    for path in (model / WEIGHTS, tmp_path / "ddim-2.safetensors"):
        with path.open("ab") as file:
            file.write(b"\0")
    readers: list[Callable[[], object]] = [
        lambda: read_safetensors(model / WEIGHTS),
        lambda: load_tensors(model / WEIGHTS),
        lambda: read_folder(model, ("model",)),
        lambda: load_model(model),
        lambda: parameter_counts(model / WEIGHTS),
        lambda: stored_weights(model, {}),
        lambda: read_schedule(tmp_path / "ddim-2.safetensors"),
    ]
    for read in readers:
        with pytest.raises(MmiError, match=TRAILING):
            read()


def write_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(to_json(tiny()))
    save_file({"a": torch.ones(3)}, folder / WEIGHTS)
    return folder


def write_schedule(path: Path) -> Path:
    Schedule("ddim", np.array([9, 1]), np.zeros((2, STATE, TERMS), np.float32)).save(path)
    return path


def test_a_damaged_checkpoint_of_a_run_is_told(tmp_path):
    module = nn.Linear(2, 2)
    average = {name: value.clone() for name, value in module.state_dict().items()}
    optimiser = torch.optim.AdamW(module.parameters())
    path = save_checkpoint(tmp_path, module, average, optimiser, RunState(3, {}), keep=1)
    assert read_state(path) == RunState(3, {})
    load_checkpoint(path, module, average, optimiser)
    for name in ("model", "average", "moments"):
        file = path / f"{name}.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole + b"\0")
        with pytest.raises(MmiError, match=rf"{name}\.safetensors {TRAILING}"):
            load_checkpoint(path, module, average, optimiser)
        file.write_bytes(whole)
    for text in ("", "[]", '{"step": 1}', '{"step": "x", "settings": {}}'):
        (path / "state.json").write_text(text)
        with pytest.raises(MmiError, match="state of the checkpoint .* cannot be read"):
            read_state(path)


def test_a_tensor_in_two_files_of_a_folder_is_refused(tmp_path):
    """Nothing says which of the two is meant."""
    folder = write_model(tmp_path / "model")
    (folder / WEIGHTS).unlink()
    files = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": files}))
    save_file({"a": torch.ones(2)}, folder / files["a"])
    save_file({"b": torch.ones(2)}, folder / files["b"])
    assert read_folder(folder, ("model",)).keys() == {"a", "b"}
    save_file({"a": torch.zeros(2), "b": torch.ones(2)}, folder / files["b"])
    readers: list[Callable[[], object]] = [
        lambda: read_folder(folder, ("model",)),
        lambda: stored_weights(folder, {}),
    ]
    for read in readers:
        with pytest.raises(MmiError, match="holds 1 tensors that another file .* of them a"):
            read()


def test_an_index_that_names_a_tensor_twice_is_refused(tmp_path):
    (tmp_path / "i.json").write_text('{"weight_map": {"a": "x.bin", "a": "y.bin"}}')
    with pytest.raises(MmiError, match="is not an index of a checkpoint"):
        weight_map(tmp_path / "i.json")
