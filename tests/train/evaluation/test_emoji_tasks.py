"""Evaluation of models of emoji."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mmi_deploy.cli.app import app
from mmi_deploy.spec.config import with_fields
from mmi_deploy.spec.presets import tiny
from mmi_deploy.system.files import write_file
from mmi_train.data.document import TextPart
from mmi_train.data.emoji.documents import EmojiCorpus, EmojiDocument, EmojiImage
from mmi_train.data.emoji.emoji_set import render, write_set
from mmi_train.data.emoji.packages import read_icons
from mmi_train.evaluation import emoji_tasks
from mmi_train.evaluation.emoji_tasks import evaluate
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.training import from_scratch
from mmi_train.training.loop import RunConfig
from mmi_train.weights.model_folder import TOKENIZER, load_model, save_model
from train.data.emoji.packages import write_packages


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> EmojiCorpus:
    return EmojiCorpus(render(read_icons(*write_packages(tmp_path_factory.mktemp("packages")))))


@pytest.fixture(scope="module")
def model(corpus: EmojiCorpus) -> MMInterleaved:
    torch.manual_seed(0)
    vocabulary = corpus.tokenizer().get_vocab_size()
    return MMInterleaved(with_fields(tiny(), {"llama.vocab": vocabulary}))


class _Answers:
    """Evaluator that knows the document of each prompt, and answers with `answer(document)`."""

    batch = 4
    answer: Any

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def prompt(self, document: EmojiDocument, target: int) -> tuple[EmojiDocument, int]:
        return document, target

    def write(self, prompts: list[tuple[EmojiDocument, int]]) -> list[str]:
        return [type(self).answer(*prompt) for prompt in prompts]

    draw = write


def _scores(
    monkeypatch: pytest.MonkeyPatch, corpus: EmojiCorpus, answer: Any, count: int = 12
) -> dict[str, dict[str, float | int]]:
    monkeypatch.setattr(emoji_tasks, "Evaluator", type("Own", (_Answers,), {"answer": answer}))
    model: Any = object()
    made = evaluate(model, model, corpus, count=count, without=False)
    return made.scores.as_json()


def _right(document: EmojiDocument, target: int) -> Any:
    part = document.parts[target]
    return part.text if isinstance(part, TextPart) else part.image


def test_right_answers_have_all_points(
    monkeypatch: pytest.MonkeyPatch, corpus: EmojiCorpus
) -> None:
    found = _scores(monkeypatch, corpus, staticmethod(_right))
    assert len(found) == 13
    for measure, row in found.items():
        assert row["train"] == row["held_out"] == 1, measure


def test_another_emoji_has_none(monkeypatch: pytest.MonkeyPatch, corpus: EmojiCorpus) -> None:
    """The name of the emoji's other colour shares one word; the picture is another's."""

    def other(document: EmojiDocument, target: int) -> Any:
        part = document.parts[target]
        if isinstance(part, TextPart):
            return "small thing on pink." if document.kind == "caption" else "no."
        assert isinstance(part, EmojiImage)
        following = (part.scene.index + 1) % len(corpus.emoji.emoji)
        return corpus.picture(replace(part.scene, index=following))

    found = _scores(monkeypatch, corpus, staticmethod(other))
    for measure, row in found.items():
        if "retrieved" in measure or "answer" in measure or "exact" in measure:
            assert row["train"] == row["held_out"] == 0, measure
    assert found["caption: a word of its name or keywords"]["train"] == 1


def test_noise_is_retrieved_by_chance(monkeypatch: pytest.MonkeyPatch, corpus: EmojiCorpus) -> None:
    rng = np.random.default_rng(0)

    def noise(document: EmojiDocument, target: int) -> Any:
        shape = (64, 64, 3)
        is_text = isinstance(document.parts[target], TextPart)
        return "." if is_text else rng.integers(0, 256, shape).astype(np.uint8)

    found = _scores(monkeypatch, corpus, staticmethod(noise), count=60)
    assert found["drawing: retrieved of 100"]["train"] < 0.2  # of 32 emoji


@pytest.mark.slow
def test_a_model_is_trained_and_evaluated_by_commands(
    monkeypatch: pytest.MonkeyPatch, corpus: EmojiCorpus, tmp_path: Path
) -> None:
    """Three steps of each stage: what is written can be read, and pictures are drawn."""
    data, out = tmp_path / "set", tmp_path / "run"
    write_set(corpus.emoji, data, [])
    for stage in ("AUTOENCODER", "CONDITIONING", "INTERLEAVED"):
        few = replace(getattr(from_scratch, stage), steps=3, warmup=1)
        monkeypatch.setattr(from_scratch, stage, few)
    run = CliRunner()
    trained = run.invoke(app, ["train-tiny", "-o", str(out), "--emoji", str(data)])
    assert trained.exit_code == 0, (trained.output, trained.exception)
    sheet = tmp_path / "sheet.png"
    asked = ["evaluate", str(out / "model"), "--emoji", str(data), "--count", "2", "--steps", "1"]
    result = run.invoke(app, [*asked, "--pictures", str(sheet), "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(result.stdout)
    assert found["drawing: retrieved of 100"]["count"] == 2
    assert set(found["caption: exact"]["without_mmfs"]) == {"train", "held_out", "count"}
    assert sheet.is_file()
    table = run.invoke(app, [*asked, "--only-with"])
    assert "held out" in table.output and "MMFS off" not in table.output

    again = ["--start", str(out / "model"), "--new-autoencoder", "--autoencoder-steps", "4"]
    last = ["--conditioning-steps", "0", "--steps", "1", "--seed", "1", "-o", str(tmp_path / "x")]
    further = run.invoke(app, ["train-tiny", "--emoji", str(data), *again, *last])
    assert further.exit_code == 0, (further.output, further.exception)
    before, after = load_model(out / "model"), load_model(tmp_path / "x" / "model")
    vaes = [model.config.image_decoder.vae.scaling_factor for model in (before, after)]
    assert vaes[0] != vaes[1] and _distance(before, after, "image_decoder.vae.") > 1e-2
    assert 0 < _distance(before, after, "llm.") < 1e-3  # one step of training


def _distance(one: MMInterleaved, other: MMInterleaved, part: str) -> float:
    """Greatest difference of the weights of a part."""
    theirs = other.state_dict()
    return max(
        float((weight - theirs[name]).abs().max())
        for name, weight in one.state_dict().items()
        if name.startswith(part)
    )


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--new-autoencoder"], "--new-autoencoder is of --start"),
        (["--start", "x", "--autoencoder-steps", "4"], "the autoencoder of --start is kept"),
    ],
)
def test_autoencoder_options_that_contradict_each_other(
    options: list[str], why: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, ["train-tiny", "-o", str(tmp_path / "run"), *options])
    assert result.exit_code != 0 and why in str(result.exception)
    assert not (tmp_path / "run").exists()


def test_a_model_of_something_else_is_refused(
    corpus: EmojiCorpus, model: MMInterleaved, tmp_path: Path
) -> None:
    write_set(corpus.emoji, tmp_path / "set", [])
    (tmp_path / "model").mkdir()
    save_model(model, tmp_path / "model", torch.float16)
    tokenizer = corpus.tokenizer()
    tokenizer.add_tokens(["another"])
    write_file(tmp_path / "model" / TOKENIZER, tokenizer.to_str())
    asked = ["evaluate", str(tmp_path / "model"), "--emoji", str(tmp_path / "set")]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code != 0 and "their words differ" in str(result.exception)
    result = CliRunner().invoke(app, [*asked, "--world", "hard"])
    assert "--world is of scenes" in str(result.exception)


def test_precision_of_a_new_tiny_model_is_fp32() -> None:
    """bf16 is several times slower on CPUs without its instructions."""
    import inspect

    from mmi_train.cli.train_tiny import train_tiny

    assert inspect.signature(train_tiny).parameters["precision"].default == "fp32"
    assert RunConfig().precision == "bf16"
