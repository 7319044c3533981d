"""The text loss: targets of next-token prediction and their cross-entropy.

Letters: b batch, t tokens, w wanted positions, u vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmi_deploy.spec.config import TokenConfig

# Target of positions without a loss, PyTorch's default `ignore_index`.
IGNORE = -100


def text_targets(
    token_ids: Tensor,
    tokens: TokenConfig,
    *,
    real: Tensor | None = None,
    prompt: int | Tensor = 0,
    only_after_image: bool = False,
) -> Tensor:
    """Next-token targets [b, t - 1], `IGNORE` where the loss has none.

    Ignored are padding, visual tokens, `<s>`, a begin-of-image token right after `<s>` (no text
    announces that image), tokens where `real` [b, t] is false, the first `prompt` (one number or
    [b]) tokens of a row, and with `only_after_image` all text of a document before its first image
    (a caption that precedes its image is unconditional).
    """
    source, target = token_ids[:, :-1], token_ids[:, 1:]
    ignore = (target == tokens.pad) | (target == tokens.image) | (target == tokens.bos)
    ignore |= (target == tokens.boi) & (source == tokens.bos)
    if real is not None:
        ignore |= ~real[:, 1:].bool()
    column = torch.arange(1, token_ids.shape[1], device=token_ids.device)
    ignore |= column < torch.as_tensor(prompt, device=token_ids.device).reshape(-1, 1)
    if only_after_image:
        ignore |= ~after_image(token_ids, tokens)[:, 1:]
    return target.masked_fill(ignore, IGNORE)


def after_image(token_ids: Tensor, tokens: TokenConfig) -> Tensor:
    """Mask of tokens after an image, bool [b, t]: True if a begin-of-image token stands between the
    latest `<s>` and the token, itself included."""
    column = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(token_ids)
    start = torch.where(token_ids == tokens.bos, column, -1).cummax(dim=1).values
    image = torch.where(token_ids == tokens.boi, column, -1).cummax(dim=1).values
    return (image >= 0) & (image >= start)


def text_loss(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean cross-entropy in fp32 of logits [w, u] against target [w], weighted by `weight` [w].

    Without targets, or with all weights zero, the loss is zero (NaN in the published code).
    """
    if weight is None:
        weight = torch.ones_like(target, dtype=torch.float32)
    loss = F.cross_entropy(logits.float(), target, reduction="none")
    total = weight.float().sum()
    return (loss * weight.float()).sum() / torch.where(total > 0, total, torch.ones_like(total))
