"""The fused MMFS operator trains as the definition does, and is chosen where its kernels run."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import get_context

import pytest
import torch
from torch import Tensor

from export.small_models import paper_reading, random_model, released_reading
from mmi_train.model.deformable import multi_image_deformable_attention
from mmi_train.model.mm_interleaved import Batch, MMInterleaved
from mmi_train.model.mmfs import Mmfs
from mmi_train.training import fused_mmfs
from mmi_train.training.fused_mmfs import fused_attention, use_fused_mmfs
from oracles import mmfs_triton

CUDA = torch.device("cuda")
CONFIGS = {"paper": paper_reading, "released": released_reading}


def fuse(model: MMInterleaved, monkeypatch: pytest.MonkeyPatch) -> int:
    """Fuse as on a machine with CUDA and Triton; the operator's own CPU kernel runs."""
    monkeypatch.setattr(fused_mmfs, "find_spec", lambda name: name == "triton")
    return use_fused_mmfs(model, CUDA)


def batch_of(model: MMInterleaved) -> Batch:
    """Two rows: three images, two pictures with an image before them and one without."""
    tokens, torch_seed = model.config.tokens, torch.manual_seed(3)
    image = [tokens.boi, *[tokens.image] * model.config.visual_tokens]
    row = [tokens.bos, 9, *image, 8, *image, 7, tokens.eos]
    other = [tokens.bos, 5, *image, tokens.eos]
    other += [tokens.pad] * (len(row) - len(other))
    side, size = model.config.vision.image_size, model.config.image_decoder.image_size
    return Batch(
        torch.tensor([row, other]),
        torch.tensor([[0, 1], [2, -1]]),
        torch.rand(3, 3, side, side, generator=torch_seed),
        pictures=torch.tensor([[0, 0], [0, 1], [1, 0]]),
        target_pixels=torch.rand(3, 3, size, size, generator=torch_seed),
    )


def trained(model: MMInterleaved, batch: Batch, bf16: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of all that learns."""
    model.train().zero_grad()
    draws = model.image_decoder.random_draws(3, torch.Generator().manual_seed(1))
    draws = replace(draws, drop=torch.tensor([0.5, 0.5, 0.01]))
    torch.manual_seed(2)  # of the Q-Former's dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(batch, draws=draws).total
    loss.backward()
    return loss.detach(), {
        name: value.grad for name, value in model.named_parameters() if value.grad is not None
    }


@pytest.mark.parametrize("config", CONFIGS)
def test_loss_and_gradients_are_those_of_the_definition(config: str, monkeypatch):
    model = random_model(CONFIGS[config]())
    batch = batch_of(model)
    loss, wanted = trained(model, batch, bf16=False)
    calls: list[int] = []
    assert fuse(model, monkeypatch) == sum(isinstance(part, Mmfs) for part in model.modules()) > 2

    def counted(*inputs: Tensor, **attributes: object) -> Tensor:
        calls.append(len(inputs))
        return fused_attention(*inputs, **attributes)

    for part in model.modules():
        if isinstance(part, Mmfs):
            part.operator = counted
    got, found = trained(model, batch, bf16=False)
    assert len(calls) == sum(isinstance(part, Mmfs) for part in model.modules())
    torch.testing.assert_close(got, loss, rtol=1e-5, atol=0)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        if name.endswith("k_proj.bias"):  # moves all scores of a query alike: rounding alone
            assert max(float(one.abs().max()) for one in (gradient, found[name])) < 1e-7, name
            continue
        scale = float(gradient.abs().max()) + 1e-6
        assert float((found[name] - gradient).abs().max()) < 2e-3 * scale, name


def test_mixed_precision_gives_the_kernels_the_types_they_take(monkeypatch):
    """Linear layers give bfloat16 for tables too, which the kernels want in fp32."""
    model = random_model(released_reading())
    batch = batch_of(model)
    loss, wanted = trained(model, batch, bf16=True)
    fuse(model, monkeypatch)
    got, found = trained(model, batch, bf16=True)
    torch.testing.assert_close(got, loss, rtol=5e-3, atol=0)
    name = "llm.layers.0.look_back.mmfs.value_proj.weight"
    assert found[name].dtype == torch.float32
    cosine = torch.cosine_similarity(found[name].flatten(), wanted[name].flatten(), dim=0)
    assert float(cosine) > 0.99


def test_it_is_chosen_on_cuda_with_triton_alone(monkeypatch):
    model = random_model(paper_reading())
    assert use_fused_mmfs(model, torch.device("cpu")) == 0
    monkeypatch.setattr(fused_mmfs, "find_spec", lambda name: None)
    assert use_fused_mmfs(model, CUDA) == 0
    layers = [part for part in model.modules() if isinstance(part, Mmfs)]
    assert all(layer.operator is multi_image_deformable_attention for layer in layers)
    layers[0].config = replace(layers[0].config, heads=32)  # 4 channels a head
    assert fuse(model, monkeypatch) == len(layers) - 1
    assert layers[0].operator is multi_image_deformable_attention
    assert layers[1].operator is fused_attention


@pytest.mark.skipif(not find_spec("triton"), reason="no triton: pip install triton")
def test_the_triton_kernels_train_a_layer_as_the_definition_does():
    """Interpreted on the CPU, in a process of its own."""
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=mmfs_triton.interpret
    ) as pool:
        pairs = pool.submit(mmfs_triton.layer).result()
    assert len(pairs) > 10
    for name, (got, wanted) in pairs.items():
        scale = float(abs(wanted).max()) + 1e-6
        assert float(abs(got - wanted).max()) < 1e-4 * scale, name
