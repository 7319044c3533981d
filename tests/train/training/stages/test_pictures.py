"""Pictures stage: the loss at each of its noise levels is the model's; the image decoder alone
learns; a run goes on where it was broken off."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from export.small_models import paper_reading, write_small_model
from mmi_deploy.cli.app import run as command
from mmi_deploy.spec.config import with_fields
from mmi_train.data.synthetic.drawn_world import DrawnWorld
from mmi_train.data.synthetic.vocabulary import build_tokenizer
from mmi_train.data.synthetic.world import easy
from mmi_train.model.image_decoder import RandomDraws
from mmi_train.training.from_scratch import StageSteps, train_from_scratch
from mmi_train.training.loop import RunConfig
from mmi_train.training.stages.interleaved import InterleavedStage
from mmi_train.training.stages.pictures import PicturesStage
from mmi_train.weights.model_folder import WEIGHTS, load_model

TINY = Path("assets/tiny")
RUN = RunConfig(precision="fp32", average=0.9, checkpoint_every=1, log_every=1)
DRAWS = 3
STEPS = StageSteps(main=0, pictures=2)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    return write_small_model(folder, with_fields(paper_reading(), {"llama.context": 128}))


def _trained(start: Path, out: Path) -> dict[str, torch.Tensor]:
    """Weights after two steps of the stage alone."""
    folder = train_from_scratch(load_model(start).config, out, start=start, steps=STEPS, run=RUN)
    return load_file(folder / WEIGHTS)


@torch.no_grad()
def test_every_noise_level_has_the_models_own_loss(
    start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean over the levels of `image_loss`, which knows one level a picture; stories see images,
    drawings see none."""
    model = load_model(start)
    source = InterleavedStage(
        model, build_tokenizer(), DrawnWorld(easy()), {"drawing": 2, "story": 2}
    )
    stage = PicturesStage(source, draws=DRAWS)
    batch = stage.batch(0, np.random.default_rng(0))
    assert batch.layout is not None and batch.layout.pictures is not None
    pictures = len(batch.layout.drawn)
    assert batch.layout.pictures.seeing is not None
    assert 0 < len(batch.layout.pictures.seeing) < pictures
    levels = model.image_decoder.random_draws(pictures * DRAWS, torch.Generator().manual_seed(1))
    monkeypatch.setattr(model.image_decoder, "random_draws", lambda count: levels)
    got = stage.losses(batch)["image"]

    images = model.encode_images(batch.pixels)
    hidden = model.read_rows(batch.token_ids, images, batch.layout.rows)
    each = []
    for level in range(DRAWS):
        block = slice(level * pictures, (level + 1) * pictures)
        draws = RandomDraws(*(getattr(levels, field.name)[block] for field in fields(levels)))
        each.append(model.image_loss(hidden, images, batch, draws)[0])
    assert pictures == len(batch.pictures)  # none is left out of the mean
    torch.testing.assert_close(got, torch.stack(each).mean(), atol=1e-6, rtol=1e-5)
    assert len({round(float(loss), 6) for loss in each}) == DRAWS


def test_the_image_decoder_alone_learns_also_its_look_at_images(
    start: Path, tmp_path: Path
) -> None:
    before, after = load_file(start / WEIGHTS), _trained(start, tmp_path / "run")
    changed = {
        name
        for name, value in before.items()
        if not torch.equal(value.half().float(), after[name].float())
    }
    assert all(name.startswith("image_decoder.") for name in changed)
    assert not any(name.startswith("image_decoder.vae.") for name in changed)
    for part in ("unet.look_back.", "unet.down_blocks.", "resampler.", "context_proj."):
        assert any(name.startswith(f"image_decoder.{part}") for name in changed), part


def test_a_run_that_is_broken_off_goes_on_to_the_same_weights(start: Path, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(what: str, done: int = 0, total: int = 0, **more: str) -> None:
        if (what, done) == ("pictures", 2):  # after the checkpoint of step 1
            raise Stopped

    arguments = {"start": start, "steps": STEPS, "run": RUN}
    config = load_model(start).config
    with pytest.raises(Stopped):
        train_from_scratch(config, tmp_path / "broken", progress=stop, **arguments)
    got = load_file(train_from_scratch(config, tmp_path / "broken", **arguments) / WEIGHTS)
    expected = _trained(start, tmp_path / "whole")
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


@pytest.mark.slow
def test_a_finished_run_is_not_set_back_to_its_main_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main stage, which is finished, reports its checkpoint again."""
    monkeypatch.setattr(DrawnWorld, "mixture", {"drawing": 1})
    monkeypatch.setattr(DrawnWorld, "picture_mixture", {"drawing": 1})
    steps, config = StageSteps(conditioning=0, main=1, pictures=1), load_model(TINY).config
    folder = train_from_scratch(config, tmp_path, start=TINY, steps=steps, run=RUN)
    assert (tmp_path / "interleaved").is_dir() and (tmp_path / "pictures").is_dir()
    finished = (folder / WEIGHTS).read_bytes()

    def unchanged(what: str, done: int = 0, total: int = 0, **more: str) -> None:
        assert (folder / WEIGHTS).read_bytes() == finished

    train_from_scratch(config, tmp_path, start=TINY, steps=steps, run=RUN, progress=unchanged)
    assert (folder / WEIGHTS).read_bytes() == finished


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--steps", "0"], "there is nothing to train"),
        (["--steps", "0", "--picture-steps", "2"], "a trained model as --start"),
        (
            ["--steps", "0", "--picture-steps", "2", "--start", "assets/tiny"]
            + ["--conditioning-steps", "3"],
            "followed by the main stage",
        ),
    ],
)
def test_stages_that_make_no_model_are_refused(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["train-tiny", *arguments, "-o", str(tmp_path / "run")]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
