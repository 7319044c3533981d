"""Check of the language model body with MMFS: units `llama_mmfs`.

Letters: b batch, t tokens, m image slots, s feature cells, c channels.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mmi_train.checkpoint_import.state_dict import published_module
from mmi_train.golden import configs
from mmi_train.golden.compare import Checks
from mmi_train.golden.configs import PUBLISHED, Section
from mmi_train.golden.hooks import recorded
from mmi_train.golden.mmfs import image_positions
from mmi_train.golden.units import Unit
from mmi_train.model.generation import visible_keys
from mmi_train.model.llama import KvCache, Llama

_HEAD = "lm_head.weight"


def check(unit: Unit, checks: Checks) -> None:
    """Run the language model of a unit and compare hidden states, logits and one cached step."""
    embeddings = unit.input("inputs_embeds")
    batch, tokens = embeddings.shape[:2]
    model = _build(unit, tokens)
    mask = unit.inputs.get("attention_mask", torch.ones(batch, tokens))
    real = mask.bool()
    keys = visible_keys(mask)
    position = torch.arange(tokens).expand(batch, -1)
    features = unit.input("vision_hidden_states")  # [b, m, s, c]
    values = model.image_values(features.flatten(0, 1))
    slot = torch.arange(batch * features.shape[1], dtype=torch.int32).view(batch, -1)
    seen = image_positions(unit.input("cross_attention_mask"))  # [b, t, m]

    with recorded({str(index): layer for index, layer in enumerate(model.layers)}) as flow:
        hidden = model(
            embeddings, position, keys, values=values, image_slot=slot, image_position=seen
        )
    checks.compare("last_hidden_state", hidden, mask=real)
    for index in range(len(model.layers)):
        checks.compare(f"hidden_states.{index}", flow[str(index)][0], mask=real)
    checks.compare(f"hidden_states.{len(model.layers)}", hidden, mask=real)
    if _HEAD in unit.state:
        checks.compare("logits", hidden @ unit.state[_HEAD].T, mask=real)
    if checks.wants("last_hidden_state_no_vision"):
        checks.compare("last_hidden_state_no_vision", model(embeddings, position, keys), mask=real)
    if checks.wants("step_hidden"):
        token = unit.input("step_input_ids")  # [1, 1]: continues row 0
        cache = KvCache(model.config, 1, tokens + 1)
        one = {"cache": cache, "values": values, "image_slot": slot[:1]}
        model(embeddings[:1], position[:1], keys[:1], image_position=seen[:1], **one)
        step = model(
            model.embed_tokens(token),
            torch.tensor([[tokens]]),
            torch.ones(1, 1, 1, tokens + 1, dtype=torch.bool),
            image_position=seen[:1, -1:],
            **one,
        )
        checks.compare("step_hidden", step)


def _build(unit: Unit, tokens: int) -> Llama:
    config = Section(unit.config)
    body = config.section("llama")
    sides = config.get("spatial_shapes", (32, 16, 8))
    every = config.count("cross_attention_frequency", PUBLISHED.llama.mmfs_every)
    state = {name: tensor for name, tensor in unit.state.items() if name != _HEAD}
    vocab = body.count("vocab_size", PUBLISHED.llama.vocab)
    context = max(body.count("max_position_embeddings", PUBLISHED.llama.context), tokens + 1)
    llama = configs.llama(body, vocab, context, every)
    mmfs = configs.mmfs(
        config,
        state,
        replace(PUBLISHED.llm_mmfs, levels=tuple(range(len(sides)))),
        "layers.0.llama_cross_attn.attn.",
    )
    width = config.count("image_embed_dim", PUBLISHED.vision.width)
    return published_module(
        lambda: Llama(llama, mmfs, width, sides), state, theirs="mm_decoder.", ours="llm."
    )
