"""Sampling as a matrix product: against the gathering form, values and gradients."""

from __future__ import annotations

import pytest
import torch

from mmi_train.model.deformable import sample_levels
from mmi_train.model.dense_sampling import MAX_CELLS, prefer_dense, sample_dense

SIDES = (4, 3, 1)


@pytest.mark.parametrize("levels", [1, 3], ids=["shared location", "location per level"])
def test_sample_dense_and_its_gradients_equal_sample_levels(agree, levels):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    value = draw(2, sum(side * side for side in SIDES), 2, 5).requires_grad_()
    location = (draw(2, 40, 2, levels, 4, 2) * 2 - 0.5).requires_grad_()  # half lie outside
    weight = draw(2, 40, 2, 3, 4).requires_grad_()
    up = draw(2, 40, 10)
    inputs = (value, location, weight)
    ours = sample_dense(value, SIDES, location, weight)
    theirs = sample_levels(value, SIDES, location, weight)
    agree(ours, theirs, 1e-12)
    for mine, other in zip(
        torch.autograd.grad(ours, inputs, up), torch.autograd.grad(theirs, inputs, up), strict=True
    ):
        agree(mine, other, 1e-12)


def test_a_location_that_is_no_number_gives_none_to_its_query_alone():
    """As in `sample_levels`: the training loop says that the loss is not finite."""
    value, weight = torch.ones(1, 26, 1, 2), torch.ones(1, 3, 1, 3, 4)
    location = torch.full((1, 3, 1, 3, 4, 2), 0.5)
    location[0, 1, 0, 2, 0, 0] = torch.nan
    for sample in (sample_dense, sample_levels):
        found = sample(value, SIDES, location, weight)[0]
        assert found[1].isnan().all() and found[[0, 2]].isfinite().all(), sample.__name__


def test_it_pays_only_in_training_and_over_few_cells():
    few, many = (torch.zeros(1, cells, 1, 1) for cells in (MAX_CELLS, MAX_CELLS + 1))
    place = torch.zeros(1, 1, 1, 1, 1, 2)
    assert not prefer_dense(few, place)
    assert prefer_dense(few.requires_grad_(), place)
    assert not prefer_dense(many.requires_grad_(), place)
