"""Our Polygraphy runner: an engine with KV caches in place beside ONNX Runtime, in Polygraphy's own
comparison; the GPU is the fake one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from deploy.runtime.tensorrt.gpu_targets import Machine, add_target, machine
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.targets.polygraphy.bundle_files import FOLDER, loaders
from mmi_deploy.targets.polygraphy.load_data import read_inputs

if TYPE_CHECKING:
    from exports import Exported

comparator = pytest.importorskip("polygraphy.comparator")

from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx  # noqa: E402

from mmi_deploy.targets.polygraphy.runner import EngineRunner  # noqa: E402


@pytest.fixture
def bundle(exported_once: Callable[[str], Exported], tmp_path: Path) -> Bundle:
    folder = tmp_path / "bundle"
    shutil.copytree(exported_once("paper").bundle.folder, folder)
    return Bundle.open(folder)


def inputs_of(bundle: Bundle, graph: str) -> list[dict[str, np.ndarray]]:
    """Inputs that the data loaders of the bundle yield for a graph."""
    names = loaders(bundle.graphs[graph])
    return [read_inputs(bundle.folder / FOLDER / f"{name}.npz") for name in names]


def compared(bundle: Bundle, here: Machine, graph: str, tolerance: float) -> tuple[Any, bool]:
    """Results of both runners, and Polygraphy's verdict."""
    session = SessionFromOnnx(str(bundle.graph_file(graph)))
    results = comparator.Comparator.run(
        [OnnxrtRunner(session, name="onnxrt"), EngineRunner.of(here.runtime, graph)],
        data_loader=inputs_of(bundle, graph),
    )
    judge = comparator.CompareFunc.simple(atol=tolerance, rtol=tolerance, check_error_stat="max")
    return results, bool(comparator.Comparator.compare_accuracy(results, compare_func=judge))


def test_caches_in_place_are_outputs_of_the_runner(bundle: Bundle) -> None:
    """Prefill and decode of `llm`, equal to the bit; the caches of the caller are not written."""
    here = machine(bundle, add_target(bundle, onnx=True))
    results, same = compared(bundle, here, "llm", 0.0)
    assert same
    for inputs, outputs in zip(inputs_of(bundle, "llm"), results["mmi-llm"], strict=True):
        assert set(outputs.keys()) == {tensor.name for tensor in bundle.graphs["llm"].outputs}
        slot = int(inputs["write_index"][0])
        before, after = inputs["past_key.00"], outputs["present_key.00"]
        assert np.array_equal(before[:, :, :slot], after[:, :, :slot])
        assert not before[:, :, slot].any() and after[:, :, slot].any()


def test_inputs_of_the_portable_graph_serve_an_engine_in_float16(bundle: Bundle) -> None:
    here = machine(bundle, add_target(bundle, "float16", onnx=True))
    results, close = compared(bundle, here, "image_condition", 0.02)
    assert close
    outputs = results["mmi-image_condition"][0]
    assert all(array.dtype == np.float32 for array in outputs.values())
    assert not compared(bundle, here, "image_condition", 1e-7)[1]


def test_inputs_that_lack_a_tensor_are_refused_by_polygraphy(bundle: Bundle) -> None:
    here = machine(bundle, add_target(bundle, onnx=True))
    (inputs,) = inputs_of(bundle, "vae_decoder")
    with EngineRunner.of(here.runtime, "vae_decoder") as runner:
        with pytest.raises(Exception, match="latents"):
            runner.infer({})
        wrong = {"latents": inputs["latents"].astype(np.float64)}
        with pytest.raises(Exception, match="latents"):
            runner.infer(wrong)
        assert runner.infer(inputs)["pixels"].any()
