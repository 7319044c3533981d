"""ONNX Runtime's kernel library: every instruction set, type and size against float64."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmi_deploy.errors import EngineError
from mmi_plugins.conformance.calls import SITUATIONS, draw, draws
from mmi_plugins.conformance.check import check
from mmi_plugins.conformance.onnxruntime_kernel import (
    OnnxRuntimeKernel,
    one_node_model,
    run_session,
)
from mmi_plugins.onnxruntime import library as onnxruntime_library
from mmi_plugins.operator import INPUT_SHAPES, NARROW_INPUTS, TOLERANCES, Call
from mmi_plugins.reference import mmfs_reference, output_of

ort = pytest.importorskip("onnxruntime")
needs_compiler = pytest.mark.skipif(
    onnxruntime_library.compiler() is None, reason="there is no C++ compiler"
)
pytestmark = needs_compiler
VARIANTS = ("base", "avx2", "avx512")


@pytest.fixture(scope="module")
def library() -> Path:
    return onnxruntime_library.find() or onnxruntime_library.build()


def session(library: Path, call: Call, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(one_node_model(call), options, providers=["CPUExecutionProvider"])


def worst(library: Path) -> dict[str, float]:
    """Error over tolerance of every kind of case: above 1 is wrong."""
    found = {}
    kernel = OnnxRuntimeKernel(library, threads=2)
    cases = list(draws(0, 5 * len(SITUATIONS)))
    for d in (8, 16, 24, 40, 64, 80, 120, 128):  # many queries: images are copied
        for dtype in ("float32", "float16", "bfloat16"):
            rng = np.random.default_rng(d)
            call = draw(rng, q=300, h=2, d=d, p=4, b=1, m=2, n=3, r=4, dtype=dtype)
            cases.append((f"many queries, {d} channels, {dtype}", call))
    for q in (1, 2, 31, 33, 65):  # around a block; maps of one row, one column, one cell
        sizes = {"q": q, "h": 2, "d": 24, "p": (q - 1) % 16 + 1, "m": 3, "n": 3, "r": 4}
        levels = [(5, 1), (1, 7), (1, 1), (2, 3)]
        call = draw(np.random.default_rng(q), levels=levels, dtype="float32", **sizes)
        cases.append((f"narrow maps, {q} queries", call))
    for name, call in cases:
        verdict = check(name, call, output_of(call, mmfs_reference(call)), kernel)
        found[name] = 9.0 if verdict.reason else verdict.relative / TOLERANCES[call.dtype].relative
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_instruction_set_is_right(library: Path, variant: str) -> None:
    """In a process of its own: the choice is made once."""
    code = (
        "import json, sys; from pathlib import Path\n"
        "from plugins.onnxruntime.test_library import worst\n"
        "print(json.dumps(worst(Path(sys.argv[1]))))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(library)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MMI_CPU": variant, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    wrong = {name: value for name, value in found.items() if not value <= 1}
    assert len(found) == 69 and not wrong


def test_threads_do_not_change_a_bit(library: Path) -> None:
    call = draw(np.random.default_rng(3), q=700, h=3, d=64, b=2, m=5, dtype="float32")
    one, two = (run_session(session(library, call, threads), call) for threads in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_a_kernel_wins_over_the_function_of_the_file(library: Path) -> None:
    """One file, whose function gives zeros: with the library the output is not zero."""
    import onnx.helper as oh

    call = draw(np.random.default_rng(0), "ordinary", dtype="float32", null_slot=True)
    zeros = oh.make_function(
        "mmi",
        "MultiImageDeformableAttention",
        list(INPUT_SHAPES),
        ["output"],
        [
            oh.make_node("Shape", ["offsets"], ["bq"], start=0, end=2),
            oh.make_node("Constant", [], ["minus"], value_ints=[-1]),
            oh.make_node("Shape", ["null_value"], ["hd"]),
            oh.make_node("ReduceProd", ["hd", "zero"], ["width"]),
            oh.make_node("Constant", [], ["zero"], value_ints=[0]),
            oh.make_node("Concat", ["bq", "width"], ["sides"], axis=0),
            oh.make_node("ConstantOfShape", ["sides"], ["output"]),
        ],
        [oh.make_opsetid("", 24)],
        ["level_heights", "level_widths", "base_grid", "null_slot"],
    )
    nodes = {node.output[0]: node for node in zeros.node}
    order = ("bq", "hd", "zero", "width", "sides", "output")
    del zeros.node[:]
    zeros.node.extend(nodes[name] for name in order)
    model = one_node_model(call, zeros)
    with_library, without = ort.SessionOptions(), ort.SessionOptions()
    with_library.register_custom_ops_library(str(library))
    outputs = [
        run_session(ort.InferenceSession(model, options), call)
        for options in (with_library, without)
    ]
    expected = output_of(call, mmfs_reference(call))
    np.testing.assert_allclose(outputs[0], expected, atol=1e-5)
    assert np.abs(expected).max() > 0.1 and not outputs[1].any()


def refused(library: Path, call: Call, change: Callable[[dict[str, np.ndarray]], None]) -> str:
    """The kernel's error for inputs of other shapes than the file declares; never a crash."""
    import onnx

    model = onnx.load_from_string(one_node_model(call))
    for value in model.graph.input:  # any shape may come
        for index, side in enumerate(value.type.tensor_type.shape.dim):
            side.dim_param = f"{value.name}{index}"
    for side in model.graph.output[0].type.tensor_type.shape.dim:
        side.dim_param = "any"
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    inputs = dict(call.inputs)
    change(inputs)
    with pytest.raises(Exception, match="MultiImageDeformableAttention") as caught:
        ort.InferenceSession(model.SerializeToString(), options).run(None, inputs)
    return str(caught.value)


def test_contradicting_shapes_are_refused(library: Path) -> None:
    call = draw(
        np.random.default_rng(0), dtype="float32", b=2, q=3, h=2, d=16, p=4, levels=[(4, 4)], m=2
    )

    def cut(name: str, axis: int) -> Callable[[dict[str, np.ndarray]], None]:
        def change(inputs: dict[str, np.ndarray]) -> None:
            inputs[name] = np.ascontiguousarray(np.take(inputs[name], [0], axis))

        return change

    assert "differ in h" in refused(library, call, cut("offsets", 2))
    assert "differ in b" in refused(library, call, cut("image_slot", 0))
    assert "differ in s" in refused(library, call, cut("value", 1))
    assert "differ in p" in refused(library, call, cut("logit_table", 3))

    def narrow(inputs: dict[str, np.ndarray]) -> None:
        for name in ("value", "null_value"):
            inputs[name] = np.ascontiguousarray(inputs[name][..., :12])

    assert "multiple of 8" in refused(library, call, narrow)


def test_what_is_not_a_number_is_never_hidden(library: Path) -> None:
    """In a logit it comes out; in a location it lies outside, and is no address."""
    call = draw(np.random.default_rng(0), dtype="float32", q=3, d=64, p=4, null_slot=True, r=4)
    call.inputs["image_position"][:] = 1
    clean = run_session(session(library, call), call)
    call.inputs["logits"][0, 0] = np.nan
    spoilt = run_session(session(library, call), call)
    assert np.isnan(spoilt[0, 0]).all() and np.array_equal(spoilt[0, 1:], clean[0, 1:])
    call.inputs["logits"][0, 0] = 0
    call.inputs["offsets"][:] = np.nan
    call.inputs["offset_table"][:] = np.inf
    assert np.isfinite(run_session(session(library, call), call)).all()


def test_a_library_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMI_CACHE", str(tmp_path / "cache"))
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'error: out of order' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert onnxruntime_library.find() is None
    with pytest.raises(EngineError, match="out of order"):
        onnxruntime_library.build()
    assert onnxruntime_library.ensure() is None
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    with pytest.raises(EngineError, match="no C\\+\\+ compiler"):
        onnxruntime_library.build()


def fake_compiler(folder: Path) -> Path:
    """Makes every output that it is asked for, after a while; each run is a line in `runs`."""
    program = folder / "c++"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/runs\n'
        'while [ "$1" != -o ]; do shift; done\nsleep 0.05\necho compiled > "$2"\n'
    )
    program.chmod(0o755)
    return program


def test_a_damaged_library_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MMI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path)))
    made = onnxruntime_library.ensure()
    assert made is not None and made == onnxruntime_library.find()
    runs = (tmp_path / "runs").read_text()
    assert onnxruntime_library.ensure() == made and (tmp_path / "runs").read_text() == runs
    whole = made.read_bytes()
    made.write_bytes(whole.replace(b"compiled", b"compilex"))
    assert onnxruntime_library.find() is None
    assert onnxruntime_library.ensure() == made and made.read_bytes() == whole
    assert "is damaged: its content is not what was compiled" in caplog.text


def test_two_that_compile_at_once_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path)))
    program = "from mmi_plugins.onnxruntime.library import ensure; print(ensure())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = {process.communicate()[0].strip() for process in both}
    made = onnxruntime_library.find()
    assert made is not None and said == {str(made)}
    assert list(made.parent.iterdir()) == [made]


def test_an_onnx_runtime_that_is_too_old_is_refused(library: Path) -> None:
    """It has no table of functions of the version that the library asks for."""
    said: list[str] = []
    fail = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(
        lambda code, text: said.append(text.decode()) or 1
    )
    table = (ctypes.c_void_p * 1)(ctypes.cast(fail, ctypes.c_void_p).value)
    tables = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
        lambda version: ctypes.addressof(table) if version == 1 else None
    )
    base = (ctypes.c_void_p * 2)(ctypes.cast(tables, ctypes.c_void_p).value, None)
    register = ctypes.CDLL(str(library)).RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
    assert register(None, ctypes.addressof(base)) == 1
    assert said == ["mmi: this library needs ONNX Runtime 1.18 or newer"]


@pytest.mark.parametrize("queries", [3, 300])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_inputs_need_no_alignment_on_a_cpu(library: Path, dtype: str, queries: int) -> None:
    """Every input begins at an odd address: the results are those of aligned ones."""
    fixed = {"b": 1, "q": queries, "h": 2, "d": 64, "p": 4, "m": 2, "n": 3, "r": 4}
    call = draw(np.random.default_rng(0), dtype=dtype, **fixed)
    runs = session(library, call)
    binding, kept = runs.io_binding(), []
    for name in INPUT_SHAPES:
        array = call[name].astype(dtype if name in NARROW_INPUTS else call[name].dtype)
        room = np.empty(array.nbytes + 2, np.uint8)
        start = 1 - room.ctypes.data % 2
        room[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        address = room.ctypes.data + start
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, address)
        kept.append(room)
    binding.bind_output("output")
    runs.run_with_iobinding(binding)
    assert np.array_equal(binding.get_outputs()[0].numpy(), run_session(runs, call))


def test_code_for_gpus_is_machine_code_for_each_and_ptx_for_all_others(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'compute_90\\ncompute_100\\ncompute_120\\n'\n")
    nvcc.chmod(0o755)
    codes = onnxruntime_library._Cuda(nvcc, ("90", "100", "120")).codes
    made = ["sm_90", "sm_100", "sm_120", "compute_100"]
    assert [code.rpartition("=")[2] for code in codes] == made


@pytest.mark.slow
def test_with_kernels_for_gpus_it_compiles_and_serves_the_cpu_too(tmp_path: Path) -> None:
    """Nothing here can run them; that ONNX Runtime opens the library and registers all is shown."""
    try:
        library = onnxruntime_library.build(tmp_path, cuda=True, architectures=("90",))
    except EngineError as error:
        pytest.skip(str(error))
    call = draw(np.random.default_rng(0), q=3, d=64, dtype="float16", null_slot=True)
    expected = output_of(call, mmfs_reference(call))
    np.testing.assert_allclose(run_session(session(library, call), call), expected, atol=5e-3)


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    from mmi_deploy.runtime.onnxruntime.engine import OnnxOptions, session_options

    path = tmp_path / "libwrong.so"
    path.write_bytes(b"no library")
    with pytest.raises(EngineError, match="cannot load the kernel library"):
        session_options(OnnxOptions(library=path))


def test_a_file_of_somebody_else_is_not_replaced_by_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path)))
    mine = tmp_path / "out" / onnxruntime_library.NAME
    made = onnxruntime_library.build(tmp_path / "out")
    assert made == mine == onnxruntime_library.build(tmp_path / "out")  # it is ours
    mine.write_text("my own")
    with pytest.raises(EngineError, match="is there already, and mmi did not write it"):
        onnxruntime_library.build(tmp_path / "out")
    assert mine.read_text() == "my own"
    assert [path.name for path in mine.parent.iterdir()] == [mine.name]
