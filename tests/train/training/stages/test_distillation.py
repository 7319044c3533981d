"""Distillation: the losses against their equations, what learns, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from safetensors.torch import load_file

from export.small_models import paper_reading, random_model, write_small_model
from mmi_deploy.cli.app import run as command
from mmi_deploy.errors import ConfigError, WeightsError
from mmi_deploy.spec.config import DiffusionConfig, DistillationConfig, read_config
from mmi_train.data.synthetic.drawn_world import DrawnWorld
from mmi_train.data.synthetic.vocabulary import build_tokenizer
from mmi_train.data.synthetic.world import easy
from mmi_train.model.consistency import boundary_scalings, solver_step, solver_timesteps
from mmi_train.model.diffusion import Diffusion, scheduler_options
from mmi_train.training.fine_tuning import FineTuning, fine_tune
from mmi_train.training.loop import RunConfig
from mmi_train.training.lora import LoraConfig, read_adapters
from mmi_train.training.optimiser import GROUPS
from mmi_train.training.stages.distillation import Distillation, GuidanceStage, teacher_of
from mmi_train.training.stages.interleaved import InterleavedStage
from mmi_train.weights.model_folder import CONFIG, WEIGHTS, load_model, save_model

CPU = torch.device("cpu")
RUN = RunConfig(precision="fp32", average=0.9, checkpoint_every=1, log_every=1)
LCM = Distillation("lcm", guidance=2.5, solver_steps=20, draws=2)
TUNING = FineTuning(groups="unet", lora=None, rate=1e-3, distill=LCM)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    return write_small_model(folder, paper_reading())


@pytest.fixture(scope="module")
def student(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A consistency model, trained for two steps."""
    return fine_tune(start, easy(), tmp_path_factory.mktemp("lcm"), 2, TUNING, RUN, CPU)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_solver_is_ddim_and_the_scalings_are_those_of_lcm(prediction: str) -> None:
    """diffusers' DDIM step over the same timesteps, and `LCMScheduler`'s scalings."""
    config = DiffusionConfig(prediction)  # type: ignore[arg-type]
    grid = solver_timesteps(config, 50)
    lcm = LCMScheduler(**scheduler_options(config), original_inference_steps=50)
    lcm.set_timesteps(50)
    assert grid.tolist() == lcm.timesteps.flip(0).tolist()
    ddim = DDIMScheduler(
        **scheduler_options(config), clip_sample=False, timestep_spacing="trailing"
    )
    ddim.set_timesteps(50)
    noisy, predicted = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    for t in (999, 499, 59):
        rows = torch.full((3,), t)
        got = solver_step(Diffusion(config), predicted, noisy, rows, rows - 20)
        expected = ddim.step(predicted, t, noisy).prev_sample
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
        skip, out = boundary_scalings(torch.tensor([t]))
        wanted = lcm.get_scalings_for_boundary_condition_discrete(t)
        torch.testing.assert_close(
            torch.stack([skip.squeeze(), out.squeeze()]), torch.tensor(wanted, dtype=torch.float32)
        )
    at_zero = [float(scaling) for scaling in boundary_scalings(torch.tensor([0]))]
    assert at_zero == [1.0, 0.0]


def test_a_student_that_predicts_what_the_guided_teacher_does_has_no_loss(start: Path) -> None:
    """Guidance 1 is the conditional branch: student and teacher are equal. Guidance 3 is not."""
    model = load_model(start)
    source = InterleavedStage(
        model, build_tokenizer(), DrawnWorld(easy()), {"drawing": 2, "segmentation": 1}
    )
    losses = {}
    for scale in (1.0, 3.0):
        settings = Distillation("guidance", scale, draws=2)
        own = settings.config_of(model.config.image_decoder)
        stage = GuidanceStage(source, teacher_of(model.image_decoder.unet), 2, settings, own)
        batch = stage.batch(0, np.random.default_rng(0))
        torch.manual_seed(0)
        losses[scale] = float(stage.losses(batch)["total"].detach())
    assert losses[1.0] < 1e-9 < 1e-4 < losses[3.0]


def test_only_the_unet_learns_and_the_configuration_says_what_it_is(
    start: Path, student: Path
) -> None:
    before, after = load_file(start / WEIGHTS), load_file(student / WEIGHTS)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("image_decoder.unet.") for name in changed)
    assert not any("look_back" in name for name in changed)
    own = read_config(student / CONFIG).image_decoder
    assert own.distillation == DistillationConfig("lcm", 2.5, 20) and own.branches == 1
    assert replace(own, distillation=None) == read_config(start / CONFIG).image_decoder
    assert "distillation" not in (start / CONFIG).read_text()


def test_a_run_that_is_broken_off_goes_on_to_the_same_weights(
    start: Path, student: Path, tmp_path: Path
) -> None:
    class Stopped(Exception):
        pass

    def stop(what: str, done: int = 0, total: int = 0, **more: str) -> None:
        if (what, done) == ("distil-lcm", 1):
            raise Stopped

    # The progress of step 1 comes before its checkpoint, that of the second run after it.
    run = replace(RUN, log_every=1)
    with pytest.raises(Stopped):
        fine_tune(start, easy(), tmp_path, 2, TUNING, run, CPU, progress=stop)
    again = fine_tune(start, easy(), tmp_path, 2, TUNING, run, CPU)
    assert (again / WEIGHTS).read_bytes() == (student / WEIGHTS).read_bytes()


def test_adapters_of_the_unet_learn_in_place_of_its_weights(start: Path, tmp_path: Path) -> None:
    lora = LoraConfig(layers=("unet",), rank=2, alpha=4.0)
    tuning = replace(TUNING, groups=None, lora=lora)
    model = fine_tune(start, easy(), tmp_path, 1, tuning, RUN, CPU)
    layers = read_adapters(tmp_path / "adapters").layers
    assert layers and all(layer.startswith("image_decoder.unet.") for layer in layers)
    assert read_config(model / CONFIG).image_decoder.branches == 1


def test_what_cannot_be_distilled_is_refused_in_a_line(
    start: Path, student: Path, tmp_path: Path
) -> None:
    other = paper_reading()
    save_model(random_model(replace(other, llama=replace(other.llama, layers=1))), tmp_path / "o")
    for folder, teacher, tuning, message in (
        (student, None, TUNING, "the teacher is distilled itself: lcm"),
        (start, tmp_path / "o", TUNING, "has another shape than the model: llama"),
        (student, None, replace(TUNING, distill=None), "the loss on pictures would undo that"),
        (start, None, replace(TUNING, lora=LoraConfig()), "a distillation trains the U-Net alone"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            fine_tune(folder, easy(), tmp_path / "out", 1, tuning, RUN, CPU, teacher=teacher)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"guidance 2\.5 alone.*got guidance 3\.5"):
        replace(LCM, guidance=3.5).config_of(
            replace(paper_reading().image_decoder, distillation=DistillationConfig("guidance", 2.5))
        )


def test_another_teacher_has_the_same_frozen_parts(
    start: Path, student: Path, tmp_path: Path
) -> None:
    """The student goes on from its teacher; a model with other embeddings is none."""
    fine_tune(student, easy(), tmp_path / "on", 1, TUNING, RUN, CPU, teacher=start)
    model = load_model(start)
    with torch.no_grad():
        model.boi_embedding.add_(1.0)
    save_model(model, tmp_path / "other")
    with pytest.raises(WeightsError, match=r"more than their U-Nets: boi_embedding"):
        fine_tune(
            student, easy(), tmp_path / "out", 1, TUNING, RUN, CPU, teacher=tmp_path / "other"
        )


def test_the_command(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", str(start), "--distill", "guidance", "--world", "easy", "--precision", "fp32"]
    assert command([*words, "-o", str(tmp_path / "out"), "--steps", "1"]) == 0
    made = read_config(tmp_path / "out/model" / CONFIG).image_decoder.distillation
    assert made == DistillationConfig("guidance", 3.5)
    assert command(["train", str(start), "--world", "easy", "-o", str(tmp_path / "no")]) == 2
    assert "add --distill" in capsys.readouterr().err
    assert "unet" in GROUPS
