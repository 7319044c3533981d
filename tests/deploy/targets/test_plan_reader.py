"""Kernel plans read from logs and from the engine inspector's JSON, and what they add up to."""

from __future__ import annotations

import json

import pytest

from mmi_deploy.bundle.kernel_plan import Kernel, PlanTensor, ProfilePlan
from mmi_deploy.targets.plan_reader import read_inspector, read_log

ROW = "Format: (Linear) Row major linear format"


def tensor(name: str, shape: str, kind: str) -> str:
    """As TensorRT-RTX 1.7.1 writes one."""
    strides = f"Strides: [{shape}], StrideOrder: [1,0]"
    return f"{{ Name: {name}, Dimensions: [{shape}], {strides}, Datatype: {kind}, {ROW} }}"


GEMM = (
    f"Name: node_linear [profile 1]_myl1_2, LayerType: gemm, "
    f"Inputs: [ {tensor('x [profile 1].1_myl1', '-1,192', 'Half')}], "
    f"Constants: [ {tensor('__mye83758_dconst_myl1', '192,576', 'Int4')}, "
    f"{tensor('alpha_myl1', '1', 'Float')}], "
    f"Outputs: [ {tensor('hidden [profile 1]', '-1,576', 'Half')}], "
    "TacticName: __myelin_CASK_STUB, StreamId: 0, "
    "Metadata: [ONNX Layer: dequantise][ONNX Layer: node_linear]"
)
SHAPES = (
    "Name: __mye22931_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], "
    "TacticName: , StreamId: 0, Metadata: "
)
# Another kernel of the second profile whose own name does not say so.
SCATTER = (
    f"Name: __myl_Scat_myl1_3, LayerType: kgen, "
    f"Inputs: [ {tensor('present_key.00 [profile 1]', '-1,3', 'Half')}, "
    f"{tensor('(Unnamed Layer* 3) [Shuffle]_output', '1,3', 'Half')}], Constants: [], "
    f"Outputs: [ {tensor('present_key.00 [profile 1]', '-1,3', 'Half')}], "
    "TacticName: __myl_Scat_0x1, StreamId: 0, Metadata: "
)


def test_a_log_becomes_kernels_by_profile() -> None:
    log = ["something else", f"Layers:\n{SHAPES}\n{GEMM}\n{SCATTER}\n\nBindings:"]
    prefill, decode = read_log(log, ["prefill", "decode"])
    assert (prefill.profile, decode.profile) == ("prefill", "decode")
    assert [kernel.kind for kernel in prefill.kernels] == ["shape_call"] and not prefill.launched
    gemm, scatter = decode.kernels
    assert gemm == Kernel(
        name="node_linear",
        kind="gemm",
        nodes=("dequantise", "node_linear"),
        inputs=("x.1:Half[-1,192]",),
        constants=("__mye83758_dconst:Int4[192,576]", "alpha:Float[1]"),
        outputs=("hidden:Half[-1,576]",),
    )
    assert scatter.inputs[1] == "(Unnamed Layer* 3) [Shuffle]_output:Half[1,3]"
    assert read_log(["nothing of that kind"], ["default"]) == ()


def test_bytes_are_those_of_one_row_and_an_update_in_place_is_free() -> None:
    (plan,) = read_log([f"{GEMM}\n{SCATTER}"], ["prefill", "decode"])
    gemm, scatter = plan.kernels
    assert gemm.weight_bytes == 192 * 576 // 2 + 4
    assert (gemm.read_bytes, gemm.written_bytes) == (2 * 192, 2 * 576)
    assert (scatter.read_bytes, scatter.written_bytes) == (2 * 3, 0)
    assert plan.total("bytes") == gemm.bytes + scatter.bytes
    assert plan.largest(1) == [gemm]


def test_older_logs_list_constants_among_the_inputs() -> None:
    line = (
        "Name: __myl_MulSum_myl0_0, LayerType: kgen, Inputs: [ { Name: __mye116_dconst, "
        "Dimensions: [10,10], Format/Datatype: Float }, { Name: x, Location: Device, "
        "Dimensions: [10,1], Format/Datatype: Row major linear FP16 format }], Outputs: [ "
        "{ Name: y, Dimensions: [1,10], Format/Datatype: Float }], TacticName: t, StreamId: 0, "
        "Metadata: "
    )
    (plan,) = read_log([line], ["default"])
    (kernel,) = plan.kernels
    assert kernel.constants == ("__mye116_dconst:Float[10,10]",)
    assert kernel.inputs == ("x:Half[10,1]",) and kernel.outputs == ("y:Float[1,10]",)


def test_the_inspectors_json_gives_the_same_kernels() -> None:
    def one(name: str, shape: list[int], kind: str, key: str = "Datatype") -> dict[str, object]:
        return {"Name": name, "Location": "Device", "Dimensions": shape, key: kind}

    layers = [
        {
            "Name": "node_linear [profile 1]_myl1_2",
            "LayerType": "gemm",
            "Inputs": [
                one("x [profile 1].1_myl1", [-1, 192], "Half"),
                one("__mye83758_dconst_myl1", [192, 576], "Int4", "Format/Datatype"),
            ],
            "Constants": [one("alpha_myl1", [1], "Float")],
            "Outputs": [one("hidden [profile 1]", [-1, 576], "Half")],
            "Metadata": "[ONNX Layer: dequantise]\u001e[ONNX Layer: node_linear]",
        },
    ]
    (found,) = read_inspector(json.dumps({"Layers": layers, "Bindings": []}), ["prefill", "decode"])
    (logged,) = read_log([GEMM], ["prefill", "decode"])
    assert found.profile == logged.profile == "decode"
    (one_kernel,), (other,) = found.kernels, logged.kernels
    assert set(one_kernel.constants) == set(other.constants)
    assert one_kernel.model_copy(update={"constants": other.constants}) == other
    brief = json.dumps({"Layers": ["only a name"], "Bindings": []})
    assert read_inspector(brief, ["default"]) == ()


def test_tensors_are_read_as_they_are_written() -> None:
    for text in ("hidden:Half[-1,192]", "a:b:Float[]", "(Unnamed Layer* 1) [X]_output:Int8[4]"):
        assert str(PlanTensor.parse(text)) == text
    assert PlanTensor("w", "Int4", (3, 3)).bytes == 5, "nine nibbles"
    with pytest.raises(ValueError, match="not a tensor"):
        PlanTensor.parse("hidden")


def test_a_plan_survives_being_stored() -> None:
    (plan,) = read_log([GEMM], ["prefill", "decode"])
    assert ProfilePlan.model_validate_json(plan.model_dump_json()) == plan
