"""`mmi::WeightOnlyMatMul` in ONNX Runtime's kernel library, on the CPU, against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmi_plugins.gemv.calls import draw
from mmi_plugins.gemv.launch_plan import GEMV_VARIANTS, GemvVariant, device_arrays
from mmi_plugins.gemv.operator import DOMAIN, NAME, TOLERANCES, GemvCall, attributes, numpy_type
from mmi_plugins.gemv.reference import gemv_reference
from mmi_plugins.onnxruntime import library as onnxruntime_library

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.skipif(
    onnxruntime_library.compiler() is None, reason="there is no C++ compiler"
)


@pytest.fixture(scope="module")
def library() -> Path:
    return onnxruntime_library.find() or onnxruntime_library.build()


def element(call: GemvCall, name: str) -> int:
    return 6 if name == "weight" else {"float16": 10, "bfloat16": 16}[call.dtype]


def run(
    library: Path, call: GemvCall, *, lead: tuple[int, ...] | None = None, **changed: Any
) -> np.ndarray:
    """Output of a session of one node; `lead`: the leading axes of its input; `changed`: other
    arrays, and other attributes."""
    arrays = device_arrays(call)
    if lead is not None:
        arrays["input"] = arrays["input"].reshape(*lead, -1)
    arrays |= {name: array for name, array in changed.items() if name in arrays}
    fields = attributes(call.format, call.out, call.block)
    fields |= {name: value for name, value in changed.items() if name in fields}
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node(NAME, list(arrays), ["output"], domain=DOMAIN, **fields)
    inputs = [value(name, element(call, name), [None] * a.ndim) for name, a in arrays.items()]
    outputs = [value("output", element(call, "output"), None)]
    imports = [onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid(DOMAIN, 1)]
    graph = onnx.helper.make_graph([node], "one_node", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    for name, array in arrays.items():
        given = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, element(call, name))
        binding.bind_ortvalue_input(name, given)
    room = np.zeros((*arrays["input"].shape[:-1], fields["out"]), np.uint16)
    made = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(room, element(call, "output"))
    binding.bind_ortvalue_output("output", made)
    session.run_with_iobinding(binding)
    return room.view(numpy_type(call.dtype)).astype(np.float64)


def error(call: GemvCall, found: np.ndarray) -> float:
    expected = gemv_reference(call)
    return float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))


@pytest.mark.parametrize("variant", GEMV_VARIANTS, ids=lambda variant: variant.name)
def test_every_format_agrees_with_float64(library: Path, variant: GemvVariant) -> None:
    rng = np.random.default_rng(GEMV_VARIANTS.index(variant))
    unit = variant.block or 32
    for rows, inputs, outputs in ((1, 1280, 40), (8, 5 * unit, 17), (3, unit, 1), (21, unit, 3)):
        call = draw(
            rng,
            variant.format,
            variant.dtype,
            rows=rows,
            inputs=inputs,
            outputs=outputs,
            block=variant.block,
        )
        assert error(call, run(library, call)) <= TOLERANCES[variant.dtype], inputs


def test_leading_axes_are_rows(library: Path) -> None:
    call = draw(np.random.default_rng(0), "int8", rows=6, inputs=64, outputs=20)
    for lead in ((2, 3), (6, 1), (1, 6), (3, 1, 2)):
        found = run(library, call, lead=lead)
        assert found.shape == (*lead, 20)
        np.testing.assert_array_equal(found.reshape(6, 20), run(library, call))


def test_every_float8_is_exact(library: Path) -> None:
    """One input channel is 1: outputs are the numbers themselves."""
    call = draw(np.random.default_rng(0), "float8_e4m3fn", inputs=32, outputs=256)
    every = np.arange(256, dtype=np.uint8)
    every[every & 0x7F == 0x7F] = 0
    call.numbers[5] = every.view(call.numbers.dtype)
    call.scales[:], call.input[:] = 1, 0
    call.input[0, 5] = 1
    np.testing.assert_array_equal(run(library, call)[0], call.numbers[5].astype(np.float64))


def test_the_widest_and_the_smallest_outputs_round_as_numpy_does(library: Path) -> None:
    for dtype in TOLERANCES:
        call = draw(np.random.default_rng(0), "int8", dtype, inputs=32, outputs=64)
        call.numbers[:], call.input[:] = 0, 0
        call.numbers[0], call.input[0, 0] = np.arange(1, 65), 1
        for scale in (2.0**-24, 2.0**-20, 900.0, 3000.0):
            call.scales[:] = scale
            with np.errstate(over="ignore"):
                expected = gemv_reference(call).astype(np.float32).astype(numpy_type(dtype))
            np.testing.assert_array_equal(run(library, call), expected.astype(np.float64))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"input": np.zeros((0, 64), np.uint16)}, "there are no rows"),
        ({"input": np.zeros((1, 48), np.uint16)}, "input channels are not a multiple of 32"),
        ({"input": np.zeros((1, 160), np.uint16)}, "axis 1 of weight; expected 2, got 1"),
        ({"out": 33}, "axis 0 of weight; expected 3, got 2"),
        ({"out": 31}, "axis 0 of scales; expected 31, got 32"),
        ({"format": 2, "block": 32}, "axis 2 of weight; expected 256, got 512"),
        ({"format": 2}, "a block of int4 is not 32, 64 or 128"),
        ({"format": 5}, "the weight is neither int8, float8 nor int4"),
        ({"block": 32}, "int8 and float8 have no blocks"),
        ({"scales": np.zeros((1, 32), np.uint16)}, "wrong rank of scales; expected 1, got 2"),
        ({"out": 0}, "there are no output channels"),
    ],
)
def test_contradicting_calls_are_refused(
    library: Path, changed: dict[str, Any], reason: str
) -> None:
    call = draw(np.random.default_rng(0), "int8", inputs=64, outputs=32)
    with pytest.raises(Exception, match=f"WeightOnlyMatMul: {reason}"):
        run(library, call, **changed)
