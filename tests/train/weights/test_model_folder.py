"""A model folder is read back as it was written; what does not fit is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmi_deploy.errors import WeightsError
from mmi_train.weights.model_folder import load_strictly

State = dict[str, Tensor]


class Counter(nn.Module):
    """Weights and a whole number, as batch norms keep one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


@pytest.fixture
def state() -> State:
    return {
        "layer.weight": torch.arange(6.0).reshape(2, 3),
        "layer.bias": torch.tensor([0.5, -0.5]),
        "steps": torch.tensor(7),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision_is_taken(state: State, dtype: torch.dtype, tmp_path: Path) -> None:
    halves = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    save_file(halves, tmp_path / "model.safetensors")
    module = Counter()
    load_strictly(module, load_file(tmp_path / "model.safetensors"), "the file")
    assert module.layer.weight.dtype == torch.float32
    assert torch.equal(module.layer.weight, state["layer.weight"])
    assert int(module.steps) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer.bias"), "lacks 1 tensors: layer.bias"),
        (lambda s: s.update(extra=torch.ones(1)), "has 1 unknown tensors: extra"),
        (lambda s: s.update(steps=torch.ones(2, dtype=torch.int64)), "steps has the wrong shape"),
        (lambda s: s["layer.weight"].fill_(torch.nan), "layer.weight holds NaN"),
        (
            lambda s: s.update({"layer.weight": s["layer.weight"].int()}),
            "layer.weight holds another kind .* expected floating point; got integer",
        ),
        (
            lambda s: s.update({"layer.bias": s["layer.bias"] > 0}),
            "layer.bias holds another kind .* expected floating point; got bool",
        ),
        (lambda s: s.update(steps=torch.tensor(7.5)), "expected integer; got floating point"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(
    state: State, change: Callable[[State], object], message: str
) -> None:
    change(state)
    module = Counter()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(WeightsError, match=f"the file.*{message}") as caught:
        load_strictly(module, state, "the file")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
