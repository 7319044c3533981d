"""Calibration data: ranges measured once per bundle, and proofs that can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from exports import Exported
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.errors import BundleError, EngineError
from mmi_deploy.spec.backends import CPU, TENSORRT_RTX
from mmi_deploy.targets.calibration import Calibration, check_can_run, islands_key
from mmi_deploy.targets.precision import Ranges, recipe, rewrite


@pytest.fixture(scope="module")
def bundle(exported_once: Callable[[str], Exported]) -> Bundle:
    return exported_once("paper").bundle


def test_ranges_are_measured_once_and_kept_for_the_bundle(bundle: Bundle, tmp_path: Path) -> None:
    said: list[str] = []
    calibration = Calibration(bundle, tmp_path / "ranges", said.append)
    assert calibration.known_ranges("vae_decoder") is None
    assert calibration.ranges("vae_decoder", recipe("fp32"), TENSORRT_RTX) is None and not said
    found = calibration.ranges("vae_decoder", recipe("fp16"), TENSORRT_RTX)
    assert found is not None and max(found.peaks.values()) > 0 and found.runs >= 1
    assert said == ["recording inputs", "measuring ranges of vae_decoder"]
    again = Calibration(bundle, tmp_path / "ranges", said.append)
    assert again.ranges("vae_decoder", recipe("bf16"), TENSORRT_RTX) == found
    assert len(said) == 2, "nothing was run"


def test_a_rewritten_graph_is_proved_and_a_wrong_one_refused(
    bundle: Bundle, tmp_path: Path
) -> None:
    calibration, chosen = Calibration(bundle, tmp_path / "ranges"), recipe("fp16")
    path = tmp_path / "vae_decoder.onnx"
    source = bundle.graph_file("vae_decoder")
    rewrite(chosen, bundle.graphs["vae_decoder"], source, path, runtime=TENSORRT_RTX)
    proof = calibration.prove("vae_decoder", chosen, TENSORRT_RTX, path)
    assert 0 < proof.error < 5e-3 and "emulated" in proof.compared_with

    model = onnx.load(path)
    bias = next(
        tensor
        for tensor in model.graph.initializer
        if len(tensor.dims) == 1 and numpy_helper.to_array(tensor).any()
    )
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float16(1), bias.name))
    wrong = tmp_path / "wrong" / path.name
    wrong.parent.mkdir()
    onnx.save(model, wrong)
    with pytest.raises(BundleError, match="vae_decoder in fp16 is too far from the portable graph"):
        calibration.prove("vae_decoder", chosen, TENSORRT_RTX, wrong)


def test_the_key_knows_which_tensors_stay_in_float32_and_nothing_else() -> None:
    """So that the last digits of a measurement make no other engine."""
    fp16 = recipe("fp16")
    loud = Ranges({"a": 1e6, "b": 2.0}, {}, 3)
    key = islands_key(loud, fp16)
    assert key == islands_key(replace(loud, peaks={"a": 1.1e6, "b": 2.1}, runs=9), fp16)
    assert key != islands_key(replace(loud, peaks={"a": 1e6, "b": 2e6}), fp16)
    assert "" != key != islands_key(replace(loud, peaks={"c": 1e6}), fp16)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ranges_of_another_type_change_no_key(precision: str) -> None:
    """A build in float32 asks for none, a dry run finds those of an earlier build."""
    loud = Ranges({"a": 1e6, "b": 2.0}, {}, 3)
    assert islands_key(loud, recipe(precision)) == islands_key(None, recipe(precision)) == ""


def test_a_bundle_too_large_to_run_is_refused_with_the_way_around(bundle: Bundle) -> None:
    check_can_run(bundle, 10**12)
    with pytest.raises(EngineError, match="too little memory to run the bundle.*--unproved"):
        check_can_run(bundle, 10**4)


def test_ranges_on_the_cpu_are_those_of_its_own_type(bundle: Bundle, tmp_path: Path) -> None:
    calibration = Calibration(bundle, tmp_path / "ranges")
    assert calibration.ranges("llm", recipe("int8"), CPU) is None
