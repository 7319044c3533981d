"""The text loss: which tokens count (against the published code), and their cross-entropy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mmi_deploy.spec.config import TokenConfig
from mmi_train.model.losses import IGNORE, text_loss, text_targets

TOKENS = TokenConfig(bos=1, eos=2, pad=0, boi=3, image=4)
S, E, B, V, P = TOKENS.bos, TOKENS.eos, TOKENS.boi, TOKENS.image, TOKENS.pad
X = IGNORE


@pytest.mark.parametrize("caption_only, name", [(False, "mmc4"), (True, "laion_en")])
def test_targets_are_those_of_the_published_code(
    golden: Callable, caption_only: bool, name: str
) -> None:
    run = golden("full_forward")
    given = {key: torch.from_numpy(value) for key, value in run.part("in").items()}
    tokens = TokenConfig(bos=1, eos=2, pad=511, boi=512, image=513)
    target = text_targets(
        given["text_ids"], tokens, real=given["attention_mask"], only_after_image=caption_only
    )
    np.testing.assert_array_equal(target.numpy(), run.part("out")[f"gt_text_ids_{name}"])


def test_each_rule_of_what_is_not_predicted() -> None:
    row = [S, 7, 8, B, V, V, 9, E, S, B, V, V, 9, P]
    expected = [7, 8, B, X, X, 9, E, X, X, X, X, 9, X]
    assert text_targets(torch.tensor([row]), TOKENS)[0].tolist() == expected


def test_text_before_the_first_image_of_a_document_may_be_left_out() -> None:
    row = [S, 7, B, V, 9, E, S, 7, 8]
    expected = [X, B, X, 9, E, X, X, X]
    target = text_targets(torch.tensor([row]), TOKENS, only_after_image=True)
    assert target[0].tolist() == expected


def test_prompts_of_each_row_are_not_predicted() -> None:
    rows = torch.tensor([[S, 7, 8, 9, E]] * 2)
    target = text_targets(rows, TOKENS, prompt=torch.tensor([0, 3]))
    assert target.tolist() == [[7, 8, 9, E], [X, X, 9, E]]
    assert text_targets(rows, TOKENS, prompt=3)[0].tolist() == [X, X, 9, E]


def test_loss_is_the_weighted_mean_of_minus_log_probability() -> None:
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(6, 5)), rng.integers(0, 5, 6)
    weight = np.array([1.0, 0.5, 0.0, 2.0, 1.0, 1.0])
    log_sum = np.log(np.exp(logits).sum(axis=1))
    each = log_sum - logits[np.arange(6), target]
    tensors = torch.from_numpy(logits), torch.from_numpy(target)
    assert text_loss(*tensors).item() == pytest.approx(each.mean(), rel=1e-6)
    weighted = text_loss(*tensors, torch.from_numpy(weight)).item()
    assert weighted == pytest.approx((each * weight).sum() / weight.sum(), rel=1e-6)


@pytest.mark.parametrize("targets", [0, 3])
def test_loss_without_anything_to_predict_is_zero_and_differentiable(targets: int) -> None:
    logits = torch.randn(targets, 5, requires_grad=True)
    target = torch.zeros(targets, dtype=torch.long)
    loss = text_loss(logits, target, torch.zeros(targets))
    loss.backward()
    assert loss.item() == 0.0 and not logits.grad.any()
