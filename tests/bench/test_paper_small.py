"""The paper in small, at its smallest: every stage once, a table, and nothing run twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmi_bench.paper_small import __main__ as paper
from mmi_bench.paper_small import commands
from mmi_bench.paper_small.base_model import build_tokenizer
from mmi_bench.training import reading
from mmi_train.data.readers.templates import PROMPTS, filled
from mmi_train.data.synthetic.vocabulary import build_tokenizer as world_tokenizer
from mmi_train.evaluation.metrics.boxes import parse_box

SMALLEST = "--steps 1 --batch 1 --samples 10 --held-out 2 --threads 1".split()


@pytest.mark.slow
def test_the_small_paper_runs_once_and_prints_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert paper.run(["-o", str(out), *SMALLEST]) == 0
    table = capsys.readouterr().out
    benchmarks = [name for names in paper.BENCHMARKS.values() for name in names]
    assert all(f" {name} " in table for name in (*paper.BENCHMARKS, *benchmarks))
    done = [json.loads(line) for line in (out / commands.STAGES).read_text().splitlines()]
    trained = [one["stage"] for one in done if one["stage"].startswith("train ")]
    assert trained == [f"train {name}" for name in paper.BENCHMARKS]
    scored = {one["stage"]: one["metrics"] for one in done if one["metrics"]}
    assert {f"{name} by pretrain" for name in benchmarks} <= scored.keys()
    assert scored["ade20k by segmentation"]["mIoU"] > 20

    def fail(*_: object) -> int:
        raise AssertionError("a stage that is done was run again")

    monkeypatch.setattr(commands, "run", fail)
    assert paper.run(["-o", str(out), *SMALLEST]) == 0
    assert capsys.readouterr().out == table
    assert paper.run(["-o", str(out), *SMALLEST, "--rate", "1e-3"]) == 2
    assert "a run with other settings: train pretrain" in capsys.readouterr().err
    capsys.readouterr()
    options = ["--batches", "2", "--steps", "1", "--set", "batch=1", "--set", "data.mmc4.rows=1"]
    assert reading.run([str(out / "base"), str(out / "data"), *options]) == 0
    assert "times" in capsys.readouterr().out


def test_the_base_model_reads_the_published_prompts_and_writes_boxes() -> None:
    """Words of the drawn world keep their ids; what a box decodes to is read as that box."""
    tokenizer, world = build_tokenizer(), world_tokenizer()
    for word, number in world.get_vocab().items():
        assert tokenizer.token_to_id(word) == number
    for prompt in PROMPTS.values():
        text = filled(prompt.text, dict.fromkeys(("image", "question", "sentence"), ""))
        text = filled(text, dict.fromkeys(("caption", "history"), ""))
        assert "<unk>" not in tokenizer.encode(text).tokens, text
    box = "(249,041)(515,645)</box>"
    decoded = tokenizer.decode(tokenizer.encode(box).ids)
    assert parse_box(decoded) == (249.0, 41.0, 515.0, 645.0)
