"""LM head: the logits of the tokens that decide where a picture begins."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mmi_train.model.lm_head import LmHead

NEW = (3, 4)


def head() -> LmHead:
    torch.manual_seed(0)
    made = LmHead(64, 111, NEW)
    with torch.no_grad():
        made.head_new.weight.normal_(std=0.05)
        made.head_new.bias[0] = 95.2
    return made


def test_logits_in_bfloat16_keep_a_fraction() -> None:
    """At the biases' magnitude bfloat16 counts in steps of 0.5."""
    made, hidden = head(), torch.randn(4000, 64)
    with torch.no_grad():
        expected = made(hidden)
        with torch.autocast("cpu", torch.bfloat16):
            found = made(hidden)
    assert found.dtype == torch.float32
    assert (found - expected)[:, list(NEW)].abs().max() < 0.01
    assert len(found[:, NEW[0]].unique()) > 3000
    assert (found - expected).abs().max() < 0.05


def test_both_heads_add_up_and_both_learn() -> None:
    made, hidden = head(), torch.randn(2, 5, 64)
    logits = made(hidden)
    expected = made.head(hidden)
    expected[..., list(NEW)] += made.head_new(hidden)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(F.linear(hidden, *made.folded()), logits, rtol=1e-5, atol=1e-4)
    gradients = []
    for found in (logits, expected):
        made.zero_grad()
        found.square().sum().backward(retain_graph=True)
        gradients.append([parameter.grad.clone() for parameter in made.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)
