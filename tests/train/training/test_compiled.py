"""Compiled blocks: equal losses and gradients, no graph breaks, and a line without a compiler."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from export.small_models import paper_reading, random_model, write_small_model
from mmi_deploy.cli.app import run as command
from mmi_train.model.mm_interleaved import Batch, MMInterleaved
from mmi_train.training.compiled import compile_blocks, compiled_parts
from mmi_train.training.lora import LoraConfig, add_adapters

CPU = torch.device("cpu")


def small_model() -> MMInterleaved:
    """A block with MMFS and one without, with adapters."""
    config = paper_reading()
    model = random_model(replace(config, llama=replace(config.llama, mmfs_every=2)))
    add_adapters(model, LoraConfig(rank=2, layers=("llm",)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.train()


def losses_of(model: MMInterleaved, lengths: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Losses of texts of several lengths, and the sums of their gradients."""
    found = []
    for length in lengths:
        ids = torch.arange(length).remainder(50)[None] + 20
        ids[0, 0] = model.config.tokens.bos
        batch = Batch(ids, torch.full((1, 1), -1, dtype=torch.int32))
        loss = model(batch).text
        loss.backward()
        found.append(loss.detach())
    return found, [value.grad for value in model.parameters() if value.grad is not None]


@pytest.mark.exhaustive
def test_compiled_blocks_compute_what_they_did() -> None:
    """Texts of three lengths, after which nothing is compiled again, and gradient checkpointing."""
    lengths = (12, 17, 23)
    expected = losses_of(small_model(), lengths)
    model = small_model()
    compile_blocks(model, CPU)
    torch._dynamo.reset()
    counters.clear()
    for checkpointed in (False, True):
        model.zero_grad()
        model.checkpoint_gradients(checkpointed)
        (losses, gradients), (own_losses, own_gradients) = losses_of(model, lengths), expected
        torch.testing.assert_close(losses, own_losses, rtol=1e-5, atol=0)
        for ours, theirs in zip(gradients, own_gradients, strict=True):
            assert float((ours - theirs).norm()) <= 1e-4 * float(theirs.norm()) + 1e-7
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    made = counters["stats"]["unique_graphs"]
    losses_of(model, (14, 31))
    assert counters["stats"]["unique_graphs"] == made


def test_compiled_parts_are_whole_graphs() -> None:
    """Traced without a compiler; the training step meets no graph break."""
    expected = losses_of(small_model(), (12,))
    model = small_model()
    whole = [block for block in model.llm.blocks if block.look_back is None]
    assert whole and len(whole) < len(model.llm.blocks)
    for part in compiled_parts(model):
        part.compile(fullgraph=True, backend="eager")
    torch._dynamo.reset()
    for ours, theirs in zip(losses_of(model, (12,)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_without_a_compiler_the_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    write_small_model(tmp_path / "model", paper_reading())
    (tmp_path / "d.jsonl").write_text(json.dumps([{"text": "a red circle."}]))
    line = ["train", str(tmp_path / "model"), "--data", str(tmp_path / "d.jsonl"), "--compile"]
    assert command([*line, "-o", str(tmp_path / "out"), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert "--compile needs a C++ compiler, and there is none. install g++" in err
    assert "Traceback" not in err and not (tmp_path / "out" / "model").exists()
    assert command([*line, "-o", str(tmp_path / "out"), "--device", "cpu", "--four-bit"]) == 2
    err = capsys.readouterr().err
    assert "--compile with --four-bit has not been compared" in err
