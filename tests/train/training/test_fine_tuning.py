"""Fine-tuning a model folder: what learns, what stays, resumption, and the command."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from export.small_models import paper_reading, write_small_model
from mmi_deploy.cli.app import run as command
from mmi_deploy.errors import ConfigError, MmiError, WeightsError
from mmi_deploy.spec.config import read_config
from mmi_train.data.document_file import DocumentFile
from mmi_train.training.fine_tuning import DiffusionChange, FineTuning, fine_tune, steps_of
from mmi_train.training.loop import RunConfig
from mmi_train.training.lora import LoraConfig, read_adapters
from mmi_train.training.merging import merge
from mmi_train.training.recipes import assignments
from mmi_train.training.settings import settings_of
from mmi_train.weights.model_folder import CONFIG, TOKENIZER, WEIGHTS, load_model, save_model

CPU = torch.device("cpu")
TUNING = FineTuning(batch=2, lora=LoraConfig(rank=2, alpha=4.0), rate=1e-2)
RUN = RunConfig(precision="fp32", average=0.0, checkpoint_every=2, log_every=1)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    return write_small_model(folder, paper_reading(), torch.float16)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions of given pictures, and pictures to draw."""
    folder = tmp_path_factory.mktemp("documents")
    lines = []
    for index, colour in enumerate(("red", "blue", "green", "yellow", "white", "black")):
        Image.new("RGB", (40, 50), colour).save(folder / f"{colour}.png")
        text, picture = {"text": f"a {colour} square."}, {"image": f"{colour}.png"}
        given = [{**picture, "learn": False}, text]
        lines.append(given if index % 2 else [{**text, "learn": False}, picture])
    path = folder / "documents.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def changed(start: Path, folder: Path) -> set[str]:
    before, after = weights(start), weights(folder)
    assert before.keys() == after.keys()
    assert all(after[name].dtype == value.dtype for name, value in before.items())
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def tune(start: Path, documents: Path, out: Path, tuning: FineTuning, steps: int = 4) -> Path:
    return fine_tune(start, DocumentFile(documents), out, steps, tuning, RUN, CPU)


def test_adapters_change_the_matrices_that_have_them_alone(
    start: Path, documents: Path, tmp_path: Path
) -> None:
    before = (start / WEIGHTS).read_bytes()
    model = tune(start, documents, tmp_path, TUNING)
    adapters = read_adapters(tmp_path / "adapters")
    layers = adapters.layers
    assert changed(start, model) == {f"{layer}.weight" for layer in layers}
    assert any(name.startswith("llm.") for name in layers)
    assert any(name.startswith("image_decoder.unet.") for name in layers)
    for name in (CONFIG, TOKENIZER):
        assert (model / name).read_bytes() == (start / name).read_bytes()
    assert (start / WEIGHTS).read_bytes() == before
    load_model(model)
    merge(start, tmp_path / "adapters", tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("groups", "learning", "frozen"),
    [
        (
            "published",
            r"\.look_back\.|^vision\.resampler|^head\.head_new",
            r"^llm\..*_proj\.weight",
        ),
        ("table_12", r"^llm\..*mlp", r"^vision\.encoder\.layers\.|\.vae\."),
        ("all", r"^llm\.|^vision\.encoder\.layers\.", r"\.vae\."),
    ],
)
def test_groups_of_weights_learn_themselves(
    start: Path, documents: Path, tmp_path: Path, groups: str, learning: str, frozen: str
) -> None:
    tuning = replace(TUNING, groups=groups, lora=None)
    model = tune(start, documents, tmp_path, tuning, steps=2)
    found = changed(start, model)
    assert any(re.search(learning, name) for name in found)
    plain = {name for name in found if "look_back" not in name}
    assert not [name for name in plain if re.search(frozen, name)]
    assert not (tmp_path / "adapters").exists()


def test_a_run_that_is_broken_off_goes_on_to_the_same_weights(
    start: Path, documents: Path, tmp_path: Path
) -> None:
    whole = tune(start, documents, tmp_path / "whole", TUNING)

    class Stopped(Exception):
        pass

    def stop(what: str, done: int = 0, total: int = 0, **more: str) -> None:
        if what == "documents" and done == 3:
            raise Stopped

    arguments = (start, DocumentFile(documents), tmp_path / "again", 4, TUNING, RUN, CPU)
    with pytest.raises(Stopped):
        fine_tune(*arguments, progress=stop)
    # The checkpoint of step 2 has left a usable model.
    assert changed(start, tmp_path / "again" / "model")
    again = fine_tune(*arguments)
    assert (again / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_runs_that_differ_do_not_share_a_folder(
    start: Path, documents: Path, tmp_path: Path
) -> None:
    tune(start, documents, tmp_path / "out", TUNING, steps=1)
    more = tmp_path / "more.jsonl"
    for picture in documents.parent.glob("*.png"):
        (tmp_path / picture.name).write_bytes(picture.read_bytes())
    more.write_text(documents.read_text() + '\n[{"text": "a red ring."}]')
    other = tmp_path / "other"
    save_model(load_model(start), other, torch.bfloat16)
    (other / TOKENIZER).write_bytes((start / TOKENIZER).read_bytes())
    for begun, data, tuning, differing in (
        (start, more, TUNING, "data"),
        (other, documents, TUNING, "start"),
        (start, documents, replace(TUNING, rate=1e-3), "rate"),
        (start, documents, replace(TUNING, lora=LoraConfig(rank=3, alpha=4.0)), "lora"),
    ):
        with pytest.raises(WeightsError, match=f"other settings.*{differing}"):
            tune(begun, data, tmp_path / "out", tuning, steps=1)


def test_the_model_that_it_starts_from_and_the_users_files_stay(
    start: Path, documents: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in (CONFIG, TOKENIZER, WEIGHTS):
        (model / name).write_bytes((start / name).read_bytes())
    for begun in (start, model):
        with pytest.raises(MmiError, match="model"):
            tune(begun, documents, tmp_path, TUNING)
    assert (model / WEIGHTS).read_bytes() == (start / WEIGHTS).read_bytes()


def test_numbers_beyond_half_precision_are_refused(
    start: Path, documents: Path, tmp_path: Path
) -> None:
    tuning = replace(TUNING, rate=1e6)
    with pytest.raises(WeightsError, match="has grown beyond float16.*lower the rate|not finite"):
        tune(start, documents, tmp_path, tuning, steps=1)


def test_nothing_to_learn_and_unknown_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match="nothing would learn"):
        FineTuning(lora=None).optimiser(10)
    with pytest.raises(ConfigError, match="expected published, table_11.*got table_10"):
        FineTuning(groups="table_10").optimiser(10)


def test_epochs_are_steps_and_the_rate_rises_in_a_tenth_of_them() -> None:
    assert steps_of(3, 200, 16) == 38 and steps_of(0.01, 10, 4) == 1
    assert FineTuning().optimiser(38).warmup == 4
    assert FineTuning().optimiser(50_000).warmup == 1000


def test_the_command_trains_and_tells_what_it_left_out(
    start: Path, documents: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = documents.parent / "some-broken.jsonl"
    data.write_text(documents.read_text() + '\n[{"image": "none.png"}]\n{\n')
    out = tmp_path / "run"
    line = ["train", str(start), "--data", str(data), "-o", str(out), "--lora", "2", "--batch", "2"]
    assert command([*line, "--epochs", "1", "--device", "cpu", "--workers", "1"]) == 0
    said, told = capfd.readouterr()
    assert said == f"{out / 'model'}: export it with `mmi export {out / 'model'}`\n"
    assert "line 7 of" in told and "there is no picture" in told
    assert "line 8 of" in told and "not JSON" in told
    assert told.count("is left out") == 2 and "Warning" not in told
    assert command([*line, "--epochs", "1", "--device", "cpu", "--max-bad", "1"]) == 0  # is done
    assert command([*line[:-5], str(tmp_path / "b"), "--device", "cpu", "--max-bad", "1"]) == 2
    assert "more than 1 documents cannot be read" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "none.jsonl"], "cannot read none.jsonl"),
        (["--data", "DATA", "--images", "none"], "there is no folder none"),
        (["--data", "DATA", "--groups", "table_99"], "these groups of weights are unknown"),
        (["--data", "DATA", "--lora", "0"], "nothing would learn"),
        (["--data", "DATA", "--rate", "0"], "--rate"),
        (["--data", "DATA", "--epochs", "-1"], "--epochs"),
        (["--data", "DATA", "--device", "tpu"], "--device"),
        ([], "--data"),
    ],
)
def test_bad_options_are_one_readable_line(
    start: Path,
    documents: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    options = [str(documents) if option == "DATA" else option for option in options]
    assert command(["train", str(start), "-o", str(tmp_path / "run"), *options]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("mmi: ") == 1 and "Traceback" not in err
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate. Error code 12 (Cannot allocate memory)"),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_out_of_memory_says_what_to_lower(
    start: Path,
    documents: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("mmi_train.training.stages.documents.DocumentsStage.losses", fail)
    line = ["train", str(start), "--data", str(documents), "-o", str(tmp_path / "run")]
    assert command([*line, "--device", "cpu"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("mmi: there is not enough memory for this run. give --checkpoint-grad")


def test_a_full_disk_leaves_the_last_checkpoint_and_is_one_line(
    start: Path,
    documents: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from safetensors.torch import save_file

    written = []

    def save(tensors: dict[str, Tensor], path: Path) -> None:
        written.append(path)
        if len(written) > 4:  # in the second checkpoint
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr("mmi_train.training.checkpoints.save_file", save)
    line = ["train", str(start), "--data", str(documents), "-o", str(tmp_path / "run"), "--steps"]
    assert command([*line, "2", "--checkpoint-every", "1", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("mmi: the disk is full")
    kept = [path.name for path in (tmp_path / "run" / "documents").glob("*step*")]
    assert kept == ["step-00000001"]
    assert (tmp_path / "run" / "model" / WEIGHTS).is_file()


def test_a_folder_that_is_no_model_is_refused(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for model in ("empty", "absent"):
        line = ["train", str(tmp_path / model), "--data", str(documents), "-o", str(tmp_path / "o")]
        assert command(line) == 2
        assert "mmi: " in (err := capsys.readouterr().err) and "Traceback" not in err


def test_learning_lowers_the_loss_of_its_documents(
    start: Path, documents: Path, tmp_path: Path
) -> None:
    """Texts that a model with random weights learns by heart with its adapters."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tuning = replace(TUNING, batch=6, image_weight=0.0, lora=LoraConfig(rank=8, alpha=16.0))
    tune(start, documents, tmp_path, tuning, steps=12)
    curves = EventAccumulator(str(tmp_path / "documents" / "curves"))
    curves.Reload()
    text = [event.value for event in curves.Scalars("documents/text")]
    assert np.mean(text[-3:]) < 0.8 * text[0], text


def test_a_run_changes_the_diffusion_and_writes_it_with_the_model(
    start: Path, documents: Path, tmp_path: Path
) -> None:
    """As `--set diffusion.min_snr_gamma=5` asks; the start model stays as it is."""
    asked = assignments(["diffusion.rescale_betas_zero_snr=true", "diffusion.min_snr_gamma=5"])
    tuning = settings_of(asked)[0].tuning()
    before = read_config(start / CONFIG)
    model = tune(start, documents, tmp_path, replace(TUNING, diffusion=tuning.diffusion), 1)
    diffusion = read_config(model / CONFIG).image_decoder.diffusion
    assert diffusion == replace(
        before.image_decoder.diffusion, rescale_betas_zero_snr=True, min_snr_gamma=5.0
    )
    assert read_config(start / CONFIG) == before
    assert load_model(model).image_decoder.diffusion.signal[-1] == 0
    off = DiffusionChange(min_snr_gamma=0).of(read_config(model / CONFIG))
    assert off.image_decoder.diffusion.min_snr_gamma is None


def test_a_change_of_the_diffusion_that_does_not_fit_is_refused(
    start: Path, documents: Path, tmp_path: Path
) -> None:
    change = DiffusionChange(prediction="epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(ConfigError, match="rescale_betas_zero_snr needs the prediction"):
        tune(start, documents, tmp_path, replace(TUNING, diffusion=change))
    with pytest.raises(ConfigError, match=r"diffusion\.min_snr_gama.*diffusion\.min_snr_gamma"):
        settings_of(assignments(["diffusion.min_snr_gama=5"]))
