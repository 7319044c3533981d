"""The deformable core: against grid_sample, against float64 loops, and its gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmi_train.model.deformable import (
    multi_image_deformable_attention,
    sample_levels,
    sample_pool,
)
from oracles import mmfs_float64

SHAPES = [(5, 3), (2, 4)]
CELLS = 5 * 3 + 2 * 4


def draw(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def by_grid_sample(value, shapes, location, weight):
    """Zhu et al.'s own formulation: one `grid_sample` per level."""
    n, _, h, d = value.shape
    q, p = weight.shape[1], weight.shape[4]
    out, start = 0.0, 0
    for level, (height, width) in enumerate(shapes):
        end = start + height * width
        planes = value[:, start:end].permute(0, 2, 3, 1).reshape(n * h, d, height, width)
        start = end
        places = location[:, :, :, level if location.shape[3] > 1 else 0]
        grid = places.permute(0, 2, 1, 3, 4).reshape(n * h, q, p, 2) * 2 - 1
        sampled = F.grid_sample(planes, grid, align_corners=False).view(n, h, d, q, p)
        out = out + torch.einsum("nhdqp,nqhp->nqhd", sampled, weight[:, :, :, level])
    return out.flatten(2)


@pytest.mark.parametrize("levels", [1, 2], ids=["shared location", "location per level"])
def test_sample_levels_and_its_gradients_equal_grid_sample(generator, agree, levels):
    value = draw(generator, 3, CELLS, 2, 4).requires_grad_()
    location = (draw(generator, 3, 6, 2, levels, 5, 2) * 0.6 + 0.5).requires_grad_()
    weight = draw(generator, 3, 6, 2, 2, 5).requires_grad_()
    grad = draw(generator, 3, 6, 8)
    inputs = (value, location, weight)
    ours, theirs = (
        sample_levels(value, SHAPES, location, weight),
        by_grid_sample(value, SHAPES, *inputs[1:]),
    )
    agree(ours, theirs, 1e-12)
    for mine, other in zip(
        torch.autograd.grad(ours, inputs, grad),
        torch.autograd.grad(theirs, inputs, grad),
        strict=True,
    ):
        agree(mine, other, 1e-12)


def test_what_is_exported_equals_what_is_trained(generator, agree):
    class Sampled(torch.nn.Module):
        def forward(self, value, location, weight):
            return sample_levels(value, SHAPES, location, weight)

    inputs = (
        draw(generator, 2, CELLS, 2, 4).float(),
        draw(generator, 2, 6, 2, 1, 5, 2).float() * 0.3 + 0.5,
        draw(generator, 2, 6, 2, 2, 5).float(),
    )
    program = torch.export.export(Sampled(), inputs)
    kinds = {str(node.target) for node in program.graph.nodes}
    assert any("grid_sampler" in kind for kind in kinds)
    assert not any("embedding" in kind for kind in kinds)
    agree(program.module()(*inputs), Sampled()(*inputs), 1e-5)


def test_gradients_are_the_derivatives(generator):
    """Central differences in float64, with points outside the map and rows read more than once."""
    value = draw(generator, 2, CELLS, 1, 2).requires_grad_()
    location = (draw(generator, 2, 2, 1, 2, 3, 2) * 0.5 + 0.5).requires_grad_()
    weight = draw(generator, 2, 2, 1, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, x, w: sample_levels(v, SHAPES, x, w), (value, location, weight)
    )


def test_a_pool_is_read_by_slot_and_summed_over_images(generator, agree):
    """Rows that share an image add up in its gradient; an image that nobody names gets none."""
    value = draw(generator, 4, CELLS, 2, 3).requires_grad_()
    slot = torch.tensor([[2, 0], [2, 2], [1, 0]])
    location = draw(generator, 3, 5, 2, 2, 1, 4, 2) * 0.3 + 0.5
    weight = draw(generator, 3, 5, 2, 2, 2, 4)
    ours = sample_pool(value, slot, SHAPES, location, weight)
    parts = [
        by_grid_sample(value[slot[:, m]], SHAPES, location[:, :, :, m], weight[:, :, :, m])
        for m in range(2)
    ]
    agree(ours, sum(parts), 1e-12)
    grad = draw(generator, *ours.shape)
    mine, theirs = (torch.autograd.grad(out, value, grad)[0] for out in (ours, sum(parts)))
    agree(mine, theirs, 1e-12)
    assert not mine[3].any()


def test_a_location_that_is_not_finite_is_read_without_a_crash(generator):
    value = draw(generator, 1, CELLS, 1, 2).float()
    location = torch.full((1, 1, 1, 1, 1, 2), 0.5)
    weight = torch.ones(1, 1, 1, 2, 1)
    for wrong in (float("nan"), float("inf"), -1e30):
        location[..., 0] = wrong
        out = sample_levels(value, SHAPES, location, weight)
        assert out.shape == (1, 1, 2)
        if wrong == -1e30:
            assert not out.any()


def operator_inputs(generator, *, base_grid, per_query_position, per_query_reference, null_slot):
    """Slots and positions in and out of range, repeated slots, and a row that sees nothing."""
    b, q, m, h, p, d, n, rows = 2, 4, 3, 2, 3, 4, 3, 5
    position = torch.randint(0, rows, (b, q if per_query_position else 1, m), generator=generator)
    position[0, 0] = torch.tensor([1, 0, rows])
    position[1, 0] = torch.tensor([0, -1, rows + 7])
    inputs = dict(
        value=draw(generator, n, CELLS, h, d),
        image_slot=torch.tensor([[2, 0, 2], [1, n, -1]], dtype=torch.int32),
        offsets=draw(generator, b, q, h, p, 2) * 1.5,
        logits=draw(generator, b, q, h, 2, p) * 2,
        offset_table=draw(generator, rows, h, p, 2),
        logit_table=draw(generator, rows, h, 2, p),
        image_position=position.to(torch.int32),
        reference=torch.rand(q if per_query_reference else 1, 2, generator=generator),
        null_value=draw(generator, h, d),
    )
    attributes = dict(
        level_heights=[5, 2], level_widths=[3, 4], base_grid=base_grid, null_slot=null_slot
    )
    return inputs, attributes


@pytest.mark.parametrize("null_slot", [False, True])
@pytest.mark.parametrize("per_query", [False, True])
@pytest.mark.parametrize("base_grid", [2.0, 16.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_operator_equals_its_definition_in_float64_loops(
    generator, agree, null_slot, per_query, base_grid, dtype, tolerance
):
    inputs, attributes = operator_inputs(
        generator,
        base_grid=base_grid,
        per_query_position=per_query,
        per_query_reference=not per_query,
        null_slot=null_slot,
    )
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    expected = mmfs_float64.operator(**{k: v.numpy() for k, v in inputs.items()}, **attributes)
    agree(multi_image_deformable_attention(**inputs, **attributes), expected, tolerance)
    nothing = expected[1, 0]  # this row sees no image
    assert np.allclose(nothing, inputs["null_value"].flatten() if null_slot else 0.0)


def test_a_hidden_image_changes_nothing_and_receives_no_gradient(generator):
    inputs, attributes = operator_inputs(
        generator,
        base_grid=4.0,
        per_query_position=True,
        per_query_reference=False,
        null_slot=False,
    )
    inputs["image_slot"] = torch.tensor([[0, 1, 2], [0, 1, 2]])
    inputs["image_position"][:, :, 1] = 0
    value = inputs["value"].requires_grad_()
    out = multi_image_deformable_attention(**inputs, **attributes)
    (grad,) = torch.autograd.grad(out.square().sum(), value)
    assert grad[0].any() and grad[2].any() and not grad[1].any() and bool(grad.isfinite().all())
    inputs["value"] = value.detach().index_fill(0, torch.tensor([1]), 1e6)
    assert torch.equal(multi_image_deformable_attention(**inputs, **attributes), out)
