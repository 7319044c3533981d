"""Distribution matching: its gradient, its pictures, whom a step trains, and where it leads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from safetensors.torch import load_file
from torch import Tensor, nn

from export.small_models import paper_reading, write_small_model
from mmi_deploy.errors import ConfigError, DocumentError
from mmi_deploy.spec.config import DistillationConfig, read_config
from mmi_train.data.synthetic.drawn_world import DrawnWorld
from mmi_train.data.synthetic.vocabulary import build_tokenizer
from mmi_train.data.synthetic.world import easy
from mmi_train.model.diffusion import scheduler_options
from mmi_train.training.fine_tuning import FineTuning, check_distillation, fine_tune
from mmi_train.training.loop import RunConfig
from mmi_train.training.lora import LoraConfig, read_adapters
from mmi_train.training.stages.distillation import Distillation, Rows, teacher_of
from mmi_train.training.stages.distribution_matching import (
    DistributionMatchingStage,
    Turn,
    critic_of,
)
from mmi_train.training.stages.interleaved import InterleavedStage
from mmi_train.weights.model_folder import CONFIG, WEIGHTS, load_model

CPU = torch.device("cpu")
DMD = Distillation("dmd", guidance=2.5, solver_steps=4, draws=1, critic_updates=2)
RUN = RunConfig(precision="fp32", average=0.9, checkpoint_every=1, log_every=1)
TUNING = FineTuning(groups="unet", lora=None, rate=1e-3, distill=DMD)
MIXTURE = {"drawing": 2, "segmentation": 1}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = paper_reading()
    config = replace(config, llama=replace(config.llama, context=128))
    return write_small_model(tmp_path_factory.mktemp("start"), config)


def stage_of(start: Path, settings: Distillation) -> DistributionMatchingStage:
    model = load_model(start)
    for name, parameter in model.named_parameters():
        own = name.startswith("image_decoder.unet.") and "look_back" not in name
        parameter.requires_grad_(own)
    source = InterleavedStage(model, build_tokenizer(), DrawnWorld(easy()), MIXTURE)
    config = settings.config_of(model.config.image_decoder)
    teacher = teacher_of(model.image_decoder.unet)
    return DistributionMatchingStage(source, teacher, 2, settings, config)


def rows_of(stage: DistributionMatchingStage) -> Rows:
    rows = stage.rows(stage.batch(0, np.random.default_rng(0)))
    assert rows is not None
    return rows


def test_the_gradient_is_the_critics_picture_less_the_guided_teachers(start: Path) -> None:
    """Against diffusers' data predictions, and branches that are computed one by one."""
    stage = stage_of(start, DMD)
    rows = rows_of(stage)
    with torch.no_grad():
        for parameter in stage.critic.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    drawn = torch.randn_like(rows.latents).requires_grad_()
    torch.manual_seed(5)
    stage._matching_loss(drawn, rows).backward()

    torch.manual_seed(5)
    ddim = DDIMScheduler(**scheduler_options(stage.diffusion.config), clip_sample=False)
    ddim.set_timesteps(stage.diffusion.config.steps)
    timestep = torch.randint(20, 980, (len(drawn),))
    noise = torch.randn_like(drawn)
    noisy = ddim.add_noise(drawn.detach(), noise, timestep)

    def data(predicted: Tensor) -> Tensor:
        steps = (
            ddim.step(predicted[row : row + 1], int(timestep[row]), noisy[row : row + 1])
            for row in range(len(noisy))
        )
        return torch.cat([step.pred_original_sample for step in steps])

    null = stage.model.image_decoder.null_condition
    without = replace(rows, condition=null.expand_as(rows.condition))
    with torch.no_grad():
        conditional = stage.teacher(noisy, timestep, rows)
        unconditional = stage.teacher(noisy, timestep, without)
        likely = data(unconditional + 2.5 * (conditional - unconditional))
        usual = data(stage.critic(noisy, timestep, rows))
    distance = (drawn.detach() - likely).abs().flatten(1).mean(1)[:, None, None, None]
    expected = (usual - likely) / distance / drawn.numel()
    assert drawn.grad is not None
    torch.testing.assert_close(drawn.grad, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))


def test_the_student_draws_as_the_consistency_sampler_does(start: Path) -> None:
    """diffusers' `LCMScheduler`, with the same noise, to each of four steps."""
    stage = stage_of(start, DMD)
    rows = rows_of(stage)
    for step in range(4):
        torch.manual_seed(step)
        found = stage._drawn(rows, step)
        assert found.requires_grad
        scheduler = LCMScheduler(
            **scheduler_options(stage.diffusion.config), original_inference_steps=4
        )
        scheduler.set_timesteps(4)
        unused = torch.Generator()
        torch.manual_seed(step)
        latents = torch.randn_like(rows.latents)
        for index, timestep in enumerate(scheduler.timesteps[: step + 1]):
            with torch.no_grad():
                predicted = stage.student(latents, timestep.expand(len(latents)), rows)
            denoised = scheduler.step(predicted, timestep, latents, generator=unused).denoised
            if index < step:
                following = scheduler.timesteps[index + 1][None]
                latents = scheduler.add_noise(denoised, torch.randn_like(latents), following)
        torch.testing.assert_close(found.detach(), denoised, rtol=1e-4, atol=1e-4)


def test_a_student_at_its_teacher_is_left_there(start: Path) -> None:
    """With guidance 1 the new critic is the teacher. With guidance 3 it is not."""
    losses = {}
    for scale in (1.0, 3.0):
        stage = stage_of(start, replace(DMD, guidance=scale))
        batch = stage.batch(0, np.random.default_rng(0))
        torch.manual_seed(0)
        losses[scale] = float(stage.losses(batch)["dmd"].detach())
    assert losses[1.0] < 1e-7 < 1e-3 < losses[3.0]


def test_the_student_learns_from_every_second_micro_batch_and_the_critic_from_all(
    start: Path,
) -> None:
    stage = stage_of(start, DMD)
    unet, critic = stage.model.image_decoder.unet, stage.critic.unet
    for index in range(4):
        stage.module.zero_grad(set_to_none=True)
        losses = stage.losses(stage.batch(index, np.random.default_rng(index)))
        losses["total"].backward()
        learned = [
            any(p.grad is not None and bool(p.grad.any()) for p in part.parameters())
            for part in (unet, critic)
        ]
        assert learned == [index % 2 == 0, True]
        assert not any(p.grad is not None for p in stage.teacher.parameters())
        assert ("dmd" in losses) == (index % 2 == 0)


class Normal(nn.Module):
    """Best denoiser of latents from a normal distribution, whose mean and deviation can learn:
    prediction of v."""

    def __init__(self, stage: DistributionMatchingStage, mean: float, deviation: float) -> None:
        super().__init__()
        self.diffusion = stage.diffusion
        self.mean = nn.Parameter(torch.tensor(mean))
        self.log = nn.Parameter(torch.tensor(deviation).log())

    def forward(self, noisy: Tensor, timestep: Tensor, rows: Rows) -> Tensor:
        signal, sigma = self.diffusion.rates(timestep)
        variance = (2 * self.log).exp()
        gain = signal * variance / (signal**2 * variance + sigma**2)
        data = self.mean + gain * (noisy - signal * self.mean)
        noise = (noisy - signal * data) / sigma
        return signal * noise - sigma * data


class Generator(nn.Module):
    """Student whose picture is its noisy latents, shifted and scaled: prediction of v."""

    def __init__(self, stage: DistributionMatchingStage) -> None:
        super().__init__()
        self.diffusion = stage.diffusion
        self.mean, self.log = nn.Parameter(torch.tensor(-1.0)), nn.Parameter(torch.tensor(0.5))

    def forward(self, noisy: Tensor, timestep: Tensor, rows: Rows) -> Tensor:
        signal, sigma = self.diffusion.rates(timestep)
        data = self.mean + self.log.exp() * noisy
        return (signal * noisy - data) / sigma


def test_pictures_come_to_the_teachers_distribution(start: Path) -> None:
    """Normal distributions, whose best denoisers are known: a student of mean -1 and deviation 1.65
    that draws in one step ends at the teacher's 0.8 and 0.3."""
    stage = stage_of(start, replace(DMD, guidance=1.0))
    assert stage.diffusion.config.prediction == "v_prediction"
    rows = rows_of(stage)
    rows = replace(rows, latents=torch.zeros(64, 1, 8, 8))
    student, critic = Generator(stage), Normal(stage, -1.0, 1.65)
    stage.student, stage.critic = student, critic  # type: ignore[assignment]
    stage.teacher, stage.branches = Normal(stage, 0.8, 0.3), 1  # type: ignore[assignment]
    torch.manual_seed(0)
    adam = torch.optim.Adam([*student.parameters(), *critic.parameters()], lr=0.02)
    for step in range(900):
        if step == 600:
            adam.param_groups[0]["lr"] = 0.004
        adam.zero_grad(set_to_none=True)
        stage.row_losses(rows, Turn(None, 0, student=step % 3 == 0))["total"].backward()
        adam.step()
    drawn = stage._drawn(rows, 0).detach()
    assert float(drawn.mean()) == pytest.approx(0.8, abs=0.05)
    assert float(drawn.std()) == pytest.approx(0.3, abs=0.05)


def test_a_run_resumes_with_its_critic_and_writes_a_model_without(
    start: Path, tmp_path: Path
) -> None:
    class Stopped(Exception):
        pass

    def stop(what: str, done: int = 0, total: int = 0, **more: str) -> None:
        if (what, done) == ("distil-dmd", 2):
            raise Stopped

    whole = fine_tune(start, easy(), tmp_path / "whole", 3, TUNING, RUN, CPU)
    with pytest.raises(Stopped):
        fine_tune(start, easy(), tmp_path / "out", 3, TUNING, RUN, CPU, progress=stop)
    assert (tmp_path / "out/distil-dmd").is_dir()
    resumed = fine_tune(start, easy(), tmp_path / "out", 3, TUNING, RUN, CPU)
    assert (resumed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    before, after = load_file(start / WEIGHTS), load_file(whole / WEIGHTS)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("image_decoder.unet.") for name in changed)
    assert not any("look_back" in name for name in changed)
    own = read_config(whole / CONFIG).image_decoder
    assert own.distillation == DistillationConfig("dmd", 2.5, 4) and own.branches == 1


def test_adapters_of_student_and_critic_learn(start: Path, tmp_path: Path) -> None:
    """And what has adapters is one tensor in critic and teacher."""
    lora = LoraConfig(layers=("unet",), rank=2, alpha=4.0)
    tuning = replace(TUNING, groups=None, lora=lora)
    fine_tune(start, easy(), tmp_path, 1, tuning, RUN, CPU)
    layers = read_adapters(tmp_path / "adapters").layers
    assert layers and all(layer.startswith("image_decoder.unet.") for layer in layers)
    learned = load_file(next(tmp_path.glob("distil-dmd/step-*/model.safetensors")))
    for prefix in ("model.image_decoder.unet.", "critic."):
        adapters = [value for name, value in learned.items() if name.startswith(prefix)]
        assert len(adapters) == 2 * len(layers) and any(bool(value.any()) for value in adapters)
    stage = stage_of(start, DMD)
    unet = stage.model.image_decoder.unet
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    own = dict(critic_of(unet, stage.teacher.unet).named_parameters())
    shared = {name for name, value in stage.teacher.unet.named_parameters() if own[name] is value}
    assert shared == {name for name in own if not name.endswith("bias") or "look_back" in name}


def test_the_student_learns_in_every_second_step_of_several_micro_batches(
    start: Path, tmp_path: Path
) -> None:
    model = load_model(start)
    source = InterleavedStage(model, build_tokenizer(), DrawnWorld(easy()), MIXTURE)
    config, teacher = DMD.config_of(model.config.image_decoder), model.image_decoder.unet
    stage = DistributionMatchingStage(source, teacher, 2, DMD, config, accumulate=3)
    turns = [stage.batch(index, np.random.default_rng(0)).student for index in range(12)]
    assert turns == [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3
    # bf16: the steps without gradient leave nothing behind that the one with gradient would take.
    run = replace(RUN, accumulate=2, precision="bf16")
    whole = fine_tune(start, easy(), tmp_path, 1, TUNING, run, CPU)
    before, after = load_file(start / WEIGHTS), load_file(whole / WEIGHTS)
    name = "image_decoder.unet.conv_in.weight"
    assert name in before and not torch.equal(before[name], after[name])


def test_a_turn_of_the_critic_without_pictures_leaves_the_student(start: Path) -> None:
    stage = stage_of(start, DMD)
    stage.source.mixture = {"question": 2}  # type: ignore[attr-defined]
    losses = stage.losses(stage.batch(1, np.random.default_rng(0)))
    losses["total"].backward()
    assert all(value.grad is None for value in stage.model.parameters())
    with pytest.raises(DocumentError, match="100 micro-batches in a row have no picture"):
        for index in range(100):
            stage.losses(stage.batch(index, np.random.default_rng(0)))


def test_settings_of_another_kind_are_refused_in_a_line(start: Path) -> None:
    decoder = read_config(start / CONFIG).image_decoder
    for settings, said in (
        (Distillation("lcm", critic_updates=2), "critic_updates has no meaning for lcm"),
        (Distillation("dmd", huber=0.1), "huber has no meaning for dmd"),
        (Distillation("guidance", solver_steps=4), "solver_steps has no meaning for guidance"),
        (Distillation("lcm", solver_steps=1), "at least 2 solver steps"),
    ):
        with pytest.raises(ConfigError, match=said):
            settings.config_of(decoder)
    assert Distillation("dmd", solver_steps=1).config_of(decoder).solver_steps == 1
    assert "critic_updates" not in str(Distillation("lcm"))  # as earlier runs say it
    dropping = LoraConfig(layers=("unet",), rank=2, dropout=0.1)
    with pytest.raises(ConfigError, match="without dropout"):
        check_distillation(start, None, replace(TUNING, groups=None, lora=dropping), 1)
