"""Folding is exact algebra: folded modules equal the ones they replace (paper Eq. 4)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmi_deploy.spec.config import LlamaConfig, MmfsConfig
from mmi_export.graphs.folding import (
    Affine,
    FoldedGatedMmfs,
    FoldedMmfs,
    FoldedMmfsBlock,
    FoldedValues,
    affine,
)
from mmi_export.graphs.fused_llama import FusedAttention, FusedMlp
from mmi_train.model import llama, unet
from mmi_train.model.mmfs import Mmfs
from oracles.mmfs_float64 import equation_4

MMFS = MmfsConfig(
    heads=2,
    points=3,
    value_width=8,
    levels=(0, 1),
    base_grid=4,
    images=6,
    images_seen=5,
    null_slot=False,
    offset_init=1.0,
)
SIDES, CELLS, WIDTH, FEATURES = (4, 2), 20, 12, 10
LLAMA = LlamaConfig(
    vocab=7, width=WIDTH, layers=1, heads=3, kv_heads=1, mlp_width=20, context=16, mmfs_every=1
)


def drawn(module: nn.Module) -> nn.Module:
    """Every parameter random, so that nothing is hidden behind a zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module.eval()


def seen(queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values of a pool of three images, their slots and positions for two rows."""
    value = torch.randn(3, CELLS, 2, 4)
    slot = torch.randint(0, 3, (2, 4), dtype=torch.int32)
    position = torch.randint(0, 6, (2, queries, 4), dtype=torch.int32)
    return value, slot, position


def assert_same(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("null_slot", [False, True])
@torch.no_grad()
def test_folded_mmfs_equals_mmfs_and_what_follows_it(null_slot: bool) -> None:
    mmfs = drawn(Mmfs(replace(MMFS, null_slot=null_slot), WIDTH, FEATURES, 5, SIDES, 4))
    then = Affine(torch.randn(7, 5).double(), torch.randn(7).double())
    folded = FoldedMmfs(mmfs, then.after(affine(mmfs.output_proj)))
    arguments = (torch.randn(2, 3, WIDTH), *seen(3), torch.rand(3, 2))
    wanted = mmfs(*arguments).double() @ then.weight.T + then.bias
    assert_same(folded(*arguments), wanted.float())


@torch.no_grad()
def test_folded_mmfs_equals_equation_4_written_out() -> None:
    mmfs = drawn(Mmfs(MMFS, WIDTH, FEATURES, 5, SIDES, 4))
    folded = FoldedMmfs(mmfs, affine(mmfs.output_proj))
    query, features = torch.randn(1, 1, WIDTH), torch.randn(2, CELLS, FEATURES)
    slot = torch.tensor([[0, 1]], dtype=torch.int32)
    position = torch.tensor([[[2, 1]]], dtype=torch.int32)  # image 1 is the nearest
    got = folded(query, mmfs.values(features), slot, position, torch.tensor([[0.5, 0.5]]))
    layers = {"q": "query", "p": "offset", "A": "weight", "value": "value", "output": "output"}
    weights = {"PosEmbed": mmfs.image_index.weight.double().numpy()}
    for short, name in layers.items():
        layer = mmfs.get_submodule(f"{name}_proj")
        weights[f"W_{short}"] = layer.weight.double().numpy()
        weights[f"b_{short}"] = layer.bias.double().numpy()
    wanted = equation_4(
        weights,
        query[0, 0].double().numpy(),
        [features[1].double().numpy(), features[0].double().numpy()],
        np.array([0.5, 0.5]),
        shapes=[(side, side) for side in SIDES],
        heads=2,
        points=3,
        base_grid=4,
    )
    np.testing.assert_allclose(got[0, 0].numpy(), wanted, atol=2e-5)


def test_the_dead_outputs_of_the_null_slot_are_dropped() -> None:
    mmfs = Mmfs(replace(MMFS, null_slot=True), WIDTH, FEATURES, 5, SIDES, 4)
    folded = FoldedMmfs(mmfs, affine(mmfs.output_proj))
    assert mmfs.weight_proj.out_features == 2 * 2 * 4
    assert len(folded.query_weight) == 2 * 3 * 2 + 2 * 2 * 3
    assert folded.logit_table.shape == (6, 2, 2, 3)


@torch.no_grad()
def test_folded_language_model_layer_equals_the_layer_it_replaces() -> None:
    layer = drawn(llama.GatedMmfs(LLAMA, MMFS, FEATURES, SIDES))
    arguments = (torch.randn(2, 3, WIDTH), *seen(3))
    assert_same(FoldedGatedMmfs(layer)(*arguments), layer(*arguments))


@torch.no_grad()
def test_folded_unet_block_equals_the_block_it_replaces() -> None:
    config = replace(MMFS, base_grid=None, null_slot=True)
    layer = drawn(unet.MmfsBlock(config, 16, 4, 8, FEATURES, SIDES))
    value, slot, position = seen(1)
    arguments = (torch.randn(2, 16, 4, 4), value, slot, position[:, 0])
    assert_same(FoldedMmfsBlock(layer)(*arguments), layer(*arguments))


@torch.no_grad()
def test_values_of_all_layers_need_one_norm() -> None:
    features = torch.randn(2, CELLS, FEATURES)
    language = [drawn(llama.GatedMmfs(LLAMA, MMFS, FEATURES, SIDES)) for _ in range(3)]
    pictures = [drawn(unet.MmfsBlock(MMFS, 16, 4, 8, FEATURES, SIDES)) for _ in range(2)]
    for layers in (language, pictures):
        folded = FoldedValues(layers)(features)
        for got, layer in zip(folded, layers, strict=True):
            assert_same(got, layer.values(features))


class Remember:
    """A cache that holds what it is given, and nothing else."""

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return key, value


@torch.no_grad()
def test_fused_attention_and_mlp_equal_llamas() -> None:
    config = replace(LLAMA, width=24, heads=3, kv_heads=1)
    attention = drawn(llama.Attention(config, 0))
    hidden = torch.randn(2, 5, 24)
    position = torch.tensor([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]])
    cos, sin = llama.rotary_tables(16, config.head_width, 10000.0)
    rotary = cos[position].unsqueeze(1), sin[position].unsqueeze(1)
    mask = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)
    got = FusedAttention(attention)(hidden, rotary, mask, Remember())
    assert_same(got, attention(hidden, rotary, mask, None))
    mlp = drawn(llama.Mlp(config))
    assert_same(FusedMlp(mlp)(hidden), mlp(hidden))
