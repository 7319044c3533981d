"""MMFS: the released form against the published code, the paper's form against Eq. 4 in loops."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from mmi_deploy.spec.config import MmfsConfig
from mmi_train.checkpoint_import.published.llm import mmfs_rules
from mmi_train.model.deformable import multi_image_deformable_attention
from mmi_train.model.mmfs import Mmfs, take_levels
from oracles import mmfs_float64


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Visibility [..., m], 1 visible -> image position: the nearest (last) visible image has 1."""
    mask = mask.long()
    return (mask.sum(-1, keepdim=True) + 1 - mask.cumsum(-1)) * mask


def released_mmfs(tensors, config) -> Mmfs:
    state = {}
    for name, tensor in tensors.items():
        if name.startswith("state."):
            name = name.replace("state", "0", 1)  # the rules know modules of numbered blocks
            (ours,) = (
                match.expand(replacement)
                for pattern, replacement in mmfs_rules(r"(\d)\.", "")
                if (match := re.fullmatch(pattern, name))
            )
            state[ours] = tensor.flatten() if ours == "null_value" else tensor
    made = config["ctor"]
    mmfs = Mmfs(
        MmfsConfig(
            heads=made["n_heads"],
            points=made["n_points"],
            value_width=int(made["d_model"] * made["ratio"]),
            levels=tuple(range(made["n_levels"])),
            base_grid=made["base_spatial_shape"],
            images=made["max_num_image_per_seq"],
            images_seen=made["max_num_image_per_seq"] - 1,
            null_slot=True,
            offset_init=made["offset_init_magnitude"],
        ),
        made["d_query"],
        made["d_value"],
        made["d_out"],
        made["spatial_shapes"],
        made["base_spatial_shape"],
    )
    mmfs.load_state_dict(state, strict=True)
    return mmfs


@pytest.mark.parametrize("unit", ["mmfs_llm", "mmfs_llm_decode", "mmfs_unet"])
def test_released_form_equals_the_published_module(published, agree, unit):
    tensors, config = published(unit)
    features, query = tensors["in.input_flatten"], tensors["in.query"]
    b, m = features.shape[:2]
    position = positions(tensors["in.attention_mask"])
    if position.dim() == 2:  # the U-Net's: one row for all pixels
        position = position.unsqueeze(1)
    elif position.shape[1] != query.shape[1]:  # decoding: the last row belongs to the new token
        position = position[:, -1:]
    mmfs = released_mmfs(tensors, config)
    value = mmfs.values(features.flatten(0, 1))
    slot = torch.arange(b * m).view(b, m)
    reference = tensors["in.reference_points"][0, :, 0]
    agree(mmfs(query, value, slot, position, reference), tensors["out.output"], 1e-4)
    if unit != "mmfs_llm_decode":
        blind = (position == 0).all(-1).expand(b, query.shape[1])
        assert blind.any(), "the golden file has queries that see no image"
        seen = mmfs(query, value, slot, position, reference)[blind]
        agree(seen, mmfs.output_proj(mmfs.null_value).expand_as(seen), 1e-5)


def paper_config(heads: int, points: int, levels: int) -> MmfsConfig:
    return MmfsConfig(
        heads=heads,
        points=points,
        value_width=heads * 4,
        levels=tuple(range(levels)),
        base_grid=None,
        images=6,
        images_seen=5,
        null_slot=False,
        offset_init=2.0,
    )


def random_mmfs(config: MmfsConfig, sides: tuple[int, ...], base_grid: float) -> Mmfs:
    """Every parameter random, so that nothing can hide behind a zero."""
    torch.manual_seed(sum(sides) + config.heads)
    mmfs = Mmfs(config, 12, 7, 10, sides, base_grid)
    for parameter in mmfs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return mmfs


ROLES = (
    ("q", "query_proj"),
    ("p", "offset_proj"),
    ("A", "weight_proj"),
    ("value", "value_proj"),
    ("output", "output_proj"),
)


def paper_weights(mmfs: Mmfs) -> dict[str, np.ndarray]:
    """The module's parameters under the paper's names, in float64."""
    state = {name: tensor.double().numpy() for name, tensor in mmfs.state_dict().items()}
    weights = {"PosEmbed": state["image_index.weight"]}
    for letter, name in ROLES:
        weights[f"W_{letter}"] = state[f"{name}.weight"]
        weights[f"b_{letter}"] = state[f"{name}.bias"]
    return weights


@pytest.mark.parametrize("rows", ["some hidden", "all hidden"])
@pytest.mark.parametrize("per_query", [False, True], ids=["one reference", "reference per query"])
@pytest.mark.parametrize(
    "sides, heads, points, base_grid",
    [((4,), 1, 1, 4.0), ((6, 3), 2, 3, 3.0), ((8, 4, 2), 3, 4, 16.0), ((5, 4, 3, 1), 2, 2, 5.0)],
)
def test_paper_form_equals_equation_4(agree, sides, heads, points, base_grid, per_query, rows):
    mmfs = random_mmfs(paper_config(heads, points, len(sides)), sides, base_grid)
    b, q, m, n, s = 2, 3, 3, 4, sum(side * side for side in sides)
    query, features = torch.randn(b, q, 12), torch.randn(n, s, 7)
    slot = torch.tensor([[3, 1, 0], [2, 2, 1]])
    if rows == "all hidden":
        visible = torch.zeros(b, q, m)
    else:
        visible = torch.tensor(
            [[[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[0, 0, 0], [0, 1, 1], [0, 0, 1]]]
        )
    position = positions(visible)
    reference = torch.rand(q if per_query else 1, 2)
    got = mmfs(query, mmfs.values(features), slot, position, reference)

    expected, weights = np.zeros(got.shape), paper_weights(mmfs)
    for row, token in np.ndindex(b, q):
        seen = [int(slot[row, k]) for k in reversed(range(m)) if visible[row, token, k]]
        expected[row, token] = mmfs_float64.equation_4(
            weights,
            query[row, token].double().numpy(),
            [features[k].double().numpy() for k in seen],
            reference[token if per_query else 0].double().numpy(),
            shapes=[(side, side) for side in sides],
            heads=heads,
            points=points,
            base_grid=base_grid,
        )
    agree(got, expected, 1e-5)


@pytest.mark.parametrize("unit", ["mmfs_llm", "mmfs_unet"])
def test_folded_operator_equals_the_module(published, agree, unit):
    """W_p W_q f + W_p e_m and W_A W_q f + W_A e_m as one linear of f and a table by position."""
    tensors, config = published(unit)
    mmfs = released_mmfs(tensors, config)
    features, query = tensors["in.input_flatten"], tensors["in.query"]
    b, m = features.shape[:2]
    value, slot = mmfs.values(features.flatten(0, 1)), torch.arange(b * m).view(b, m)
    position = positions(tensors["in.attention_mask"])
    position = position if position.dim() == 3 else position.unsqueeze(1)
    reference = tensors["in.reference_points"][0, :, 0]

    weights = paper_weights(mmfs)
    heads, points, levels = mmfs.config.heads, mmfs.config.points, len(mmfs.level_sides)
    f, table = query.double().numpy(), weights["PosEmbed"]

    def folded(letter: str) -> tuple[np.ndarray, np.ndarray]:
        linear, bias = weights[f"W_{letter}"], weights[f"b_{letter}"]
        return f @ (linear @ weights["W_q"]).T + linear @ weights["b_q"] + bias, table @ linear.T

    offsets, offset_table = (
        torch.from_numpy(x.reshape(*x.shape[:-1], heads, points, 2)).float() for x in folded("p")
    )
    logits, logit_table = (
        torch.from_numpy(x.reshape(*x.shape[:-1], heads, levels, -1)[..., :points]).float()
        for x in folded("A")
    )
    out = multi_image_deformable_attention(
        value,
        slot,
        offsets,
        logits,
        offset_table,
        logit_table,
        position,
        reference,
        mmfs.null_value.view(heads, -1),
        level_heights=mmfs.level_sides,
        level_widths=mmfs.level_sides,
        base_grid=mmfs.base_grid,
        null_slot=True,
    )
    agree(mmfs.output_proj(out), mmfs(query, value, slot, position, reference), 1e-5)


@pytest.mark.parametrize("null_slot", [False, True])
def test_gradients_are_finite_where_nothing_is_visible(null_slot):
    config = paper_config(2, 3, 2)
    config = MmfsConfig(**{**vars(config), "null_slot": null_slot})
    mmfs = random_mmfs(config, (4, 2), 4.0)
    query, features = torch.randn(2, 3, 12, requires_grad=True), torch.randn(2, 20, 7)
    position = torch.tensor([[[0], [0], [1]], [[0], [0], [0]]])
    slot = torch.tensor([[0], [1]])
    with torch.autocast("cpu", torch.bfloat16):
        out = mmfs(query, mmfs.values(features), slot, position, torch.full((1, 2), 0.5))
    out.float().square().sum().backward()
    grads = {name: parameter.grad for name, parameter in mmfs.named_parameters()}
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in grads.values())
    assert grads["value_proj.weight"].any() and grads["offset_proj.weight"].any()
    assert query.grad[0, 2].any() and not query.grad[1].any()


def test_starts_by_looking_around_the_reference_whatever_the_query_says():
    """Offsets: weight 0, bias U(-m, m). Image index N(0, 0.02), truncated. Other biases 0."""
    mmfs = Mmfs(paper_config(8, 8, 3), 96, 64, 48, (4, 2, 1), 4.0)
    assert not mmfs.offset_proj.weight.any()
    bias = mmfs.offset_proj.bias.detach()
    assert 1.7 < bias.abs().max() <= 2.0 and bias.std() == pytest.approx(2 / 3**0.5, rel=0.2)
    assert mmfs.image_index.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for layer in (mmfs.value_proj, mmfs.output_proj):
        bound = (6 / sum(layer.weight.shape)) ** 0.5  # Xavier, uniform
        assert 0.9 * bound < layer.weight.abs().max() <= bound
    for layer in (mmfs.query_proj, mmfs.weight_proj, mmfs.value_proj, mmfs.output_proj):
        assert not layer.bias.any()


def test_take_levels_keeps_the_rows_of_its_levels():
    sides = (4, 2, 1)
    features = torch.arange(21.0).view(1, 21, 1)
    assert take_levels(features, sides, (1, 2)).flatten().tolist() == list(range(16, 21))
    assert take_levels(features, sides, (0, 2)).flatten().tolist() == [*range(16), 20]
