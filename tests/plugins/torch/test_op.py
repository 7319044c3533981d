"""The PyTorch op: its output against the float64 reference, its gradients against finite
differences of it, and what autograd, `torch.compile` and `torch.export` see of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from mmi_deploy.errors import EngineError
from mmi_plugins.conformance.calls import draw, draws
from mmi_plugins.conformance.torch_op import TORCH_OP
from mmi_plugins.operator import INPUT_SHAPES, NARROW_INPUTS, TOLERANCES, Call
from mmi_plugins.reference import all_rows, mmfs_reference, output_of
from mmi_plugins.torch import kernel
from mmi_plugins.torch.op import multi_image_deformable_attention
from oracles.mmfs_slopes import FLOATING, slope, smooth_call


def tensors(call: Call, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The call's inputs in the operator's types, or the floating ones all in `dtype`."""
    found = {}
    for name in INPUT_SHAPES:
        tensor = torch.from_numpy(np.array(call[name]))
        if name in FLOATING and dtype:
            tensor = tensor.to(dtype)
        elif name in NARROW_INPUTS:
            tensor = tensor.to(getattr(torch, call.dtype))
        found[name] = tensor.requires_grad_() if name in FLOATING else tensor
    return found


def attributes(call: Call) -> dict[str, Any]:
    return {
        "level_heights": call.level_heights,
        "level_widths": call.level_widths,
        "base_grid": call.base_grid,
        "null_slot": call.null_slot,
    }


def run(call: Call, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return multi_image_deformable_attention(**inputs, **attributes(call))


def gradients(call: Call, inputs: dict[str, torch.Tensor], grad: torch.Tensor) -> dict[str, Any]:
    leaves = [inputs[name] for name in FLOATING]
    found = torch.autograd.grad(run(call, inputs), leaves, grad)
    return dict(zip(FLOATING, found, strict=True))


def relative(got: Any, wanted: Any) -> float:
    """rms of error / rms of wanted; where nothing is wanted, the rms of error."""
    got, wanted = (np.asarray(torch.as_tensor(x).double().detach()) for x in (got, wanted))
    norm = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(got - wanted)) / (norm or 1.0)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_situation_is_within_the_tolerance_of_its_type(dtype: str) -> None:
    for name, call in draws(11, 24, dtype=dtype):
        rows = all_rows(call)
        error = relative(TORCH_OP.run(call, rows), mmfs_reference(call, rows))
        assert error <= TOLERANCES[dtype].relative, f"{name}: {error:.1e}"


@pytest.mark.parametrize("situation", ["ordinary", "tiny logits", "huge logits", "far outside"])
def test_fp32_errors_grow_with_neither_the_map_nor_the_scores(situation: str) -> None:
    levels = [(64, 64), (32, 32)]
    fixed = {"dtype": "float32", "null_slot": False, "levels": levels, "b": 1, "q": 3, "h": 2}
    call = draw(np.random.default_rng(0), situation, base_grid=4.0, d=16, **fixed)
    rows = all_rows(call)
    assert relative(TORCH_OP.run(call, rows), mmfs_reference(call, rows)) <= 5e-7


def test_rows_can_be_chosen() -> None:
    call = draw(np.random.default_rng(1), b=2, q=3, h=2)
    rows = all_rows(call)[[7, 0, 11]]
    np.testing.assert_array_equal(
        TORCH_OP.run(call, rows), TORCH_OP.run(call, all_rows(call))[[7, 0, 11]]
    )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("null_slot", [False, True])
def test_gradients_equal_finite_differences_of_the_reference(null_slot: bool, shared: bool) -> None:
    call = smooth_call(3, null_slot=null_slot, shared=shared)
    rng = np.random.default_rng(4)
    grad = rng.normal(size=output_of(call, mmfs_reference(call)).shape)
    found = gradients(call, tensors(call, torch.float64), torch.from_numpy(grad))
    for name in FLOATING:
        for _ in range(3):
            direction = rng.choice([-1.0, 0.0, 1.0], call[name].shape)
            wanted = slope(call, name, direction, grad)
            got = float((found[name].numpy() * direction).sum())
            assert got == pytest.approx(wanted, rel=1e-7, abs=1e-7), name
    assert found["null_value"].any() == null_slot
    for name in set(FLOATING) - {"null_value"}:
        assert found[name].any(), name


@pytest.mark.parametrize("null_slot", [False, True])
def test_gradcheck(null_slot: bool) -> None:
    call = draw(
        np.random.default_rng(5),
        **{"b": 1, "q": 2, "m": 2, "n": 2, "r": 4, "h": 1, "p": 2, "d": 8},
        levels=[(3, 2), (2, 2)],
        null_slot=null_slot,
        references=True,
        per_query=True,
    )
    call.inputs["image_position"][:] = [[1, 2], [3, 0]]
    inputs = tensors(call, torch.float64)

    def function(*floating: torch.Tensor) -> torch.Tensor:
        return run(call, {**inputs, **dict(zip(FLOATING, floating, strict=True))})

    assert torch.autograd.gradcheck(function, [inputs[name] for name in FLOATING])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_narrow_gradients_are_those_of_fp64_rounded(dtype: str) -> None:
    call = draw(
        np.random.default_rng(6), dtype=dtype, null_slot=True, q=17, m=5, levels=[(6, 9), (3, 4)]
    )
    inputs = tensors(call)
    output = run(call, inputs)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output.dtype)
    found = gradients(call, inputs, grad)
    wanted = gradients(call, tensors(call, torch.float64), grad.double())
    for name in FLOATING:
        assert found[name].dtype == inputs[name].dtype
        tolerance = TOLERANCES[dtype if name in NARROW_INPUTS else "float32"].relative
        assert relative(found[name], wanted[name]) <= tolerance, name


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One query a chunk gives what all at once give."""
    call = draw(np.random.default_rng(7), b=2, q=17, h=2, per_query=True, references=True)
    inputs = tensors(call, torch.float64)
    output = run(call, inputs)
    grad = torch.ones_like(output)
    wanted = gradients(call, inputs, grad)
    monkeypatch.setattr(kernel, "MAX_CORNERS", 1)
    monkeypatch.setattr(kernel, "MAX_CORNERS_BACKWARD", 1)
    assert relative(run(call, inputs), output) <= 1e-12
    for name, gradient in gradients(call, inputs, grad).items():
        assert relative(gradient, wanted[name]) <= 1e-12, name


def test_a_hidden_image_is_not_seen_and_receives_no_gradient() -> None:
    call = draw(np.random.default_rng(8), b=1, m=2, n=3, r=4, q=3, per_query=False, dtype="float32")
    call.inputs["image_slot"][:] = [[0, 1]]
    call.inputs["image_position"][:] = [[[2, 0]]]
    inputs = tensors(call)
    output = run(call, inputs)
    found = gradients(call, inputs, torch.ones_like(output))
    assert found["value"][0].any() and not found["value"][1:].any()
    for name in ("offset_table", "logit_table"):
        assert not found[name][[0, 1, 3]].any(), name
    moved = inputs | {"value": inputs["value"].detach().clone()}
    moved["value"][1:] += 100
    assert torch.equal(run(call, moved), output)


@pytest.mark.parametrize("null_slot", [False, True])
def test_a_query_that_sees_nothing_passes_gradients_to_the_null_value_alone(null_slot) -> None:
    call = draw(np.random.default_rng(9), "all hidden", null_slot=null_slot, dtype="float32")
    inputs = tensors(call)
    output = run(call, inputs)
    found = gradients(call, inputs, torch.ones_like(output))
    queries = call.sizes["b"] * call.sizes["q"]
    wanted = torch.full_like(inputs["null_value"], queries * null_slot)
    torch.testing.assert_close(found.pop("null_value"), wanted)
    assert not any(gradient.any() for gradient in found.values())


def test_what_is_not_finite_is_outside_and_does_not_crash() -> None:
    call = draw(np.random.default_rng(10), null_slot=False, dtype="float32", q=1, h=1, p=1, b=1)
    call.inputs["image_position"][:] = 1
    for wrong in (np.inf, -np.inf, np.nan, 3e38):
        call.inputs["offsets"][:] = wrong
        assert not run(call, tensors(call)).any()
        np.testing.assert_array_equal(mmfs_reference(call), 0)


def test_pytorchs_own_checks_of_an_op() -> None:
    call = draw(np.random.default_rng(12), b=2, q=3, h=2, d=8, dtype="float32", null_slot=True)
    torch.library.opcheck(
        torch.ops.mmi.multi_image_deformable_attention,
        (*tensors(call).values(), *attributes(call).values()),
    )


class Looking(torch.nn.Module):
    """The op between two others."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.attributes = attributes(call)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return multi_image_deformable_attention(*inputs, **self.attributes).relu() + 1


def ops(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_export_sees_one_opaque_op_with_dynamic_batch_and_queries() -> None:
    call = draw(np.random.default_rng(13), b=2, q=3, dtype="float32", references=False)
    call = replace(
        call, inputs={**call.inputs, "image_position": call["image_position"][:, :1].copy()}
    )
    b, q = torch.export.Dim("b"), torch.export.Dim("q")
    axes = {"b": b, "q": q}
    shapes = tuple(
        {
            axis: axes[letter]
            for axis, letter in enumerate(letters)
            if letter in axes  # a `*` is 1 in this call
        }
        for letters in INPUT_SHAPES.values()
    )
    inputs = tuple(tensor.detach() for tensor in tensors(call).values())
    program = torch.export.export(Looking(call), inputs, dynamic_shapes={"inputs": shapes})
    assert [name for name in ops(program.graph) if "mmi" in name] == [
        "mmi.multi_image_deformable_attention.default"
    ]
    assert len(ops(program.graph)) == 3
    other = draw(
        np.random.default_rng(14),
        **{name: call.sizes[name] for name in "mnrhpd"},
        **{"b": 1, "q": 17, "per_query": False, "references": False, "dtype": "float32"},
        levels=list(zip(call.level_heights, call.level_widths, strict=True)),
    )
    inputs = tuple(tensor.detach() for tensor in tensors(other).values())
    torch.testing.assert_close(program.module()(*inputs), Looking(call)(*inputs))


def test_compile_sees_one_op_forward_and_one_backward() -> None:
    call = draw(np.random.default_rng(15), b=2, q=3, dtype="float32", null_slot=True)
    seen: list[list[str]] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        seen.append([name for name in ops(module.graph) if "mmi" in name])
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    compiled = torch.compile(Looking(call), backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    inputs = tensors(call)
    output = compiled(*inputs.values())
    leaves = [inputs[name] for name in FLOATING]
    found = torch.autograd.grad(output.sum(), leaves)
    wanted = torch.autograd.grad(Looking(call)(*inputs.values()).sum(), leaves)
    torch.testing.assert_close(found, wanted)
    assert seen == [
        ["mmi.multi_image_deformable_attention.default"],
        ["mmi.multi_image_deformable_attention_backward.default"],
    ]


def test_a_second_derivative_is_refused() -> None:
    call = draw(np.random.default_rng(16), dtype="float32", b=1, q=1)
    inputs = tensors(call)
    (first,) = torch.autograd.grad(run(call, inputs).sum(), inputs["logits"], create_graph=True)
    with pytest.raises(RuntimeError, match="multi_image_deformable_attention_backward"):
        torch.autograd.grad(first.sum(), inputs["logits"])


def mistakes() -> Iterator[Any]:
    """A name, the inputs or attributes to change, and what the error says."""
    wide = {"value": torch.zeros(2, 64, 2, 12), "null_value": torch.zeros(2, 12)}
    yield pytest.param(wide, "unsupported head size; expected a multiple of 8.* got 12", id="head")
    yield pytest.param(
        {"logits": torch.zeros(1, 3, 3, 1, 4)}, "logits and value differ in h", id="heads"
    )
    yield pytest.param(
        {"reference": torch.zeros(2, 2)}, "reference must have a row", id="references"
    )
    yield pytest.param({"level_widths": (7,)}, "do not make up the cells", id="levels")
    yield pytest.param({"base_grid": 0.0}, "base_grid must be positive", id="grid")
    yield pytest.param(
        {"offsets": torch.zeros(1, 3, 2, 4, 2, dtype=torch.float16)}, "wrong type of offsets"
    )
    yield pytest.param(
        {"image_slot": torch.zeros(1, 2, dtype=torch.int64)}, "wrong type of image_slot"
    )
    yield pytest.param({"value": torch.zeros(2, 64, 2, 8).int()}, "unsupported type of value")
    yield pytest.param(
        {"null_value": torch.zeros(2, 8, device="meta")}, "on different devices", id="devices"
    )


@pytest.mark.parametrize("change, message", mistakes())
def test_a_mistake_is_one_readable_line(change: dict[str, Any], message: str) -> None:
    call = draw(
        np.random.default_rng(17),
        **{"b": 1, "q": 3, "m": 2, "h": 2, "p": 4, "d": 8, "n": 2},
        levels=[(8, 8)],
        dtype="float32",
    )
    arguments = {**tensors(call), **attributes(call), **change}
    with pytest.raises(EngineError, match=message) as error:
        multi_image_deformable_attention(**arguments)
    assert "\n" not in str(error.value)
