"""Held-out losses, grids, trackers and traces of a run, none of which changes what it learns."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from export.small_models import paper_reading, write_small_model
from mmi_deploy.cli.app import run as command
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import DocumentError
from mmi_train.data.document_file import DocumentFile
from mmi_train.training.fine_tuning import FineTuning, Watching, fine_tune
from mmi_train.training.loop import RunConfig
from mmi_train.training.lora import LoraConfig
from mmi_train.training.ranks import ALONE
from mmi_train.training.stages.documents import DocumentsStage
from mmi_train.training.validation import VALUES, Validation, read_values
from mmi_train.weights.model_folder import TOKENIZER, WEIGHTS, load_model

TUNING = FineTuning(batch=2, lora=LoraConfig(rank=2, layers=("llm",)), rate=3e-2)
RUN = RunConfig(precision="fp32", average=0.5, checkpoint_every=1, log_every=1, keep=1)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    write_small_model(folder, paper_reading())
    Image.new("RGB", (40, 50), "blue").save(folder / "a.png")
    text, picture = {"text": "a red square."}, {"image": "a.png"}
    (folder / "texts.jsonl").write_text(json.dumps([text]))
    held = [[text, picture], [text], [{**picture, "learn": False}, text], [text, picture, text]]
    (folder / "held.jsonl").write_text("\n".join(map(json.dumps, held)))
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, [held[0], held[3]])))
    return folder


def tune(start: Path, out: Path, watching: Watching | None, steps: int = 2, **more: Any) -> bytes:
    documents = DocumentFile(start / "texts.jsonl")
    device = torch.device("cpu")
    fine_tune(start, documents, out, steps, TUNING, RUN, device, watching=watching, **more)
    return (out / "model" / WEIGHTS).read_bytes()


def test_a_run_is_measured_and_learns_the_same(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off and resumed, and unwatched."""
    monkeypatch.setattr("mmi_train.training.validation.SOLVER_STEPS", 2)
    watching = Watching(
        DocumentFile(start / "held.jsonl"), DocumentFile(start / "prompts.jsonl"), every=1
    )
    whole = tune(start, tmp_path / "whole", watching, steps=2)
    assert whole == tune(start, tmp_path / "plain", None)

    class Stopped(Exception):
        pass

    def stop(what: str, done: int = 0, total: int = 0, **more: str) -> None:
        if what == "documents" and done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        tune(start, tmp_path / "again", watching, progress=stop)
    assert tune(start, tmp_path / "again", watching) == whole
    values = read_values(tmp_path / "whole" / VALUES)
    assert [value["step"] for value in values] == [0, 1, 2]
    assert read_values(tmp_path / "again" / VALUES) == values
    assert len({value["text"] for value in values}) == 3
    for value in values:
        assert value["total"] == pytest.approx(value["text"] + 10 * value["image"])
    best = json.loads((tmp_path / "whole" / "best.json").read_text())
    assert best == min(values[1:], key=lambda value: value["total"])
    grid = Image.open(tmp_path / "whole" / "samples" / "step-00000002.png")
    assert np.asarray(grid).std() > 5


def test_the_averages_are_measured_and_the_best_checkpoint_stays(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worsening losses in the place of measured ones."""
    seen = []

    def losses(self: Validation, file: DocumentFile) -> dict[str, float]:
        model = self.stage.model
        assert not model.training and not torch.is_grad_enabled()
        weights = {n: v.detach().clone() for n, v in model.named_parameters() if "lora_B" in n}
        seen.append(weights)
        return {"total": float(len(seen))}

    monkeypatch.setattr(Validation, "_losses", losses)
    averages: list[dict[str, torch.Tensor]] = []
    from mmi_train.training import fine_tuning

    def kept(config: LoraConfig, base: Path, state: dict[str, torch.Tensor]) -> Any:
        averages.append({name: value.clone() for name, value in state.items()})
        return trained(config, base, state)

    trained = fine_tuning.trained_adapters
    monkeypatch.setattr(fine_tuning, "trained_adapters", kept)
    tune(start, tmp_path, Watching(DocumentFile(start / "held.jsonl"), every=1), steps=3)
    for measured, average in zip(seen[1:], averages, strict=True):
        assert measured and all(torch.equal(value, average[n]) for n, value in measured.items())
    kept_steps = sorted(path.name for path in (tmp_path / "documents").glob("step-*"))
    assert kept_steps == ["step-00000001", "step-00000003"]
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 1


def test_values_do_not_depend_on_the_batch(start: Path, tmp_path: Path) -> None:
    model = load_model(start)
    tokenizer = Tokenizer.open(start / TOKENIZER, model.config.tokens)
    file, found = DocumentFile(start / "held.jsonl"), []
    for size in (1, 3):
        stage = DocumentsStage(model, tokenizer, file, size)
        validation = Validation(stage, file, None, tmp_path, 1, ALONE)
        torch.manual_seed(size)
        with torch.no_grad():
            found.append(validation.measure(0))
    assert found[0] == pytest.approx(found[1], rel=1e-4) and min(found[0].values()) > 0


def test_documents_that_cannot_be_measured_end_the_run_before_its_first_step(
    start: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('[{"text": "a red square."}]\n[{"image": "none.png"}]')
    for watching, said in (
        (Watching(DocumentFile(broken)), "line 2 of .* cannot be used: there is no picture"),
        (Watching(None, DocumentFile(start / "texts.jsonl")), "line 1 .* no picture to draw"),
    ):
        with pytest.raises(DocumentError, match=said):
            tune(start, tmp_path / "out", watching)
        assert not (tmp_path / "out" / "model").exists()


def test_a_tracker_gets_the_curves_and_a_trace_is_written(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    library = SimpleNamespace(
        init=lambda **options: told.append(options),
        log=lambda values, step: told.append((step, values)),
        finish=lambda: told.append("finished"),
    )
    monkeypatch.setitem(sys.modules, "trackio", library)
    tune(start, tmp_path / "out", Watching(tracker="trackio", profile=1))
    begun, *logged, end = told
    assert begun["name"] == "out" and begun["config"]["rate"] == TUNING.rate
    assert [step for step, _ in logged] == [1, 2] and "documents/text" in logged[0][1]
    assert end == "finished"
    trace = json.loads((tmp_path / "out" / "documents" / "profile" / "rank-0.json").read_text())
    assert any(event.get("name") == "aten::linear" for event in trace["traceEvents"])


def test_a_tracker_that_is_not_installed_is_one_line(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = ["train", str(start), "--data", str(start / "texts.jsonl"), "-o", str(tmp_path / "out")]
    assert command([*line, "--device", "cpu", "--tracker", "wandb"]) == 2
    err = capsys.readouterr().err
    assert "the tracker wandb is not installed. install it with: pip install wandb" in err
    assert "Traceback" not in err


def test_the_command_finds_held_out_pictures_where_it_finds_all(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """All files elsewhere than their pictures."""
    for name in ("texts", "held"):
        (tmp_path / f"{name}.jsonl").write_text((start / f"{name}.jsonl").read_text())
    line = ["train", str(start), "--data", str(tmp_path / "texts.jsonl"), "--images", str(start)]
    line += ["-o", str(tmp_path / "out"), "--device", "cpu", "--lora", "2", "--steps", "1"]
    assert command([*line, "--validate", str(tmp_path / "held.jsonl"), "--max-bad", "0"]) == 0
    assert [value["step"] for value in read_values(tmp_path / "out" / VALUES)] == [0, 1]
