"""A run that is killed at any moment ends with the weights of a run that never was."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mmi_deploy.errors import WeightsError
from mmi_train.training.checkpoints import RunState, latest_checkpoint, save_checkpoint
from mmi_train.training.loop import RunConfig, train
from mmi_train.training.optimiser import GroupRule, OptimiserConfig

REPOSITORY = Path(__file__).resolve().parents[3]
OPTIMISER = OptimiserConfig(
    rate=1e-2, steps=40, warmup=5, weight_decay=0.01, betas=(0.9, 0.99), eps=1e-8, rules=()
)
RUN = RunConfig(precision="fp32", accumulate=2, checkpoint_every=5, log_every=5, average=0.9)


class Regression:
    """A small stage: fit noise that depends on numpy's and on torch's draws."""

    name = "regression"

    def __init__(self, pause: float = 0.0) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.GELU(), nn.Flatten(), nn.LayerNorm(72), nn.Linear(72, 3)
        ).to(memory_format=torch.channels_last)
        self.pause = pause

    def describe(self) -> dict[str, object]:
        return {"model": "a small regression"}

    def batch(self, index: int, rng: np.random.Generator) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal((4, 2, 5, 5), dtype=np.float32))

    def losses(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        time.sleep(self.pause)
        error = self.module(inputs) - torch.rand(4, 3)
        return {"total": error.square().mean()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    path = latest_checkpoint(folder)
    assert path is not None
    return {
        f"{file.stem}:{name}": value
        for file in sorted(path.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(Regression(), OPTIMISER, RUN, folder)
    return weights(folder)


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert differing == []


def test_a_run_killed_again_and_again_gives_the_same_weights(tmp_path, undisturbed):
    """SIGKILL at arbitrary moments, among them while a checkpoint is written."""
    program = (
        "from tests.train.training.test_loop import *\n"
        f"train(Regression(pause=0.01), OPTIMISER, RUN, Path({str(tmp_path)!r}))"
    )
    rng = np.random.default_rng(0)
    kills = 0
    for _ in range(30):
        process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", program], cwd=REPOSITORY)
        begun = time.monotonic()
        while latest_checkpoint(tmp_path) is None and process.poll() is None:
            time.sleep(0.01)
            assert time.monotonic() - begun < 120
        try:
            process.wait(timeout=float(rng.uniform(0.02, 0.3)) if kills < 3 else 120)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills == 3
    assert_equal(weights(tmp_path), undisturbed)


def test_nothing_half_written_is_left_behind(tmp_path, monkeypatch):
    train(Regression(), OPTIMISER, RUN, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["curves", "step-00000035", "step-00000040"]
    full = OSError(28, "No space left on device")
    monkeypatch.setattr("mmi_train.training.checkpoints.save_file", Mock(side_effect=[None, full]))
    with pytest.raises(OSError, match="No space"):
        train(Regression(), OPTIMISER, RUN, tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["curves"]


def test_only_checkpoints_as_they_were_written_are_removed(tmp_path):
    """Not those to which somebody has added something, nor what is only called like them; and a
    run goes on from none of the latter."""
    names = ["step-final", ".step-notes", "step-00000007-copy"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("mine")
    model = nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(model.parameters())
    for step in range(1, 6):
        progress = RunState(step, {})
        path = save_checkpoint(tmp_path, model, model.state_dict(), optimiser, progress, keep=2)
        assert latest_checkpoint(tmp_path) == path
        if step == 2:
            (path / "notes.txt").write_text("mine")
        if step == 3:
            (path / "state.json").write_text("edited")
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == sorted([*names, *(f"step-0000000{step}" for step in (2, 3, 4, 5))])
    assert (tmp_path / "step-00000002" / "notes.txt").read_text() == "mine"


def test_a_folder_of_another_run_is_refused(tmp_path):
    train(Regression(), OPTIMISER, RUN, tmp_path)
    with pytest.raises(WeightsError, match="other settings.*rate 0.01.*rate 0.02"):
        train(Regression(), replace(OPTIMISER, rate=2e-2), RUN, tmp_path)
    with pytest.raises(WeightsError, match=r"start new weights.*start other weights"):
        train(Regression(), OPTIMISER, RUN, tmp_path, start="other weights")


def test_a_run_may_log_otherwise_and_go_on_for_longer(tmp_path, undisturbed):
    """While the rate is flat its weights do not depend on the number of steps."""
    flat = replace(OPTIMISER, schedule="flat_then_cool", cool_from=1.0)
    train(Regression(), replace(flat, steps=20), RUN, tmp_path / "longer")
    often = replace(RUN, log_every=1, checkpoint_every=7, keep=3)
    train(Regression(), flat, often, tmp_path / "longer")
    train(Regression(), flat, RUN, tmp_path / "at-once")
    assert_equal(weights(tmp_path / "longer"), weights(tmp_path / "at-once"))
    cooling = replace(flat, cool_from=0.6)
    train(Regression(), replace(cooling, steps=20), RUN, tmp_path / "cooled")
    with pytest.raises(WeightsError, match=r"steps 20.*steps 40"):
        train(Regression(), cooling, RUN, tmp_path / "cooled")
    train(Regression(), replace(OPTIMISER, steps=20), RUN, tmp_path / "cosine")
    with pytest.raises(WeightsError, match=r"steps 20.*steps 40"):
        train(Regression(), OPTIMISER, RUN, tmp_path / "cosine")


def test_a_checkpoint_holds_what_learns_and_knows_the_rest_by_its_checksum(tmp_path):
    frozen = replace(OPTIMISER, rules=(GroupRule(r"^4\.", rate=0.0),))
    average = train(Regression(), frozen, RUN, tmp_path)
    names = {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert average.keys() == names
    found = weights(tmp_path)
    assert {name for name in found if name.startswith("model:")} == {f"model:{n}" for n in names}
    assert not any(":4." in name for name in found)
    train(Regression(), frozen, RUN, tmp_path)  # resumes
    other = Regression()
    with torch.no_grad():
        other.module[4].bias[0] += 1e-6
    with pytest.raises(WeightsError, match="frozen"):
        train(other, frozen, RUN, tmp_path)


def test_accumulation_equals_a_larger_batch(tmp_path):
    """Two parts of a step weigh as one batch of both: the same update to rounding."""

    class Fixed(Regression):
        def losses(self, inputs):
            rows = torch.linspace(-1, 1, 200).reshape(4, 2, 5, 5)
            rows = rows[:2] if self.half == 0 else rows[2:] if self.half == 1 else rows
            self.half = self.half if self.half is None else 1 - self.half
            return {"total": self.module(rows).square().mean()}

    results = []
    for half, accumulate in ((0, 2), (None, 1)):
        stage = Fixed()
        stage.half = half
        run = replace(RUN, accumulate=accumulate)
        results.append(train(stage, replace(OPTIMISER, steps=3), run, tmp_path / str(accumulate)))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-6)


class Diverging(Regression):
    """From step 7 on the loss is no number; from step 4 on, before a checkpoint, its gradient."""

    def __init__(self, what: str, until: int = 1000) -> None:
        super().__init__()
        self.what, self.until, self.calls = what, until, 0

    def losses(self, inputs):
        self.calls += 1
        total = super().losses(inputs)["total"]
        wrong = self.calls <= self.until
        if wrong and self.what == "loss" and self.calls > 15:
            total = total * float("nan")
        if wrong and self.what == "gradient" and self.calls > 9:
            nothing = 0 * next(self.module.parameters()).sum()
            total = total + nothing.square().sqrt()  # d sqrt(0) is infinite, times 0
        return {"total": total}


@pytest.mark.parametrize(("what", "step", "kept"), [("loss", 7, 1), ("gradient", 4, 0)])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(tmp_path, what, step, kept):
    with pytest.raises(WeightsError, match=f"{what} of regression is not finite at step {step}"):
        train(Diverging(what), OPTIMISER, replace(RUN, most_skipped=0), tmp_path)
    assert len(list(tmp_path.glob("step-*"))) == kept


def test_steps_that_are_not_finite_are_left_out_up_to_a_limit(tmp_path):
    """The second half of step 7 and the first of step 8 are wrong: neither step is taken."""
    run = replace(RUN, most_skipped=2, checkpoint_every=1, keep=100)
    average = train(Diverging("loss", until=17), OPTIMISER, run, tmp_path / "skipped")
    assert all(torch.isfinite(value).all() for value in average.values())
    held = [
        load_file(tmp_path / "skipped" / f"step-{step:08d}" / "model.safetensors")["0.weight"]
        for step in (7, 8, 9, 10)
    ]
    assert torch.equal(held[0], held[1]) and torch.equal(held[0], held[2])
    assert not torch.equal(held[2], held[3])
    with pytest.raises(WeightsError, match="loss of regression is not finite at step 9"):
        train(Diverging("loss"), OPTIMISER, run, tmp_path / "stopped")


def test_worker_processes_change_nothing(tmp_path, undisturbed):
    train(Regression(), OPTIMISER, replace(RUN, workers=2), tmp_path)
    assert_equal(weights(tmp_path), undisturbed)


def test_a_run_killed_between_its_last_checkpoint_and_its_model_makes_the_model(tmp_path):
    class Killed(Exception):
        pass

    def killed_at_the_end(step, average):
        if step == OPTIMISER.steps:
            raise Killed

    with pytest.raises(Killed):
        train(Regression(), OPTIMISER, RUN, tmp_path, killed_at_the_end)
    made = []
    average = train(Regression(), OPTIMISER, RUN, tmp_path, lambda *what: made.append(what))
    ((step, found),) = made
    assert step == OPTIMISER.steps
    assert_equal({name: value.read() for name, value in found.items()}, average)


def test_progress_is_told_at_the_start_and_at_every_step(tmp_path):
    """Without a terminal too; a resumed run says so and counts on."""
    told: list[tuple[str, int, int, str]] = []

    def tell(what: str, done: int = 0, total: int = 0, *, detail: str = "", unit: str = "") -> None:
        told.append((what, done, total, detail))

    train(Regression(), OPTIMISER, RUN, tmp_path, progress=tell)
    steps = OPTIMISER.steps
    assert [line[:3] for line in told] == [("regression", k, steps) for k in range(steps + 1)]
    assert "total " in told[-1][3] and "gradient_norm " in told[-1][3]
    told.clear()
    train(Regression(), OPTIMISER, RUN, tmp_path, progress=tell)
    assert told[0][0].startswith("regression: going on from") and told[0][1] == steps
