"""The readers of the condition, and the stage in which only they listen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmi_deploy.spec.presets import tiny
from mmi_train.data.synthetic.drawn_world import DrawnWorld
from mmi_train.data.synthetic.vocabulary import build_tokenizer
from mmi_train.data.synthetic.world import easy
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.training import from_scratch
from mmi_train.training.checkpoints import latest_checkpoint
from mmi_train.training.stages.auxiliary_heads import RecallHead, SketchHead
from mmi_train.training.stages.interleaved import InterleavedStage
from mmi_train.weights.model_folder import load_model

TINY = Path(__file__).resolve().parents[4] / "assets" / "tiny"


def test_recall_reads_the_token_at_the_same_distance() -> None:
    reader = RecallHead(width=8, vocab=8)
    with torch.no_grad():
        reader.told.weight.copy_(20 * torch.eye(8))
        reader.told.bias.zero_()
    context = torch.tensor([[3, 5, 1, 0], [2, 7, 0, 0]])
    counts = torch.tensor([[True, True, True, False], [True, True, False, False]])
    condition = torch.nn.functional.one_hot(context, 8).float()
    assert reader.loss(condition, context, counts) < 1e-6
    assert reader.loss(condition.roll(1, dims=1), context, counts) > 5
    spoilt = condition.clone()
    spoilt[~counts] = 1e3  # what does not count is not read
    assert reader.loss(spoilt, context, counts) < 1e-6
    assert reader.loss(condition[:, :1], context, counts) < 1e-6  # fewer condition tokens


@pytest.mark.parametrize("told", [True, False])
def test_a_sketch_can_only_show_what_the_condition_tells(told: bool) -> None:
    torch.manual_seed(0)
    reader = SketchHead(width=16, heads=2, side=4)
    pixels = torch.rand(2, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    condition = torch.randn(2, 5, 16)
    if not told:
        condition = condition[:1].expand(2, -1, -1)
    optimiser = torch.optim.Adam(reader.parameters(), 0.02)
    for _ in range(150):
        optimiser.zero_grad()
        loss = reader.loss(condition, pixels)
        loss.backward()
        optimiser.step()
    apart = (pixels[0] - pixels[1]).square().mean()  # least loss when both must look alike
    assert (loss < 0.1 * apart) if told else (loss > 0.9 * apart)


def stage(**settings: float) -> InterleavedStage:
    torch.manual_seed(0)
    mixture = {"drawing": 2, "story": 1, "reading": 1}
    return InterleavedStage(
        MMInterleaved(tiny()), build_tokenizer(), DrawnWorld(easy()), mixture, **settings
    )


def test_every_loss_counts_with_its_weight() -> None:
    one = stage(image_weight=7.0, recall_weight=2.0, sketch_weight=5.0)
    losses = one.losses(one.batch(0, np.random.default_rng(0)))
    weighted = losses["text"] + 7 * losses["image"] + 2 * losses["recall"] + 5 * losses["sketch"]
    assert set(losses) == {"total", "text", "image", "recall", "sketch"}
    torch.testing.assert_close(losses["total"], weighted)


def test_without_the_image_loss_the_unet_rests_and_the_condition_learns() -> None:
    one = stage(image_weight=0.0)
    losses = one.losses(one.batch(0, np.random.default_rng(0)))
    assert "image" not in losses
    losses["total"].backward()
    moved = {name for name, value in one.module.named_parameters() if value.grad is not None}
    assert not [name for name in moved if ".unet." in name or ".vae." in name]
    for part in (
        "model.llm.",
        "model.image_decoder.resampler.",
        "model.vision.",
        "sketch.",
        "recall.",
    ):
        assert [name for name in moved if name.startswith(part)], part


@pytest.mark.slow
def test_both_stages_run_and_resume_and_the_readers_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DrawnWorld, "conditioning_mixture", {"drawing": 2, "reading": 1})
    steps = from_scratch.StageSteps(conditioning=2, main=1)
    settings = {"start": TINY, "steps": steps}
    config = load_model(TINY).config
    model = from_scratch.train_from_scratch(config, tmp_path, **settings)
    assert load_model(model).config == config
    for name in ("conditioning", "interleaved"):
        assert latest_checkpoint(tmp_path / name) is not None, name
    before = (model / "model.safetensors").read_bytes()
    again = from_scratch.train_from_scratch(config, tmp_path, **settings)  # nothing is left to do
    assert (again / "model.safetensors").read_bytes() == before
