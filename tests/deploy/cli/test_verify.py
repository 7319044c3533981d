"""`mmi verify --target`: engines are compared where they run, and their receipts are written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from deploy.runtime.tensorrt.gpu_targets import PLUGIN, add_target, machine
from mmi_deploy.bundle.build_report import describe_targets
from mmi_deploy.bundle.bundle import TARGET_MANIFEST, Bundle, write_target
from mmi_deploy.bundle.manifest import sha256_of
from mmi_deploy.cli.app import run
from mmi_deploy.errors import BundleError, EngineError
from mmi_deploy.parity import precision_tolerance
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.tensorrt import backend
from mmi_deploy.spec.backends import CPU
from mmi_deploy.spec.graphs import graphs
from mmi_deploy.system.output_folder import check_replaceable
from mmi_deploy.targets import calibration
from mmi_deploy.targets.cpu import build_cpu_target
from mmi_deploy.targets.precision import recipe, rewrite
from mmi_deploy.targets.sample_inputs import samples_of
from mmi_deploy.targets.verify_target import COMPARED_WITH, compare_target, write_receipts

if TYPE_CHECKING:
    from exports import Exported

Program = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bundle(exported_once: Callable[[str], Exported], tmp_path: Path) -> Bundle:
    """Copy of the bundle that a test may build into."""
    folder = tmp_path / "bundle"
    source = exported_once("paper").bundle.folder
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("engines"))
    return Bundle.open(folder)


@pytest.fixture
def verify(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> Program:
    """`mmi verify` of the bundle: exit code, stdout, stderr."""

    def verify(*options: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(["verify", str(bundle.folder), *map(str, options)])
        return code, *capsys.readouterr()

    return verify


def damaged_target(bundle: Bundle) -> str:
    """An int8 target with a norm that is thirty times too large in one channel."""
    name, graph = "cpu-int8", bundle.graphs["llm"]
    about = {"runtime": CPU, "precision": "int8"}
    with write_target(bundle, name, about) as writer:
        path = writer.engine_file("llm", ".onnx")
        rewrite(recipe("int8"), graph, bundle.graph_file("llm"), path, runtime=CPU)
        model = onnx.load(path)
        norm = next(t for t in model.graph.initializer if t.name.endswith("input_layernorm.weight"))
        values = onnx.numpy_helper.to_array(norm).copy()
        values[0] *= 30
        norm.CopyFrom(onnx.numpy_helper.from_array(values, norm.name))
        onnx.save(model, path)
    return name


def on_fake_gpu(bundle: Bundle, name: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    gpu = machine(replace(bundle, unproved=True), name, **options)
    monkeypatch.setattr(backend, "import_cuda", lambda: gpu.cuda)
    monkeypatch.setattr(backend, "import_tensorrt", lambda runtime: gpu.tensorrt)
    return gpu


def test_an_unproved_cpu_target_gets_the_receipts_of_a_build(
    bundle: Bundle, verify: Program
) -> None:
    """Equal inputs and tolerances; errors equal but for session options of ONNX Runtime."""
    build_cpu_target(bundle, recipe("int8"))
    built = bundle.target("cpu-int8").receipt("llm")
    build_cpu_target(bundle, recipe("int8"), unproved=True)
    with pytest.raises(BundleError, match=r"no receipt.*`mmi verify \S+ --target cpu-int8`"):
        Runtime.open(bundle, target="cpu-int8", kernels="none")
    before = (bundle.target_folder("cpu-int8") / TARGET_MANIFEST).read_bytes()
    code, out, err = verify("--target", "cpu-int8", "--kernels", "none")
    assert code == 0, err
    row = next(line for line in out.splitlines() if line.split()[:1] == ["llm"])
    name, cases, _, relative, tolerance, would, verdict = row.split()
    found = bundle.target("cpu-int8").receipt("llm")
    assert built is not None and found is not None and found.passed
    assert (name, int(cases), verdict) == ("llm", len(found.cases), "pass")
    worst = max(found.cases, key=lambda case: case.error / case.tolerance)
    assert float(relative) == pytest.approx(worst.error, rel=0.1)
    assert float(would) == pytest.approx(worst.error, rel=1e-2)
    assert float(tolerance) == worst.tolerance
    assert "recording inputs" in err and "comparing llm (1 of 2 done" in err
    assert "1 receipt written into" in err and "all within tolerance" in err
    assert found.compared_with == built.compared_with == COMPARED_WITH
    assert [case.sizes for case in found.cases] == [case.sizes for case in built.cases]
    assert [case.tolerance for case in found.cases] == [case.tolerance for case in built.cases]
    for one, other in zip(found.cases, built.cases, strict=True):
        assert one.error == pytest.approx(other.error, rel=0.5)
    # All that was not a receipt is as it was.
    after = json.loads((bundle.target_folder("cpu-int8") / TARGET_MANIFEST).read_bytes())
    assert after.pop("receipts") and {**after, "receipts": []} == json.loads(before)
    assert Runtime.open(bundle, target="cpu-int8", kernels="none").limits == bundle.limits


def test_a_wrong_engine_fails_by_name_and_its_receipt_says_so(
    bundle: Bundle, verify: Program
) -> None:
    name = damaged_target(bundle)
    code, out, err = verify("--target", name, "--kernels", "none", "--json")
    assert code == 2
    assert "mmi: llm in int8 is too far from the portable graph at {" in err
    assert "worst at [" in err and "would pass, 0." in err
    found = json.loads(out)
    (graph,) = found["graphs"]
    assert found["ok"] is False and found["target"] == name
    assert graph["graph"] == "llm" and graph["verdict"] == "FAIL"
    assert graph["relative_rms"] > graph["tolerance"] and graph["max_error"] > 0
    assert graph["tensor"] in ("caches", "hidden", "logits") and graph["index"] and graph["sizes"]
    receipt = bundle.target(name, unproved=True).receipt("llm")
    assert receipt is not None and not receipt.passed
    with pytest.raises(BundleError, match="too large an error"):
        Runtime.open(bundle, target=name, kernels="none")
    code, out, err = verify("--target", name, "--kernels", "none")
    assert code == 2 and "FAIL" in out and "with an error that is too large" in err


@pytest.mark.parametrize("activations", ["float32", "float16"])
def test_engines_on_a_gpu_get_receipts_and_run(
    bundle: Bundle,
    verify: Program,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    activations: str,
) -> None:
    plugin = tmp_path / "plugin.so"
    plugin.write_bytes(PLUGIN)
    monkeypatch.setattr("mmi_plugins.compile.checksum.checksum_error", lambda path: None)
    made_with = {"plugin": f"{plugin.name}:{sha256_of(plugin)[:16]}"}
    name = add_target(bundle, activations, onnx=True, proved=False, recipe=made_with)
    code, _, err = verify()
    assert code == 0 and f"`mmi verify {bundle.folder} --target {name}`, on their" in err
    on_fake_gpu(bundle, name, monkeypatch, library=plugin)
    with pytest.raises(BundleError, match=f"no receipt.*`mmi verify .*--target {name}`"):
        Runtime.open(bundle, target=name, kernels=plugin)
    code, _, err = verify("--target", name, "--kernels", "none")
    assert code == 2 and "needs our TensorRT plugin" in err
    code, out, err = verify("--target", name, "--kernels", plugin, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["ok"] is True
    assert [graph["graph"] for graph in found["graphs"]] == list(bundle.graphs)
    for graph in found["graphs"]:
        assert graph["verdict"] == "pass" and "on the GPU itself" in graph["compared_with"]
    precision = {"float32": "fp32", "float16": "fp16"}[activations]
    allowed = {graph["tolerance"] for graph in found["graphs"]}
    assert allowed <= {
        precision_tolerance(precision, recorded, on_gpu=True).relative for recorded in (True, False)
    }
    # In float32 the fake engines run the portable files themselves.
    greatest = max(graph["relative_rms"] for graph in found["graphs"])
    assert greatest == 0 if activations == "float32" else 1e-5 < greatest
    assert Runtime.open(bundle, target=name, kernels=plugin).backend.plan() is not None
    assert verify()[2] == "" and describe_targets(bundle)[0].receipts["llm"] == "proved"


def test_a_verified_target_is_built_and_exported_again(bundle: Bundle, verify: Program) -> None:
    """The manifest that `mmi verify` rewrites counts as written by mmi."""
    build_cpu_target(bundle, recipe("int8"), unproved=True)
    assert verify("--target", "cpu-int8", "--kernels", "none")[0] == 0
    build_cpu_target(bundle, recipe("int8"), unproved=True)
    assert verify("--target", "cpu-int8", "--kernels", "none")[0] == 0
    check_replaceable(bundle.folder, None, kind="bundle")


def test_a_wrong_engine_on_a_gpu_fails_and_the_others_pass(
    bundle: Bundle, verify: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Pixels that are 2 % too bright."""
    other = tmp_path / "other.onnx"
    model = onnx.load(bundle.graph_file("vae_decoder"))
    (output,) = (o.name for o in model.graph.output)
    for node in model.graph.node:
        node.output[:] = ["dark" if name == output else name for name in node.output]
    factor = onnx.helper.make_tensor("factor", onnx.TensorProto.FLOAT, [], [1.02])
    model.graph.initializer.append(factor)
    model.graph.node.append(onnx.helper.make_node("Mul", ["factor", "dark"], [output]))
    onnx.save(model, other)
    name = add_target(bundle, onnx=True, proved=False, engines={"vae_decoder": {"onnx": other}})
    on_fake_gpu(bundle, name, monkeypatch)
    code, out, err = verify("--target", name, "--json")
    assert code == 2 and "mmi: vae_decoder in fp32 is too far" in err
    verdicts = {graph["graph"]: graph for graph in json.loads(out)["graphs"]}
    assert [n for n, graph in verdicts.items() if graph["verdict"] == "FAIL"] == ["vae_decoder"]
    assert verdicts["vae_decoder"]["relative_rms"] == pytest.approx(0.02, rel=1e-3)
    assert describe_targets(bundle)[0].receipts == {
        graph: "failed" if graph == "vae_decoder" else "proved" for graph in bundle.graphs
    }


def test_engines_of_smaller_limits_are_compared_within_them(bundle: Bundle) -> None:
    small = replace(bundle.limits, batch=1, images=1)
    contract = graphs(bundle.config, small)
    samples = samples_of(bundle, small)
    assert samples.keys() == contract.keys()
    for name, graph in contract.items():
        assert samples[name]
        for sample in samples[name]:
            for tensor in graph.inputs:
                sides = zip(tensor.shape, sample.inputs[tensor.name].shape, strict=True)
                assert all(
                    size <= graph.ranges[side].max
                    for side, size in sides
                    if isinstance(side, str) and side in graph.ranges
                ), (name, tensor.name)


def test_an_engine_may_not_write_into_the_samples(bundle: Bundle) -> None:
    """On the host the KV cache is the array that was given: comparing twice gives the same."""
    build_cpu_target(bundle, recipe("int8"), unproved=True)
    runtime = Runtime.open(
        replace(bundle, unproved=True), target="cpu-int8", threads=1, kernels="none"
    )
    manifest = bundle.target("cpu-int8", unproved=True)
    (first,) = compare_target(bundle, manifest, runtime)
    (again,) = compare_target(bundle, manifest, runtime)
    assert first.cases == again.cases
    caches = [c for _, c in first.comparisons if c.name == "caches"]
    assert all(0 < c.relative < 1 for c in caches)


def test_engines_that_were_built_again_meanwhile_get_no_receipt(bundle: Bundle) -> None:
    build_cpu_target(bundle, recipe("int8"), unproved=True)
    compared = bundle.target("cpu-int8", unproved=True)
    runtime = Runtime.open(replace(bundle, unproved=True), target="cpu-int8", kernels="none")
    proofs = compare_target(bundle, compared, runtime)
    damaged_target(bundle)
    with pytest.raises(BundleError, match="llm of cpu-int8 was built again while it was compared"):
        write_receipts(bundle, compared, proofs)
    assert bundle.target("cpu-int8", unproved=True).receipts == ()


def test_receipts_of_other_graphs_stay(bundle: Bundle) -> None:
    build_cpu_target(bundle, recipe("mixed"))
    manifest = bundle.target("cpu-mixed")
    assert manifest.receipts
    written = write_receipts(bundle, manifest, [])
    assert written == manifest == bundle.target("cpu-mixed")


def test_a_target_that_names_no_known_precision_is_refused(bundle: Bundle) -> None:
    with write_target(bundle, "cpu-fp4", {"runtime": CPU, "precision": "fp4"}) as writer:
        shutil.copy(bundle.graph_file("llm"), writer.engine_file("llm", ".onnx"))
    manifest = bundle.target("cpu-fp4", unproved=True)
    with pytest.raises(BundleError, match="in which precision.*expected fp32 or .*got fp4"):
        compare_target(bundle, manifest, Runtime.open(bundle, kernels="none"))


def test_too_little_memory_is_said_before_anything_runs(
    bundle: Bundle, verify: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_cpu_target(bundle, recipe("int8"), unproved=True)
    monkeypatch.setattr("mmi_deploy.system.memory.free_memory", lambda: 10**4)
    code, out, err = verify("--target", "cpu-int8", "--kernels", "none")
    assert code == 2 and not out and "too little memory" in err and "--force" in err
    assert "--unproved" not in err
    assert verify("--target", "cpu-int8", "--kernels", "none", "--force")[0] == 0
    with pytest.raises(EngineError, match="--unproved"):
        calibration.check_can_run(bundle, 10**4)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--target", "cpu-int8"], "has no target 'cpu-int8'; expected one that `mmi build` made"),
        (["--target", "cpu-int8", "--run"], "--run draws a picture with the portable graphs"),
        (["--device", "1"], "--device goes with --target NAME. leave out --device"),
        (["--resident", "llm"], "--resident goes with --target NAME"),
        (["--kernels", "none"], "--kernels goes with --target NAME"),
        (["--force"], "--force goes with --target NAME"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    verify: Program, options: list[str], line: str
) -> None:
    code, out, err = verify(*options)
    assert code == 2 and not out and line in err and len(err.splitlines()) == 1


def test_numbers_that_are_not_finite_are_null_in_json(bundle: Bundle, verify: Program) -> None:
    """An engine that gives NaN fails with an infinite error, and the output stays JSON."""
    name = "cpu-int8"
    with write_target(bundle, name, {"runtime": CPU, "precision": "int8"}) as writer:
        path = writer.engine_file("llm", ".onnx")
        rewrite(recipe("int8"), bundle.graphs["llm"], bundle.graph_file("llm"), path, runtime=CPU)
        model = onnx.load(path)
        norm = next(t for t in model.graph.initializer if t.name.endswith("input_layernorm.weight"))
        values = np.full_like(onnx.numpy_helper.to_array(norm), np.nan)
        norm.CopyFrom(onnx.numpy_helper.from_array(values, norm.name))
        onnx.save(model, path)
    code, out, err = verify("--target", name, "--kernels", "none", "--json")
    assert code == 2 and "got inf in" in err

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    (graph,) = json.loads(out, parse_constant=refuse)["graphs"]
    assert graph["verdict"] == "FAIL" and graph["relative_rms"] is None
    receipt = bundle.target(name, unproved=True).receipt("llm")
    assert receipt is not None and not receipt.passed
