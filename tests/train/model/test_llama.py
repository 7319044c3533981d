"""The language model: LLaMA as Hugging Face has it, MMFS as the published code has it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig as HuggingFaceConfig
from transformers import LlamaModel

from mmi_deploy.errors import DocumentError
from mmi_deploy.spec.config import LlamaConfig, MmfsConfig
from mmi_train.checkpoint_import.published.llm import RULES
from mmi_train.model.llama import KvCache, Llama
from mmi_train.model.lm_head import LmHead

CONFIG = LlamaConfig(
    vocab=50, width=32, layers=4, heads=4, kv_heads=4, mlp_width=48, context=24, mmfs_every=2
)
MMFS = MmfsConfig(
    heads=2,
    points=3,
    value_width=16,
    levels=(1, 2),
    base_grid=4,
    images=6,
    images_seen=5,
    null_slot=False,
    offset_init=2.0,
)
SIDES = (8, 4, 2, 1)
CELLS = 64 + 16 + 4 + 1


def random_llama(config: LlamaConfig = CONFIG, std: float = 0.15) -> Llama:
    """Every parameter random and every gate open, so that nothing hides behind a zero."""
    torch.manual_seed(0)
    llama = Llama(config, MMFS, 12, SIDES)
    for name, parameter in llama.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=std)
    for look_back in llama.mmfs_layers:
        torch.nn.init.constant_(look_back.gate, 0.7)
    return llama.eval()


def inputs(llama: Llama, tokens: int = 10) -> dict[str, Tensor | list[Tensor]]:
    """Two rows with three images each, one of them shared, that appear one after another."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(4, CELLS, 12, generator=generator)
    first_seen = torch.tensor([[2, 5, 7], [0, 3, 20]])
    visible = (torch.arange(tokens)[:, None] >= first_seen[:, None]).long()  # [b, t, m]
    return {
        "embeddings": torch.randn(2, tokens, llama.config.width, generator=generator),
        "position": torch.arange(tokens).expand(2, tokens),
        "values": llama.image_values(features),
        "image_slot": torch.tensor([[0, 1, 2], [3, 1, 0]]),
        "image_position": (visible.sum(-1, keepdim=True) + 1 - visible.cumsum(-1)) * visible,
    }


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("training", [False, True], ids=["fused", "spelled out"])
@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_without_images_it_is_hugging_faces_llama(agree, kv_heads, training, theta):
    config = replace(CONFIG, kv_heads=kv_heads, rope_theta=theta)
    llama = random_llama(config).train(training)
    peer = LlamaModel(
        HuggingFaceConfig(
            vocab_size=config.vocab,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            rms_norm_eps=config.eps,
            rope_theta=config.rope_theta,
            max_position_embeddings=config.context,
            attn_implementation="eager",
            pad_token_id=None,
        )
    ).eval()
    shared = {k: v for k, v in llama.state_dict().items() if "look_back" not in k}
    peer.load_state_dict(shared, strict=True)
    ids = torch.randint(0, config.vocab, (2, 20))
    position = torch.arange(20).expand(2, 20)
    with torch.no_grad():
        ours = llama(llama.embed_tokens(ids), position)
        agree(ours, peer(input_ids=ids).last_hidden_state, 1e-5)

    padding = torch.ones(2, 20, dtype=torch.bool)
    padding[1, :6] = False  # on the left
    position = (padding.cumsum(1) - 1).clamp(min=0)
    mask = padding[:, None, None] & torch.ones(20, 20, dtype=torch.bool).tril()
    with torch.no_grad():
        ours = llama(llama.embed_tokens(ids), position, mask)
        theirs = peer(input_ids=ids, attention_mask=padding.long(), position_ids=position)
    assert bool(ours.isfinite().all())
    agree(ours[padding], theirs.last_hidden_state[padding], 1e-5)


def published_llama(tensors: dict[str, Tensor], config: dict) -> Llama:
    peer, base = config["llama"], 16
    llama = Llama(
        LlamaConfig(
            vocab=peer["vocab_size"],
            width=peer["hidden_size"],
            layers=peer["num_hidden_layers"],
            heads=peer["num_attention_heads"],
            kv_heads=peer["num_attention_heads"],
            mlp_width=peer["intermediate_size"],
            context=peer["max_position_embeddings"],
            mmfs_every=config["cross_attention_frequency"],
            eps=peer["rms_norm_eps"],
        ),
        MmfsConfig(
            heads=config["n_heads"],
            points=config["n_points"],
            value_width=config["image_embed_dim"],
            levels=(1, 2, 3),
            base_grid=base,
            images=50,
            images_seen=49,
            null_slot=True,
            offset_init=3.0,
        ),
        config["image_embed_dim"],
        (64, *config["spatial_shapes"]),
    )
    state = {}
    for name, tensor in tensors.items():
        if name.startswith("state.") and name != "state.lm_head.weight":
            name = "mm_decoder." + name.removeprefix("state.")
            (ours,) = (
                match.expand(replacement)
                for pattern, replacement in RULES
                if (match := re.fullmatch(pattern, name))
            )
            state[ours.removeprefix("llm.")] = (
                tensor.flatten() if ours.endswith("null_value") else tensor
            )
    llama.load_state_dict(state, strict=True)
    return llama.eval()


@pytest.mark.parametrize("training", [False, True], ids=["fused", "spelled out"])
@torch.no_grad()
def test_equals_the_published_model_layer_by_layer_and_in_a_cached_step(published, agree, training):
    tensors, config = published("llama_mmfs")
    llama = published_llama(tensors, config).train(training)
    features = tensors["in.vision_hidden_states"]  # without the finest map, which MMFS leaves out
    b, m, _, width = features.shape
    finest = torch.full((b * m, 64 * 64, width), float("nan"))
    visible = tensors["in.cross_attention_mask"].long()
    images = {
        "values": llama.image_values(torch.cat((finest, features.flatten(0, 1)), 1)),
        "image_slot": torch.arange(b * m).view(b, m),
        "image_position": (visible.sum(-1, keepdim=True) + 1 - visible.cumsum(-1)) * visible,
    }
    embeddings = tensors["in.inputs_embeds"]
    tokens = embeddings.shape[1]
    position = torch.arange(tokens).expand(b, tokens)
    padding = tensors["in.attention_mask"].bool()[:, None, None]
    mask = padding & torch.ones(tokens, tokens, dtype=torch.bool).tril()

    layer_inputs: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, arguments: layer_inputs.append(arguments[0]))
        for block in llama.layers
    ]
    hidden = llama(embeddings, position, mask, **images)
    for hook in hooks:
        hook.remove()
    for layer, layer_input in enumerate(layer_inputs):
        agree(layer_input, tensors[f"out.hidden_states.{layer}"], 1e-4)
    agree(hidden, tensors["out.last_hidden_state"], 1e-4)
    agree(hidden @ tensors["state.lm_head.weight"].T, tensors["out.logits"], 1e-4)
    blind = llama(embeddings, position, mask)
    agree(blind, tensors["out.last_hidden_state_no_vision"], 1e-4)

    row = {"values": images["values"], "image_slot": images["image_slot"][:1]}
    seen = images["image_position"][:1]
    cache = KvCache(llama.config, batch=1, capacity=tokens + 1)
    llama(embeddings[:1], position[:1], None, cache, image_position=seen, **row)
    step = llama(
        llama.embed_tokens(tensors["in.step_input_ids"]),
        torch.tensor([[tokens]]),
        None,
        cache,
        image_position=seen[:, -1:],
        **row,
    )
    agree(step, tensors["out.step_hidden"], 1e-4)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("pieces", [(1,) * 10, (4, 1, 5), (9, 1)], ids=str)
@torch.no_grad()
def test_cached_decoding_equals_the_whole_forward(agree, kv_heads, pieces):
    llama = random_llama(replace(CONFIG, kv_heads=kv_heads))
    whole = inputs(llama)
    expected = llama(**whole)
    cache, parts, start = KvCache(llama.config, batch=2, capacity=10), [], 0
    for tokens in pieces:
        now = slice(start, start + tokens)
        cut = {name: whole[name][:, now] for name in ("embeddings", "position", "image_position")}
        parts.append(llama(**{**whole, **cut}, cache=cache))
        start += tokens
    agree(torch.cat(parts, 1), expected, 1e-5)
    with pytest.raises(DocumentError, match="at most 10 tokens; got 11"):
        llama(torch.zeros(2, 1, 32), torch.zeros(2, 1, dtype=torch.long), cache=cache)


@torch.no_grad()
def test_tokens_see_their_images_and_no_later_ones(agree):
    llama = random_llama()
    given = inputs(llama)
    before = llama(**given)
    values = [value.clone() for value in given["values"]]
    for value in values:
        value[2] += 1.0  # the third image of row 0, which appears at token 7; row 1 never names it
    after = llama(**{**given, "values": values})
    changed = (before - after).abs().amax(-1) > 1e-4
    assert not changed[0, :7].any() and bool(changed[0, 7:].all()) and not changed[1].any()


@torch.no_grad()
def test_a_closed_gate_leaves_llama_as_it_was():
    llama = Llama(CONFIG, MMFS, 12, SIDES).eval()
    given = inputs(llama)
    assert all(look_back.gate.item() == 0.0 for look_back in llama.mmfs_layers)
    assert torch.equal(llama(**given), llama(given["embeddings"], given["position"]))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_checkpointing_changes_no_gradient(agree, kv_heads):
    gradients = []
    for checkpointing in (False, True):
        llama = random_llama(replace(CONFIG, kv_heads=kv_heads)).train()
        llama.gradient_checkpointing = checkpointing
        llama(**inputs(llama)).square().sum().backward()
        named = dict(llama.named_parameters())
        gradients.append({k: p.grad for k, p in named.items() if k != "embed_tokens.weight"})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.any(), name
        agree(gradients[1][name], gradient, 1e-6)


def test_training_in_bf16_stays_near_fp32(agree):
    """Autocast; a padded row that sees nothing must not spread NaN."""
    llama = random_llama().train()
    mask = torch.ones(10, 10, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[0, :, :, :3] = False
    expected = llama(**inputs(llama), mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = llama(**inputs(llama), mask=mask)
    agree(hidden, expected, 0.1)
    hidden.float().square().sum().backward()
    gradients = [p.grad for n, p in llama.named_parameters() if n != "embed_tokens.weight"]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_new_tokens_of_the_head_start_unlikely_and_are_learned_apart(agree):
    torch.manual_seed(0)
    head = LmHead(8, 12, new_ids=(3, 7))
    hidden = torch.randn(2, 5, 8)
    logits = head(hidden)
    assert logits[..., [3, 7]].eq(-5.0).all()
    torch.nn.init.normal_(head.head_new.weight)
    torch.nn.init.normal_(head.head.weight)
    expected = hidden @ head.head.weight.T + head.head.bias
    expected[..., [3, 7]] += hidden @ head.head_new.weight.T + head.head_new.bias
    agree(head(hidden), expected, 1e-6)
    weight, bias = head.folded()
    agree(hidden @ weight.T + bias, expected, 1e-6)
    head.head.requires_grad_(False)
    head(hidden).square().sum().backward()
    assert head.head_new.weight.grad.any() and head.head.weight.grad is None


# Every setting of LLaMA's descendants at once.
DESCENDANT = replace(
    CONFIG,
    kv_heads=2,
    channels_per_head=6,
    qkv_bias=True,
    qk_norm=True,
    rope_divisors=(1.0, 2.0, 8.0),
    layers_without_rope=(1, 3),
)


@pytest.mark.parametrize("training", [False, True], ids=["fused", "spelled out"])
@torch.no_grad()
def test_a_descendant_of_llama_decodes_as_it_prefills(agree, training):
    llama = random_llama(DESCENDANT).train(training)
    whole = inputs(llama)
    expected = llama(**whole)
    cache, parts = KvCache(DESCENDANT, batch=2, capacity=10), []
    for now in (slice(0, 4), slice(4, 5), slice(5, 10)):
        cut = {name: whole[name][:, now] for name in ("embeddings", "position", "image_position")}
        parts.append(llama(**{**whole, **cut}, cache=cache))
    agree(torch.cat(parts, 1), expected, 1e-5)


def test_biases_and_norms_of_a_descendant_learn(agree):
    gradients = []
    for training in (False, True):
        llama = random_llama(DESCENDANT).train(training)
        llama(**inputs(llama)).square().sum().backward()
        own = {name: p.grad for name, p in llama.named_parameters() if "self_attn" in name}
        gradients.append(own)
    assert len(gradients[0]) == DESCENDANT.layers * (4 + 3 + 2)
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.any(), name
        agree(gradients[1][name], gradient, 1e-4)


def test_new_biases_are_zero_and_new_norms_one():
    llama = Llama(replace(CONFIG, qkv_bias=True, qk_norm=True), MMFS, 12, SIDES)
    for block in llama.blocks:
        attention = block.self_attn
        assert not attention.q_proj.bias.any() and not attention.v_proj.bias.any()
        assert attention.q_norm.weight.eq(1).all() and attention.k_norm.weight.eq(1).all()
        assert attention.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.2)
