"""`mmi convert`: a checkpoint under the published names becomes the model it is of."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer as Inner
from tokenizers.models import BPE
from torch import Tensor

from mmi_deploy.cli.app import run
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.spec.config import read_config, to_json
from mmi_train.golden import full
from mmi_train.golden.units import read_unit
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.weights import writer
from mmi_train.weights.model_folder import CONFIG, TOKENIZER, WEIGHTS, load_model
from train.checkpoint_import import published_checkpoint as published

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> MMInterleaved:
    return published.model()


@pytest.fixture(scope="module")
def state(model: MMInterleaved) -> State:
    return published.published_state(model)


@pytest.fixture
def checkpoint(tmp_path: Path, state: State) -> Path:
    """Three shards with an index, and LLaMA's kind of tokenizer."""
    folder = tmp_path / "checkpoint"
    published.write_shards(folder, state, 3)
    (folder / "tokenizer.model").write_bytes(published.sentencepiece_model())
    (tmp_path / CONFIG).write_text(to_json(published.config()))
    return folder


Convert = Callable[..., tuple[int, str]]


@pytest.fixture
def convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Convert:
    """Runs `mmi convert` as users do; returns its exit code and what it said on stderr."""

    def call(checkpoint: Path, *options: str) -> tuple[int, str]:
        arguments = [str(checkpoint), "-o", str(tmp_path / "out")]
        code = run(["convert", *arguments, "--config", str(tmp_path / CONFIG), *options])
        return code, capsys.readouterr().err

    return call


def refused(convert: Convert, checkpoint: Path, *expected: str) -> None:
    """It says all of `expected` in one line, and leaves nothing behind."""
    code, said = convert(checkpoint)
    last = said.strip().splitlines()[-1]
    assert code == 2, said
    assert last.startswith("mmi: ")
    for text in expected:
        assert text in last
    left = {path.name for path in checkpoint.parent.iterdir()}
    assert left <= {"checkpoint", CONFIG, "evidence"}


def stored(folder: Path) -> State:
    with safe_open(folder / WEIGHTS, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def test_a_sharded_checkpoint_becomes_the_same_model(convert, checkpoint, model):
    code, said = convert(checkpoint)
    assert code == 0, said
    out = checkpoint.parent / "out"
    loaded, own = load_model(out).state_dict(), model.state_dict()
    assert loaded.keys() == own.keys()
    assert all(torch.equal(loaded[name], own[name]) for name in own)
    assert read_config(out / CONFIG) == published.config()


def test_weights_of_the_published_code_become_what_the_golden_checker_runs(
    convert, checkpoint, golden_file
):
    """Names and shapes here are the published code's own; with these weights our model gives the
    published outputs (`test_golden_whole`)."""

    unit = read_unit(golden_file("full_forward.safetensors").with_suffix(""))
    wanted = full.load(unit).model
    config = wanted.config
    published.write_shards(checkpoint, dict(unit.state), 3)
    (checkpoint.parent / CONFIG).write_text(to_json(config))
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"t{k}": k for k in range(3, config.tokens.boi)}
    Inner(BPE(vocab=ids, merges=[])).save(str(checkpoint / "tokenizer.json"))
    code, said = convert(checkpoint)
    assert code == 0, said
    own = wanted.state_dict()
    found = stored(checkpoint.parent / "out")
    assert found.keys() == own.keys()
    assert all(torch.equal(value, own[name]) for name, value in found.items())


def test_one_file_and_no_index(convert, checkpoint, state, model):
    for path in checkpoint.glob("pytorch_model*"):
        path.unlink()
    torch.save(state, checkpoint / "pytorch_model.bin")
    torch.save({"lr": object}, checkpoint / "training_args.bin")  # trainers leave it; never opened
    assert convert(checkpoint)[0] == 0
    own = model.state_dict()
    assert all(torch.equal(v, own[n]) for n, v in stored(checkpoint.parent / "out").items())


def test_a_file_may_be_named_instead_of_its_folder(convert, checkpoint, state):
    torch.save(state, checkpoint / "weights.pth")
    assert convert(checkpoint / "weights.pth")[0] == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_are_written_in_the_type_that_is_asked_for(convert, checkpoint, model, dtype):
    assert convert(checkpoint, "--dtype", dtype)[0] == 0
    wanted = getattr(torch, dtype)
    found = stored(checkpoint.parent / "out")
    assert {value.dtype for value in found.values()} == {wanted}
    own = model.state_dict()
    assert all(torch.equal(value, own[name].to(wanted)) for name, value in found.items())


def test_types_are_kept_tensor_by_tensor(convert, checkpoint, state):
    mixed = dict(state)
    mixed["mm_decoder.norm.weight"] = state["mm_decoder.norm.weight"].bfloat16()
    mixed["text_decoder.head.bias"] = state["text_decoder.head.bias"].double()
    mixed["soi_token"] = state["soi_token"].half()
    published.write_shards(checkpoint, mixed, 3)
    assert convert(checkpoint)[0] == 0
    found = stored(checkpoint.parent / "out")
    assert found["llm.norm.weight"].dtype == torch.bfloat16
    assert found["head.head.bias"].dtype == torch.float32  # fp64 is not kept
    assert found["boi_embedding"].dtype == torch.float16
    assert found["head.head.weight"].dtype == torch.float32


def test_transposed_and_shared_tensors_are_written_as_they_read(convert, checkpoint, state, model):
    """A view into a larger storage is what `torch.save` makes of a slice or a transpose."""
    odd = dict(state)
    name = "context_feat_proj.weight"
    odd[name] = state[name].t().contiguous().t()
    both = torch.cat([state["text_decoder.head.bias"], state["context_feat_proj.bias"]])
    cut = len(state["text_decoder.head.bias"])
    odd["text_decoder.head.bias"], odd["context_feat_proj.bias"] = both[:cut], both[cut:]
    for path in checkpoint.glob("pytorch_model*"):
        path.unlink()
    torch.save(odd, checkpoint / "pytorch_model.bin")
    assert convert(checkpoint)[0] == 0
    found, own = stored(checkpoint.parent / "out"), model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in found.items())


def test_the_tokenizer_knows_the_two_marks(convert, checkpoint):
    assert convert(checkpoint)[0] == 0
    config = published.config()
    tokenizer = Tokenizer.open(checkpoint.parent / "out" / TOKENIZER, config.tokens)
    ids = tokenizer.encode("the cat sat on <s> <|image|>")
    assert tokenizer.decode(ids) == "the cat sat on <s> <|image|>"
    assert not {config.tokens.bos, config.tokens.boi, config.tokens.image} & set(ids)
    inner = tokenizer._inner
    assert inner.token_to_id("<|beginofimage|>") == config.tokens.boi == published.OWN
    assert inner.token_to_id("<|image|>") == config.tokens.image == published.OWN + 1


def test_every_missing_extra_and_misshapen_tensor_is_named(convert, checkpoint, state):
    wrong = dict(state)
    del wrong["soi_token"], wrong["mm_decoder.layers.1.mlp.up_proj.weight"]
    wrong["mm_decoder.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    wrong["optimiser.step"] = torch.ones(1)
    wrong["mm_decoder.norm.weight"] = torch.ones(3)
    wrong["text_decoder.head.weight"] = torch.ones(7, 256)
    wrong["text_decoder.head_new.bias"] = torch.ones(2, dtype=torch.int64)
    published.write_shards(checkpoint, wrong, 2)
    (checkpoint / "pytorch_model-00003-of-00003.bin").unlink()
    refused(
        convert,
        checkpoint,
        "missing: soi_token, mm_decoder.layers.1.mlp.up_proj.weight",
        "unknown: optimiser.step, mm_decoder.layers.0.self_attn.rotary_emb.inv_freq",
        "mm_decoder.norm.weight has shape [3], expected [256]",
        "text_decoder.head.weight has shape [7, 256]",
        "text_decoder.head_new.bias holds integer numbers",
    )


def test_derived_constants_are_compared(convert, checkpoint, state):
    name = "image_decoder.decoder.mmfs_module.mmfs_mid_block.pos_embed"
    published.write_shards(checkpoint, state | {name: state[name] + 1}, 3)
    refused(convert, checkpoint, f"{name} differs from the values")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused(convert, checkpoint, state, value):
    bad = state["context_feat_proj.weight"].clone()
    bad[3, 5] = value
    published.write_shards(checkpoint, state | {"context_feat_proj.weight": bad}, 3)
    refused(convert, checkpoint, "image_decoder.context_proj.weight holds NaN or infinity")


def test_numbers_beyond_float16_are_refused_not_made_infinite(convert, checkpoint, state):
    large = state["soi_token"].clone()
    large[0, 0] = 7e4
    published.write_shards(checkpoint, state | {"soi_token": large}, 3)
    code, said = convert(checkpoint, "--dtype", "float16")
    assert code == 2 and "boi_embedding holds numbers that float16 cannot; got 7e+04" in said
    assert convert(checkpoint, "--dtype", "bfloat16")[0] == 0


class Evil:
    """Unpickled, it writes a file: a checkpoint must never be able to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_refused_and_not_run(convert, checkpoint, state):
    evidence = checkpoint.parent / "evidence"
    torch.save(state | {"soi_token": Evil(evidence)}, checkpoint / "extra.bin")
    (checkpoint / "pytorch_model.bin.index.json").unlink()
    refused(convert, checkpoint, "extra.bin calls posix.mkdir: it is code, and was not run")
    assert not evidence.exists()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def pack(path: Path) -> None:
    """Zip it again, with compression."""
    with zipfile.ZipFile(path) as old:
        files = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in files.items():
            new.writestr(name, data)


def old_form(path: Path) -> None:
    torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False)


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "is cut off or damaged"),
        (pack, "is a compressed zip file"),
        (old_form, "in the format that PyTorch wrote before version 1.6"),
        (other_zip, "is damaged or not a PyTorch checkpoint"),
        (lambda path: path.write_bytes(b""), "is not a PyTorch checkpoint; expected a zip file"),
        (lambda path: path.write_bytes(b"\x93NUMPY"), "is not a PyTorch checkpoint"),
        (lambda path: path.write_bytes(b"PK\x03\x04" * 9), "is cut off or damaged"),
        (lambda path: torch.save([torch.ones(1)], path), "holds no dictionary of tensors"),
        (lambda path: torch.save({"step": 3}, path), "holds more than tensors: step"),
        (lambda path: path.unlink(), "lacks files that pytorch_model.bin.index.json names"),
    ],
)
def test_damaged_files_are_named(convert, checkpoint, damage, said):
    damage(checkpoint / "pytorch_model-00002-of-00003.bin")
    refused(convert, checkpoint, "pytorch_model-00002-of-00003.bin", said)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.complex64])
def test_quantised_weights_are_refused(convert, checkpoint, state, dtype):
    name = "mm_decoder.layers.0.mlp.up_proj.weight"
    published.write_shards(checkpoint, state | {name: torch.ones(4, 4).to(dtype)}, 3)
    refused(convert, checkpoint, f"{name} is {str(dtype)[6:]}", "before it was quantised")


def test_folders_without_weights_or_with_two_checkpoints(convert, checkpoint, state):
    torch.save(state, checkpoint / "pytorch_model.bin")
    (checkpoint / "pytorch_model.bin.index.json").unlink()
    refused(convert, checkpoint, "that another file of", "holds too")
    for path in checkpoint.glob("*.bin"):
        path.unlink()
    refused(convert, checkpoint, "holds no weights; expected files that end in .bin")


def test_an_index_cannot_reach_outside_of_its_folder(convert, checkpoint):
    (checkpoint / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../x.bin"}}')
    refused(convert, checkpoint, "is not an index of a checkpoint")


def test_another_tokenizer_is_refused(convert, checkpoint):

    Inner(BPE(vocab={"<s>": 0, "</s>": 1}, merges=[])).save(str(checkpoint / "tokenizer.json"))
    refused(convert, checkpoint, "is not the one of this model", "got bos 0, eos 1, pad None")
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer.model").write_bytes(published.sentencepiece_model(kind=1))
    refused(convert, checkpoint, "is not a byte-pair model")
    (checkpoint / "tokenizer.model").write_bytes(b"no model")
    refused(convert, checkpoint, "is not a SentencePiece model")
    (checkpoint / "tokenizer.model").unlink()
    refused(convert, checkpoint, "holds no tokenizer; expected tokenizer.json or tokenizer.model")


def test_a_full_disk_is_told_before_anything_is_written(convert, checkpoint, monkeypatch):

    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: _Free)
    refused(convert, checkpoint, "the disk is too full for model.safetensors; expected 19 MB")


class _Free:
    free = 1000


def test_existing_folders_are_not_replaced(convert, checkpoint):
    out = checkpoint.parent / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    code, said = convert(checkpoint)
    assert code == 2 and "holds thesis.txt, which mmi did not write" in said
    assert (out / "thesis.txt").read_text() == "mine"
