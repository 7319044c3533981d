"""Rules about kernel plans: each with a small graph that keeps it and one that breaks it, built by
TensorRT-RTX, and the plans of the shipped model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import helper

from deploy.targets.small_engines import (
    attention,
    cached_attention,
    graph,
    group_norm,
    plans_of,
    quantised_product,
    value,
    weight,
)
from exports import SHIPPED, Exported
from mmi_bench import plan_lint
from mmi_bench.plan_lint import bundle_sources
from mmi_deploy.bundle.kernel_plan import Finding, Kernel, ProfilePlan
from mmi_deploy.errors import EngineError
from mmi_deploy.spec.backends import TENSORRT, TENSORRT_RTX
from mmi_deploy.targets.plan_rules import RULES, Facts, check_plans, facts_of, refuse_fatal
from mmi_deploy.targets.tensorrt_rewrites import rewrite_for_tensorrt
from mmi_plugins.tensorrt.weight_only import weight_only_products

rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx-cu13"
)


def broken(model: onnx.ModelProto, plans: tuple[ProfilePlan, ...], half: bool = True) -> set[str]:
    return {finding.rule for finding in check_plans(plans, facts_of(model), half)}


@rtx
@pytest.mark.parametrize("architecture", ["sm80", "sm89", "sm120"])
def test_one_row_exactly_writes_an_int8_weight_dequantised(
    architecture: str, tmp_path: Path
) -> None:
    """The reason why int8 is built for two rows at least: the product is fused then."""
    one = quantised_product(1)
    assert broken(one, plans_of(one, tmp_path, architecture)) == {"dequantised weights"}
    dynamic = quantised_product("t")
    shapes = {"x": ((1, 1, 512), (1, 1, 512), (1, 2, 512))}
    assert not broken(dynamic, plans_of(dynamic, tmp_path, architecture, shapes))
    four_bits = quantised_product(1, "int4")
    assert not broken(four_bits, plans_of(four_bits, tmp_path, architecture))


@rtx
@pytest.mark.parametrize("numbers", ["int8", "int4"])
def test_one_row_exactly_is_one_kernel_of_our_plugin(numbers: str, tmp_path: Path) -> None:
    """In the profiles of decode and of prefill; nothing is written but the output."""
    source = tmp_path / "given.onnx"
    for rows, shapes in ((1, None), ("t", {"x": ((1, 1, 512), (1, 256, 512), (1, 2048, 512))})):
        onnx.save(quantised_product(rows, numbers), source)
        ours = weight_only_products(onnx.load(source), source)
        plans = plans_of(ours, tmp_path, shapes=shapes)  # type: ignore[arg-type]
        assert not broken(ours, plans)
        (kernel,) = plans[0].launched
        assert kernel.kind == "custom_layer" and kernel.nodes == ("product",)
    assert broken(quantised_product(1), plans) == {"plugin"}


@rtx
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_attention_in_float32_has_its_matrix_in_memory(dtype: str, tmp_path: Path) -> None:
    model = attention(dtype)
    plans = plans_of(model, tmp_path)
    expected = {"fused attention", "attention matrices"} if dtype == "float32" else set()
    assert broken(model, plans) == expected
    assert not broken(model, plans, half=False), "an engine in float32 is meant to be one"
    if dtype == "float32":
        matrix = 4 * 5 * 1024 * 1024
        found = check_plans(plans, facts_of(model))
        wasted = [one.bytes for one in found if one.rule == "attention matrices"]
        assert wasted and set(wasted) == {2 * matrix}, "written once and read once"


@rtx
def test_heads_that_no_kernel_fuses_are_let_pass(tmp_path: Path) -> None:
    """The attention of Stable Diffusion's VAE: one head of 512 channels."""
    model = attention("float16", heads=1, width=512)
    plans = plans_of(model, tmp_path)
    assert not any("mha" in kernel.name for plan in plans for kernel in plan.launched)
    assert not broken(model, plans) and not facts_of(model).attentions
    assert facts_of(attention("float16", heads=2, width=256)).attentions == ("attention",)


@rtx
@pytest.mark.parametrize("architecture", ["sm80", "sm89", "sm120"])
def test_queries_scaled_before_attention_copy_the_kv_cache(
    architecture: str, tmp_path: Path
) -> None:
    """At the sizes of LLaMA 13B the plain operator reads the cache where it lies."""
    plain = cached_attention()
    assert not broken(plain, plans_of(plain, tmp_path, architecture))
    scaled = cached_attention(scaled_before=True)
    plans = plans_of(scaled, tmp_path, architecture)
    found = check_plans(plans, facts_of(scaled))
    assert {one.rule for one in found} == {"copies of the KV cache"}
    assert all(one.bytes == 2 * 2 * 40 * 2048 * 128 for one in found)


@rtx
def test_group_norms_are_one_kernel_at_the_sizes_of_stable_diffusion(tmp_path: Path) -> None:
    for channels, side in ((320, 64), (640, 32), (1280, 16)):
        model = group_norm(channels, side)
        assert not broken(model, plans_of(model, tmp_path)), channels
    small = group_norm(160, 16)
    assert broken(small, plans_of(small, tmp_path)) == {"fused group norms"}


def products(rows: int | str, merged: bool, folder: Path) -> onnx.ModelProto:
    """Three products of x [rows, 32, 512] with weights [512, 512], as PyTorch stores them."""
    width = 512
    x = value("x", "float32", rows, 32, width)
    weights = [weight(f"w{part}", "float32", width, width) for part in "qkv"]
    nodes, outputs = [], []
    for part in "qkv":
        nodes += [
            helper.make_node("Transpose", [f"w{part}"], [f"t{part}"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", f"t{part}"], [part], name=part),
        ]
        outputs.append(value(part, "float32", rows, 32, width))
    model = graph(nodes, [x], outputs, weights)
    if not merged:
        return model
    path = folder / "products.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=0)
    model = rewrite_for_tensorrt(onnx.load(path, load_external_data=False), path)
    onnx.external_data_helper.load_external_data_for_model(model, str(folder))
    return model


@rtx
def test_products_of_one_tensor_are_one_kernel(tmp_path: Path) -> None:
    """TensorRT-RTX merges them itself, but not in a batch of exactly one."""
    single = products(1, False, tmp_path)
    assert broken(single, plans_of(single, tmp_path)) == {"merged products"}
    merged = products(1, True, tmp_path)
    assert not broken(merged, plans_of(merged, tmp_path))
    dynamic = products("b", False, tmp_path)
    shapes = {"x": ((1, 32, 512), (1, 32, 512), (8, 32, 512))}
    assert not broken(dynamic, plans_of(dynamic, tmp_path, shapes=shapes))


def test_an_mmfs_node_that_is_not_our_kernel_is_found() -> None:
    plan = ProfilePlan(profile="default", kernels=(Kernel(name="a", kind="custom_layer"),))
    assert not check_plans([plan], Facts(plugins=("one",)))
    (finding,) = check_plans([plan], Facts(plugins=("one", "two")))
    assert finding.rule == "plugin" and finding.fatal
    assert finding.what == "2 nodes of our operators became 1 kernels of our plugin"


def test_a_cache_may_be_copied_and_a_weight_dequantised_once_per_prompt() -> None:
    dequantised = Kernel(
        name="k", kind="kgen", constants=("w:Int8[64,64]",), outputs=("d:Half[64,64]",)
    )
    copied = Kernel(
        name="c", kind="kgen", inputs=("present_key.00:Half[-1,3,512,64]",),
        outputs=("o:Half[-1,512,64]",),
    )  # fmt: skip
    facts = Facts(caches=frozenset({"present_key.00"}))
    for profile, count in (("prefill", 0), ("decode", 2)):
        plan = ProfilePlan(profile=profile, kernels=(dequantised, copied))
        assert len(check_plans([plan], facts)) == count


def test_heads_that_were_part_of_a_dynamic_side_are_no_matrix() -> None:
    """Lines that TensorRT-RTX logs after the attention of a prefill in bfloat16 for sm80."""
    after = Kernel(
        name="__myl_MoveReshTran", kind="kgen", nodes=("a",),
        inputs=("o:BFloat16[-1,-1,64]",), outputs=("t:BFloat16[-1,-1,3,64]",),
    )  # fmt: skip
    # And after that of a token in int8, whose products are our plugin's.
    token = Kernel(
        name="__myl_ReshResh", kind="kgen", nodes=("a",),
        inputs=("o:Half[-1,1,64]",), outputs=("t:Half[-1,1,192]",),
    )  # fmt: skip
    fused = Kernel(name="_gemm_mha_v2", kind="kgen", nodes=("a",))
    plan = ProfilePlan(profile="default", kernels=(fused, after, token))
    assert not check_plans([plan], Facts(attentions=("a",)))
    matrix = Kernel(
        name="gemm", kind="gemm", nodes=("a",),
        inputs=("o:Half[-1,4096,64]",), outputs=("t:Half[-1,4096,4096]",),
    )  # fmt: skip
    (finding,) = check_plans(
        [ProfilePlan(profile="default", kernels=(fused, matrix))], Facts(attentions=("a",))
    )
    assert finding.rule == "attention matrices"


def test_attentions_without_names_of_nodes_are_counted() -> None:
    """As in an engine whose kernels do not say what they compute."""
    plan = ProfilePlan(profile="default", kernels=(Kernel(name="_gemm_mha_v2", kind="kgen"),))
    assert not check_plans([plan], Facts(attentions=("a",)))
    (finding,) = check_plans([plan], Facts(attentions=("a", "b")))
    assert finding.what == "2 attentions became 1 fused kernels"


def test_a_fatal_finding_stops_a_build_for_rtx_alone() -> None:
    found = Finding(rule="plugin", profile="decode", what="no plugin kernel", why="slow", bytes=1)
    fatal = found.model_copy(update={"fatal": True})
    refuse_fatal("llm", TENSORRT_RTX, [found])
    refuse_fatal("llm", TENSORRT, [fatal])
    line = r"engine of llm would be slow: no plugin kernel \(and 1 more\); slow. .*--force"
    with pytest.raises(EngineError, match=line):
        refuse_fatal("llm", TENSORRT_RTX, [found, fatal, fatal])


def test_every_rule_has_a_name_of_its_own_and_a_reason() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert all(rule.why for rule in RULES)


# Rules that the shipped model breaks for its sizes alone: 3 heads of 64 and 512 slots, and groups
# of 2 to 5 channels. At the sizes of the released model they hold, see above.
TINY = {"copies of the KV cache", "fused group norms"}


@rtx
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm80", "sm89", "sm120"])
@pytest.mark.parametrize(
    ("graph_name", "precision"),
    [
        ("llm", "fp16"), ("llm", "bf16"), ("llm", "int8"), ("llm", "int4"),
        ("denoise_shallow", "fp16"), ("image_condition", "fp16"),
    ],
)  # fmt: skip
def test_the_shipped_model_keeps_the_rules(
    graph_name: str,
    precision: str,
    architecture: str,
    exported_once: Callable[[str], Exported],
    tmp_path: Path,
) -> None:
    found, plans = lint(exported_once(SHIPPED), graph_name, precision, architecture, tmp_path)
    assert {one.rule for one in found} <= TINY, [one.what for one in found]
    assert all(len(plan.launched) > 20 for plan in plans)


@rtx
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm80", "sm89", "sm120"])
def test_the_shipped_denoiser_keeps_the_rules(
    architecture: str, exported_once: Callable[[str], Exported], tmp_path: Path
) -> None:
    exported = exported_once(SHIPPED)
    found, _ = lint(exported, "denoise_step", "fp16", architecture, tmp_path)
    assert {one.rule for one in found} <= TINY, [one.what for one in found]


def lint(
    exported: Exported, name: str, precision: str, architecture: str, folder: Path
) -> tuple[tuple[Finding, ...], tuple[ProfilePlan, ...]]:
    """Findings and plans of one graph of a bundle, for two documents at a time."""
    source = bundle_sources(exported.bundle.folder)[name]
    found = plan_lint.lint(source, precision, architecture, 2, folder)
    return found.findings, found.plans
