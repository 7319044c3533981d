"""CPU targets of an exported bundle: sample inputs, proofs, the target's folder, the runtime on it;
sensitivity of the same graphs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from mmi_deploy.analysis.sensitivity import sensitivity
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.documents.document import Draw, Text, document_of
from mmi_deploy.errors import BundleError, ConfigError, MmiError
from mmi_deploy.runtime.generation import generate
from mmi_deploy.runtime.onnxruntime.run_graph import runner
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.backends import CPU
from mmi_deploy.targets.cpu import build_cpu_target
from mmi_deploy.targets.precision import recipe, rewrite
from mmi_deploy.targets.precision.quantise import quantise, scheme_for_rows
from mmi_deploy.targets.precision.recipes import INT4, Scheme
from mmi_deploy.targets.sample_inputs import Sample, random_inputs, samples_of
from mmi_deploy.targets.verify_target import check_proof, prove

if TYPE_CHECKING:
    from exports import Exported


@pytest.fixture(scope="module")
def bundle(
    exported_once: Callable[[str], Exported], tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """Copy of the bundle that this module builds into."""
    folder = tmp_path_factory.mktemp("cpu") / "bundle"
    shutil.copytree(exported_once("paper").bundle.folder, folder)
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def samples(bundle: Bundle) -> dict[str, list[Sample]]:
    return samples_of(bundle)


def test_samples_are_recorded_for_every_graph_and_random_at_the_sizes_that_matter(
    bundle: Bundle, samples: dict[str, list[Sample]]
) -> None:
    """Batch 1 and 2; no, one and several images; prefill and decode."""
    for name, graph in bundle.graphs.items():
        assert any(sample.recorded for sample in samples[name]), name
        assert any(not sample.recorded for sample in samples[name]), name
        for sample in samples[name]:
            assert set(sample.inputs) == {tensor.name for tensor in graph.inputs}
    drawn = [sample.inputs for sample in samples["llm"] if not sample.recorded]
    assert {inputs["token_ids"].shape[0] for inputs in drawn} == {1, 2}
    assert {inputs["token_ids"].shape[1] for inputs in drawn} == {1, 17}
    visible = {int(inputs["image_position"].any(axis=(0, 1)).sum()) for inputs in drawn}
    assert 0 in visible and max(visible) > 1
    for inputs in drawn:  # what is written ends before the cache does
        assert inputs["write_index"].max() + inputs["token_ids"].shape[1] <= bundle.limits.context


def test_random_inputs_are_drawn_from_recorded_values(
    bundle: Bundle, samples: dict[str, list[Sample]]
) -> None:
    graph = bundle.graphs["llm_values"]
    recorded = [sample.inputs for sample in samples["llm_values"] if sample.recorded]
    known = {row.tobytes() for inputs in recorded for row in inputs["features"]}
    for inputs in random_inputs(graph, recorded, np.random.default_rng(5)):
        assert {row.tobytes() for row in inputs["features"]} <= known


@pytest.mark.parametrize("name", ["int8", "int4", "mixed"])
def test_a_cpu_target_is_proved_and_runs(bundle: Bundle, name: str) -> None:
    stages: list[str] = []
    report = build_cpu_target(bundle, recipe(name), lambda what, done, of: stages.append(what))
    manifest = bundle.target(f"cpu-{name}")
    receipt = manifest.receipt("llm")
    assert receipt is not None and receipt.passed and "recorded and random" in receipt.compared_with
    assert max(case.error for case in receipt.cases) > 0
    assert manifest.activations == "float32" and list(manifest.graphs) == ["llm"]
    portable = bundle.graph_file("llm").with_suffix(".safetensors").stat().st_size
    assert report.graphs[0].weights_bytes < portable / 2
    written = sum(entry.size for entry in manifest.graph_files("llm").values())
    assert report.engine_bytes == written > report.graphs[0].weights_bytes
    assert stages == ["recording inputs", f"writing llm in {name}", f"proving llm in {name}"]
    runtime = Runtime.open(bundle, target=f"cpu-{name}", threads=1, kernels="none")
    options = GenerationOptions(max_tokens=4, max_images=0)
    assert list(generate(runtime, document_of(Text("a red square"), Draw()), options))


def test_a_damaged_weight_gets_no_receipt(
    bundle: Bundle, samples: dict[str, list[Sample]], tmp_path: Path
) -> None:
    graph, portable = bundle.graphs["llm"], bundle.graph_file("llm")
    out = tmp_path / "llm.onnx"
    rewrite(recipe("int8"), graph, portable, out, runtime=CPU)
    model = onnx.load(out)
    norm = next(t for t in model.graph.initializer if t.name.endswith("input_layernorm.weight"))
    values = onnx.numpy_helper.to_array(norm).copy()
    values[0] *= 30
    norm.CopyFrom(onnx.numpy_helper.from_array(values, norm.name))
    onnx.save(model, out)
    proof = prove(recipe("int8"), graph, portable, out, CPU, samples["llm"])
    with pytest.raises(BundleError, match="llm in int8 is too far from the portable graph at"):
        check_proof(proof, "int8")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fp32", "fp32 changes no graph on the CPU.*--precision int8 or int4"),
        ("bf16", "bf16 is not for the CPU"),
        ("fp8", "fp8 is not for the CPU"),
    ],
)
def test_recipes_that_are_none_for_the_cpu_leave_nothing(
    bundle: Bundle, name: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_cpu_target(bundle, recipe(name))
    assert not bundle.target_folder(f"cpu-{name}").exists()


def test_weights_that_are_not_finite_leave_nothing(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.folder, folder, ignore=shutil.ignore_patterns("engines"))
    graph = onnx.load(folder / "graphs" / "llm.onnx", load_external_data=False).graph
    weight = next(tensor for tensor in graph.initializer if "down_proj" in tensor.name)
    place = {entry.key: entry.value for entry in weight.external_data}
    with (folder / "graphs" / place["location"]).open("r+b") as file:
        file.seek(int(place["offset"]))
        file.write(np.float32(np.nan).tobytes())
    broken = Bundle(folder, bundle.manifest, unproved=True)
    with pytest.raises(MmiError, match="not finite"):
        build_cpu_target(broken, recipe("int8"))
    assert not broken.targets


def test_sensitivity_is_the_error_of_one_quantised_weight(
    bundle: Bundle, samples: dict[str, list[Sample]], tmp_path: Path
) -> None:
    """Sensitivity of the first layer by hand: its weight is replaced in a copy of the file."""
    layers = sensitivity(bundle, "llm", "int4")
    assert [layer.error for layer in layers] == sorted(
        (layer.error for layer in layers), reverse=True
    )
    model = onnx.load(bundle.graph_file("llm"))
    tensor = next(t for t in model.graph.initializer if t.name == layers[0].name)
    weight = onnx.numpy_helper.to_array(tensor)
    scheme = scheme_for_rows(Scheme(INT4, 32), weight.shape[0])
    changed = quantise(weight, scheme).dequantised()
    tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
    onnx.save(model, tmp_path / "llm.onnx")
    runs = [sample.inputs for sample in samples["llm"] if sample.recorded][-3:]
    plain, other = runner(bundle.graph_file("llm")), runner(tmp_path / "llm.onnx")
    errors = [
        np.sqrt(np.mean((other(x)["logits"] - plain(x)["logits"]) ** 2))
        / np.sqrt(np.mean(plain(x)["logits"] ** 2))
        for x in runs
    ]
    assert layers[0].error == pytest.approx(max(errors), rel=0.02)


def test_sensitivity_refuses_what_it_cannot_measure(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="no graph 'unet'; expected vision_encoder or"):
        sensitivity(bundle, "unet")
    with pytest.raises(ConfigError, match="fp16 quantises no weights"):
        sensitivity(bundle, "llm", "fp16")
    with pytest.raises(ConfigError, match="vae_decoder has no matrix product"):
        sensitivity(bundle, "vae_decoder")
