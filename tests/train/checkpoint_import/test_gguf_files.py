"""GGUF files in other forms than one little-endian file that says all of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import LlamaForCausalLM

from mmi_deploy.errors import MmiError
from mmi_train.checkpoint_import.from_gguf import read_gguf
from mmi_train.checkpoint_import.parts import LlmPart
from mmi_train.checkpoint_import.sentencepiece_model import read_pieces
from train import small_parts as parts
from train.checkpoint_import.test_new_model import Init, assert_same_text, built, init, refused

__all__ = ["init"]


def weights(model: LlmPart) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in model.tensors.items()}


def split(folder: Path, llama: LlamaForCausalLM, **form: Any) -> list[Path]:
    """The parts of a file that the gguf package splits every 9 tensors."""
    form = {"split_max_tensors": 9} | form
    parts.write_gguf(folder / "x.gguf", llama, gguf.GGMLQuantizationType.Q8_0, **form)
    found = sorted(folder.glob("x-*.gguf"))
    assert len(found) > 2
    return found


def test_all_parts_of_a_split_file_are_read(init: Init, tmp_path: Path) -> None:
    llama = parts.llama()
    first = split(tmp_path, llama)[0]
    found = weights(read_gguf(first))
    parts.write_gguf(tmp_path / "whole.gguf", llama, gguf.GGMLQuantizationType.Q8_0)
    wanted = weights(read_gguf(tmp_path / "whole.gguf"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="whole.gguf").eval()
    assert_same_text(built(init, first, tmp_path / "out"), theirs, tmp_path / "out")


def test_a_first_part_without_tensors(tmp_path: Path) -> None:
    first = split(tmp_path, parts.llama(), small_first_shard=True)[0]
    assert not gguf.GGUFReader(first).tensors
    assert len(read_gguf(first).tensors) == 3 + 9 * 3


def test_parts_that_are_missing_or_mixed_up(init: Init, tmp_path: Path) -> None:
    first, second, third, *_ = split(tmp_path, parts.llama())
    refused(init, second, f"is part 2 of 4 of a split GGUF file. give its first part, {first.name}")
    kept = third.read_bytes()
    third.unlink()
    refused(init, first, "the first of 4 parts", f"1 are missing, {third.name} first", "download")
    third.write_bytes(second.read_bytes())
    refused(init, first, f"{third} is not a part of {first}; expected part 3 of 4")
    third.write_bytes(kept[: len(kept) // 2])
    refused(init, first, f"{third} is not a GGUF file, or it is cut off")
    other = first.rename(tmp_path / "model.gguf")
    refused(init, other, "is part 1 of 4", "expected NAME-00001-of-00004.gguf", "--merge")


def test_a_big_endian_file_is_named_as_such(init: Init, tmp_path: Path) -> None:
    path = parts.write_gguf(tmp_path / "x.gguf", parts.llama(), endianess=gguf.GGUFEndian.BIG)
    refused(init, path, "is big-endian; expected a little-endian file", "gguf-convert-endian")


@pytest.mark.parametrize("name", ["pre", "merges", "token_type"])
def test_what_cuts_texts_is_not_guessed(init: Init, tmp_path: Path, name: str) -> None:
    field = f"tokenizer.ggml.{name}"
    path = parts.write_gguf(tmp_path / "x.gguf", parts.llama(), without=(field,))
    refused(init, path, f"it lacks {field}", "give --tokenizer")
    parts.byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert init(path, "--tokenizer", tmp_path / "tokenizer.json")[0] == 0


@pytest.mark.parametrize("name", ["scores", "token_type"])
def test_sentencepiece_in_a_gguf_is_not_guessed(
    repository: Path, tmp_path: Path, name: str
) -> None:
    pieces, _ = read_pieces(repository / "tests/oracles/sentencepiece.model")
    llama = parts.llama(vocab_size=len(pieces))
    field = f"tokenizer.ggml.{name}"
    path = parts.write_gguf(tmp_path / "x.gguf", llama, pieces=pieces, without=(field,))
    with pytest.raises(MmiError, match=f"it lacks {field}"):
        read_gguf(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"llama.rope.scaling.type": "linear"},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0},
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 0.0},
        {"llama.rope.scaling.original_context_length": 96},
        {"llama.rope.scale_linear": 1.0},
    ],
)
def test_scaling_by_one_is_none(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = parts.write_gguf(tmp_path / "x.gguf", parts.llama(), fields=fields)
    model = read_gguf(path)
    assert (model.rope_theta, model.rope_divisors) == (50000.0, ())


@pytest.mark.parametrize("name", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_factor_of_no_scaling_is_refused(tmp_path: Path, name: str) -> None:
    fields = {"llama.rope.scaling.type": "none", f"llama.{name}": 2.0}
    path = parts.write_gguf(tmp_path / "x.gguf", parts.llama(), fields=fields)
    with pytest.raises(MmiError, match=rf"our blocks do not have llama\.{name}"):
        read_gguf(path)


def test_a_token_that_stands_twice_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = parts.byte_tokens()
    tokens[-1] = tokens[7]
    monkeypatch.setattr(parts, "byte_tokens", lambda: tokens)
    path = parts.write_gguf(tmp_path / "x.gguf", parts.llama())
    with pytest.raises(MmiError, match=f"two ids; got 7 and {parts.KNOWN - 1}"):
        read_gguf(path)
