"""Every call of CUDA's and TensorRT's Python modules that the runtime makes exists there, and takes
the arguments that it is given.

The calls are those that a document on the fake GPU really makes. CUDA's are made for real, which
needs no driver: they answer with an error code, but for arguments of a wrong type they raise.
TensorRT's are compared with the signatures in its documentation.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.runtime.fake_model import LIMITS, fake_config
from deploy.runtime.tensorrt import fake_cuda, fake_tensorrt
from deploy.runtime.tensorrt.fake_tensorrt import Use
from deploy.runtime.tensorrt.gpu_targets import PLUGIN, add_target, fake_bundle, machine
from deploy.runtime.tensorrt.test_backend import told
from mmi_deploy.bundle.manifest import sha256_of
from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.device_memory import STAGING, import_cuda
from mmi_deploy.runtime.tensorrt.module import INSTALL, TensorRt, import_tensorrt

# Modules whose classes are inspected: the lean runtime has those of TensorRT itself, and installs
# without its builder.
MODULES = {"tensorrt": "tensorrt_lean_bindings", "tensorrt-rtx": "tensorrt_rtx"}

ENUMS = ("ExecutionContextAllocationStrategy", "TensorLocation", "DataType")
RTX_ENUMS = ("DynamicShapesKernelSpecializationStrategy",)


def real_module(runtime: str) -> Any:
    name = MODULES[runtime]
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: {INSTALL[name]}")
    return import_tensorrt(name)


@pytest.fixture(scope="module", params=list(MODULES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A document with everything in it: plugin, shapes on the host, engines in turn, a reload."""
    folder = tmp_path_factory.mktemp("target")
    library = folder / "plugin.so"
    library.write_bytes(PLUGIN)
    bundle = fake_bundle(folder / "bundle", fake_config(), LIMITS)
    name = add_target(
        bundle,
        "float16",
        rtx=request.param == "tensorrt-rtx",
        recipe={"plugin": f"plugin.so:{sha256_of(library)[:16]}"},
        engines={"llm": {"plugin": True, "host": ["start"]}},
    )
    gpu = machine(bundle, name, library=library, resident=["llm"])
    for _ in range(2):
        told(gpu.runtime)
        gpu.runtime.close()
    memory = gpu.target.memory
    memory.from_array(np.zeros(2 * STAGING, np.uint8))
    with pytest.raises(EngineError, match="full"):
        memory.allocate((gpu.cuda.capacity,), np.uint8)
    with pytest.raises(EngineError, match="cudaSetDevice failed"):
        memory.cuda("cudaSetDevice", 7)
    assert memory.cuda("cudaDriverGetVersion") and memory.cuda("cudaRuntimeGetVersion")
    return request.param, gpu


def test_cudas_calls_are_real(made: Any) -> None:
    _, gpu = made
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("CUDA's bindings are not installed: pip install cuda-bindings")
    real, called = import_cuda(), set()
    assert real.cudaStreamNonBlocking == gpu.cuda.cudaStreamNonBlocking
    for name, arguments in dict.fromkeys(gpu.cuda.calls):
        translated = [
            getattr(getattr(real, type(argument).__name__), argument.name)
            if isinstance(argument, IntEnum)
            else argument
            for argument in arguments
        ]
        function = getattr(real, name)
        inspect.signature(function).bind(*translated)
        if name not in called and name not in _HANDLES:
            fake = getattr(gpu.cuda, name)
            assert len(function(*_harmless(translated))) == _results(name), (name, fake)
        called.add(name)
    assert called >= {
        "cudaMalloc", "cudaFree", "cudaMallocHost", "cudaFreeHost", "cudaMemcpyAsync",
        "cudaMemsetAsync", "cudaStreamSynchronize", "cudaStreamBeginCapture",
        "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphLaunch", "cudaGraphDestroy",
        "cudaGraphExecDestroy", "cudaMemGetInfo", "cudaGetDeviceProperties", "cudaSetDevice",
        "cudaGetErrorString", "cudaGetLastError", "cudaGetDeviceCount", "cudaStreamCreateWithFlags",
        "cudaEventCreate", "cudaEventRecord", "cudaEventElapsedTime",
    }  # fmt: skip


# Calls that would dereference an invalid handle: only their signatures are compared.
_HANDLES = {
    "cudaGraphLaunch", "cudaGraphDestroy", "cudaGraphExecDestroy", "cudaGraphInstantiate",
    "cudaEventRecord", "cudaEventSynchronize", "cudaEventElapsedTime",
}  # fmt: skip


def _harmless(arguments: list[Any]) -> list[Any]:
    """Arguments of the same types without our addresses: there may be a driver, and a GPU."""
    return [type(argument)(0) if type(argument) is int else argument for argument in arguments]


def _results(name: str) -> int:
    """Numbers of results: the error and what the runtime unpacks."""
    some = {
        "cudaMemGetInfo": 3,
        **dict.fromkeys(
            (
                "cudaMalloc", "cudaMallocHost", "cudaGetDeviceCount", "cudaGetDeviceProperties",
                "cudaStreamCreateWithFlags", "cudaStreamEndCapture", "cudaGetErrorString",
                "cudaDriverGetVersion", "cudaRuntimeGetVersion", "cudaEventCreate",
            ),
            2,
        ),
    }  # fmt: skip
    return some.get(name, 1)


def test_cudas_enumerations_are_real() -> None:
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("CUDA's bindings are not installed: pip install cuda-bindings")
    real = import_cuda()
    for kind in (
        fake_cuda.cudaError_t,
        fake_cuda.cudaMemcpyKind,
        fake_cuda.cudaStreamCaptureMode,
    ):
        for member in kind:
            assert int(getattr(getattr(real, kind.__name__), member.name)) == int(member)
    properties = real.cudaDeviceProp()
    assert isinstance(properties.name, bytes) and isinstance(
        properties.major + properties.minor, int
    )


def test_tensorrts_calls_are_real(made: Any) -> None:
    runtime, gpu = made
    module = real_module(runtime)
    uses: set[tuple[str, str, tuple[type, ...] | None]] = set()
    for kind, name, arguments in gpu.tensorrt.used:
        types = None if arguments is None else tuple(type(value) for value in arguments)
        uses.add((kind, name, types))
    for kind, name, types in sorted(uses, key=str):
        found = getattr(getattr(module, kind), name)
        if types is None:
            assert isinstance(found, property), f"{kind}.{name}"
        else:
            assert fits(found.__doc__, types), f"{kind}.{name}{types}: {found.__doc__}"
    methods = {name for _, name, _ in uses}
    assert methods >= {
        "deserialize_cuda_engine", "create_execution_context", "set_tensor_address", "infer_shapes",
        "set_input_shape", "execute_async_v3", "set_device_memory", "load_library",
        "set_optimization_profile_async", "get_device_memory_size_for_profile_v2",
        "get_tensor_profile_shape", "get_aliased_input_tensor", "get_tensor_location",
    }  # fmt: skip
    if runtime == "tensorrt-rtx":
        assert methods >= {
            "is_stream_capturable", "create_runtime_cache", "set_runtime_cache",
            "dynamic_shapes_kernel_specialization_strategy",
        }  # fmt: skip


def test_tensorrts_enumerations_are_real(made: Any) -> None:
    module = real_module(made[0])
    names = [*ENUMS, *(RTX_ENUMS if made[0] == "tensorrt-rtx" else ())]
    for name in names:
        for member in getattr(fake_tensorrt, name):
            assert int(getattr(getattr(module, name), member.name)) == int(member)
    for member in fake_tensorrt.Severity:
        assert hasattr(module.ILogger.Severity, member.name)


ACCEPTED = {
    int: ("SupportsInt", "int"),
    str: ("str",),
    tuple: ("tuple",),
    bytes: ("Buffer",),
}


def fits(documentation: str, types: tuple[type, ...]) -> bool:
    """True if an overload in `documentation` takes arguments of these types."""
    for signature in re.findall(r"(?m)^\s*(?:\d+\. )?\w+\((self: .*)\) -> ", documentation):
        parameters = [part for part in re.split(r", (?=\w+: )", signature)][1:]
        needed = sum(" = " not in parameter for parameter in parameters)
        if needed <= len(types) <= len(parameters) and all(
            _takes(parameter, given) for parameter, given in zip(parameters, types, strict=False)
        ):
            return True
    return False


def _takes(parameter: str, given: type) -> bool:
    wanted = re.split(r"[.:]", parameter.partition(": ")[2].partition(" = ")[0])[-1]
    if given.__name__ == "mmap":
        return wanted == "Buffer"
    if given.__name__ == "Logger":
        return wanted == "ILogger"
    return wanted in ACCEPTED.get(given, (given.__name__,))


def test_the_comparison_sees_what_is_wrong() -> None:
    """It is no oracle that says yes to everything."""
    doc = "f(self: m.X, name: str, memory: typing.SupportsInt) -> bool"
    assert fits(doc, (str, int))
    for wrong in ((str,), (int, str), (str, str), (str, int, int)):
        assert not fits(doc, wrong)
    several = "f(*a)\n1. f(self: X, s: m.A = <A.B: 0>) -> Y\n\n2. f(self: X, c: m.IC = None) -> Y"
    assert fits(several, ()) and fits(several, (type("IC", (), {}),))
    assert not fits(several, (int,))


@pytest.mark.parametrize("runtime", list(MODULES))
def test_the_real_module_refuses_what_is_no_engine(runtime: str, tmp_path: Path) -> None:
    """Our logger, file mapping and error line with the real classes; no GPU is needed for that."""
    module = real_module(runtime)
    path = tmp_path / "none.engine"
    path.write_bytes(b"no engine" * 100)
    with pytest.raises(EngineError) as error:
        TensorRt(module, runtime).load(path, "mmi build it")
    line = str(error.value)
    assert "\n" not in line and ("cannot start" in line or "mmi build it" in line)


def test_uses_are_kept() -> None:
    """The fake records each use, called or not: the comparison relies on it."""
    module = fake_tensorrt.FakeTensorRt(fake_cuda.FakeCuda())
    expected: list[Use] = [("IPluginRegistry", "load_library", (__file__,))]
    module.logger = type("Silent", (), {"log": lambda *_: None})()
    module.get_plugin_registry().load_library(__file__)
    assert module.used == expected
