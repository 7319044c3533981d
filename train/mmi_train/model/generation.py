"""Generation in plain PyTorch: texts, scores of given texts, pictures.

Deployment is compared with this module; production does not run it. Nothing is computed twice
within a call (images are encoded once, keys and values are cached), and nothing is kept between
calls.

Letters: b batch, t tokens, m image slots, j pictures to draw, o options,
u vocabulary, z latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from mmi_deploy.runtime.beam_search import BeamRules, BeamSearch, beam_scores
from mmi_deploy.runtime.sampling import TextSampling
from mmi_train.model.image_decoder import DenoisingStep
from mmi_train.model.llama import KvCache
from mmi_train.model.mm_interleaved import MMInterleaved


def visible_keys(real: Tensor) -> Tensor:
    """Causal attention mask, bool [b, 1, t, t], that hides padding (where `real` [b, t] is false).

    A padding token sees itself, so that no row of the softmax is empty; its output is not used."""
    itself = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
    causal = torch.ones_like(itself).tril()
    return causal & (real.bool()[:, None, None] | itself)


class IncrementalDecoder:
    """Prefill of a batch and token-by-token decoding after it, with a KV cache.

    `token_ids` [b, t], padded on the left where `real` [b, t] is false; `pixels` and `image_slot`
    as in `Batch`; `room`: how many tokens may follow. `logits` [b, u]: those of the next token.
    """

    def __init__(
        self,
        model: MMInterleaved,
        token_ids: Tensor,
        pixels: Tensor | None,
        image_slot: Tensor,
        real: Tensor,
        room: int,
    ) -> None:
        rows, tokens = token_ids.shape
        device = token_ids.device
        self.model = model
        self.images = model.encode_images(pixels)
        self.values = model.llm.image_values(self.images.features)
        self.slot = image_slot.clamp(min=0)
        weight = model.llm.embed_tokens.weight
        self.cache = KvCache(model.config.llama, rows, tokens + room, device, weight.dtype)
        self.real = torch.cat([real.bool(), real.new_ones(rows, room, dtype=torch.bool)], dim=1)
        position = (real.long().cumsum(dim=1) - 1).clamp(min=0)
        self.next_position = position[:, -1:] + 1
        seen = model.image_positions(token_ids, image_slot)
        self.last_seen = seen[:, -1:]  # [b, 1, m]; later tokens see the same images
        hidden = model.llm(
            model.embed_rows(token_ids, self.images, image_slot),
            position,
            visible_keys(real),
            self.cache,
            self.values,
            self.slot,
            seen,
        )
        self.logits = model.head(hidden[:, -1])

    def append(self, token_ids: Tensor) -> None:
        """Decode one more token [b] of each row."""
        hidden = self.model.llm(
            self.model.embed(
                token_ids[:, None], self.images.tokens, torch.full_like(token_ids, -1)[:, None]
            ),
            self.next_position,
            self.real[:, None, None, : self.cache.length + 1],
            self.cache,
            self.values,
            self.slot,
            self.last_seen,
        )
        self.next_position = self.next_position + 1
        self.logits = self.model.head(hidden[:, -1])

    def select(self, rows: Tensor) -> None:
        """Continue `rows` [n] of the batch in its place; a row may be taken several times."""
        self.cache.select(rows)
        self.real, self.next_position = self.real[rows], self.next_position[rows]
        self.slot, self.last_seen = self.slot[rows], self.last_seen[rows]


@torch.no_grad()
def generate_texts(
    model: MMInterleaved,
    token_ids: Tensor,
    pixels: Tensor | None,
    image_slot: Tensor,
    real: Tensor,
    *,
    max_new_tokens: int,
    min_length: int = 0,
    repetition_penalty: float = 1.0,
) -> Tensor:
    """Greedy decoding of left-padded prompts [b, t].

    Returns [b, 1 + new tokens] as the published code does: `<s>` first, which counts towards
    `min_length` and is seen by the penalty (CTRL, Sec. 4.1); a row ends with one of the end tokens
    or a begin-of-image token, none of which comes before `min_length`, and is padded with the pad
    token from there on.
    """
    tokens = model.config.tokens
    ends = torch.tensor([*tokens.ends, tokens.boi], device=token_ids.device)
    decoder = IncrementalDecoder(model, token_ids, pixels, image_slot, real, room=max_new_tokens)
    text = token_ids.new_full((len(token_ids), 1), tokens.bos)
    ended = torch.zeros(len(token_ids), dtype=torch.bool, device=token_ids.device)
    while True:
        logits = _penalised(decoder.logits, text, repetition_penalty)
        if text.shape[1] < min_length:
            logits = logits.index_fill(1, ends, -torch.inf)
        chosen = torch.where(ended, tokens.pad, logits.argmax(dim=1))
        text = torch.cat([text, chosen[:, None]], dim=1)
        ended = ended | torch.isin(chosen, ends)
        if ended.all() or text.shape[1] > max_new_tokens:
            return text
        decoder.append(chosen)


def _penalised(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Apply the repetition penalty for the tokens in `ids` [b, t] to logits [b, u]."""
    if penalty == 1.0:
        return logits
    taken = logits.gather(1, ids)
    return logits.scatter(1, ids, torch.where(taken < 0, taken * penalty, taken / penalty))


@torch.no_grad()
def search_texts(
    model: MMInterleaved,
    token_ids: Tensor,
    pixels: Tensor | None,
    image_slot: Tensor,
    real: Tensor,
    *,
    max_new_tokens: int,
    beams: int,
    min_length: int = 0,
    repetition_penalty: float = 1.0,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
) -> tuple[Tensor, Tensor]:
    """Beam search of left-padded prompts [b, t].

    Returns the best texts [b, 1 + new tokens], in the form of `generate_texts`, and their scores
    [b]: log probabilities over the length to the power of `length_penalty`. Every prompt is read
    once; then each has `beams` rows, which exchange their keys and values as beams are given up.
    """
    tokens = model.config.tokens
    ends = frozenset((*tokens.ends, tokens.boi))
    how = TextSampling(temperature=0.0, repetition_penalty=repetition_penalty)
    decoder = IncrementalDecoder(model, token_ids, pixels, image_slot, real, room=max_new_tokens)
    rules = BeamRules(beams, ends, length_penalty, early_stopping)
    searches = [BeamSearch(rules) for _ in token_ids]
    first = list(range(len(searches)))  # row of the first beam of each search
    for step in range(max_new_tokens):
        banned = ends if 1 + step < min_length else frozenset()
        logits = decoder.logits.float().cpu().numpy()
        rows, last = list[int](), list[int]()
        for number, search in enumerate(searches):
            start = first[number]
            first[number] = len(rows)
            if not search.done:
                search.advance(
                    [
                        beam_scores(row, how, (tokens.bos, *beam.tokens), banned)
                        for row, beam in zip(logits[start:], search.beams, strict=False)
                    ]
                )
            if not search.done:
                rows += [start + parent for parent in search.parents]
                last += [beam.tokens[-1] for beam in search.beams]
        if not rows or step == max_new_tokens - 1:
            break
        decoder.select(torch.tensor(rows, device=token_ids.device))
        decoder.append(torch.tensor(last, device=token_ids.device))
    found = [search.best() for search in searches]
    texts = [[tokens.bos, *x.tokens, *([] if x.end is None else [x.end])] for x in found]
    length = max(map(len, texts))
    texts = [[*text, *[tokens.pad] * (length - len(text))] for text in texts]
    return token_ids.new_tensor(texts), torch.tensor([x.score for x in found])


@torch.no_grad()
def score_options(
    model: MMInterleaved,
    token_ids: Tensor,
    pixels: Tensor | None,
    image_slot: Tensor,
    options: Tensor,
    real: Tensor,
) -> Tensor:
    """Log-probability of each option [o] after one row of context, summed over its tokens.

    `token_ids` [t] and `image_slot` [m]: the context. `options` [o, length], padded on the right
    where `real` [o, length] is false. The images are encoded once for all options.
    """
    count = len(options)
    rows = torch.cat([token_ids.expand(count, -1), options], dim=1)
    hidden = model.read(rows, model.encode_images(pixels), image_slot.expand(count, -1))
    logits = model.head(hidden[:, len(token_ids) - 1 : -1])  # [o, length, u]
    log_probability = logits.float().log_softmax(-1).gather(2, options[..., None])[..., 0]
    return (log_probability * real).sum(dim=1)


@torch.no_grad()
def draw_pictures(
    model: MMInterleaved,
    token_ids: Tensor,
    pixels: Tensor | None,
    image_slot: Tensor,
    pictures: Tensor,
    latents: Tensor,
    scheduler: SchedulerMixin,
    *,
    guidance: float | None,
    full_every: int = 1,
    step_noise: Sequence[Tensor] | None = None,
    on_step: Callable[[DenoisingStep], None] | None = None,
) -> Tensor:
    """Draw `pictures` [j, 2] (row, image of the row) -> pixels [j, 3, size, size] in [0, 1].

    Rows [b, t] as in `Batch`; the image that stands at a picture's own place, and everything after
    it, have no influence. `latents` [j, z, side, side]: the initial noise. The other parameters are
    those of `ImageDecoder.draw`.
    """
    images = model.encode_images(pixels)
    hidden = model.read(token_ids, images, image_slot)
    layout = model.picture_layout(token_ids, image_slot, pictures)
    drawn = model.image_decoder.draw(
        model.condition(hidden, layout),
        model.previous_images(images, layout),
        latents,
        scheduler,
        guidance=guidance,
        full_every=full_every,
        step_noise=step_noise,
        on_step=on_step,
    )
    return model.image_decoder.vae.decode(drawn)
