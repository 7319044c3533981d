"""TensorRT's runtime as a program that checks its user, on `FakeCuda`.

An engine file is a JSON description beside which lies what it computes: an ONNX file, run by ONNX
Runtime at the 'device' addresses, or a function. Activations of lower precision are converted where
they enter and leave. Classes and methods are called what TensorRT calls them, and every use of them
is kept in `used`, for a test that looks each one up in the real module.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # numpy then knows bfloat16
import numpy as np
import onnxruntime as ort

from deploy.runtime.tensorrt.fake_cuda import ALIGNMENT, DEVICE, GARBAGE, FakeCuda, Fault
from mmi_deploy.spec.graphs import Graph, Range

Compute = Callable[[str, dict[str, np.ndarray]], Mapping[str, np.ndarray]]
# Class, attribute, and the arguments where it was called.
Use = tuple[str, str, tuple[Any, ...] | None]


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class TensorLocation(IntEnum):
    DEVICE = 0
    HOST = 1


class DynamicShapesKernelSpecializationStrategy(IntEnum):
    LAZY = 0
    EAGER = 1
    NONE = 2


class DataType(IntEnum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    INT64 = 8
    BF16 = 7


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


TYPES = {
    "float32": DataType.FLOAT,
    "float16": DataType.HALF,
    "bfloat16": DataType.BF16,
    "int32": DataType.INT32,
    "int64": DataType.INT64,
}


def write_plan(
    path: Path,
    graph: Graph,
    onnx: Path | None = None,
    *,
    profiles: list[Mapping[str, Range]] | None = None,
    host: tuple[str, ...] = (),
    scratch: int = 4096,
    **fields: Any,
) -> None:
    """The engine file of `graph`, as typed; `profiles` replace some of its ranges, and `fields`
    parts of the description."""
    dynamic = [t for t in graph.inputs if any(isinstance(side, str) for side in t.shape)]

    def shapes(changed: Mapping[str, Range]) -> dict[str, list[tuple[int, ...]]]:
        ranges = {**graph.ranges, **changed}
        ends = [{k: getattr(r, end) for k, r in ranges.items()} for end in Range.__annotations__]
        return {t.name: [t.resolve(**sizes) for sizes in ends] for t in dynamic}

    kinds = {t.name: t.dtype for t in (*graph.inputs, *graph.outputs)}
    described = {
        "graph": graph.name,
        "onnx": str(onnx) if onnx else None,
        "inputs": [t.name for t in graph.inputs],
        "types": kinds,
        "shapes": {
            t.name: [-1 if isinstance(s, str) else s for s in t.shape]
            for t in (*graph.inputs, *graph.outputs)
        },
        "letters": {t.name: t.shape for t in (*graph.inputs, *graph.outputs)},
        "in_place": dict(graph.in_place),
        "profiles": [shapes(changed) for changed in profiles or [{}]],
        "host": host,
        "scratch": scratch,
        "weights": 1 << 16,
        "version": "11.4.0",
        "plugin": False,
    }
    path.write_text(json.dumps(described | fields))


class Fake:
    """Keeps every use of itself."""

    def __init__(self, world: FakeTensorRt) -> None:
        self._world = world

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if name.startswith("_"):
            return found
        used, kind = self._world.used, type(self).__name__
        if not callable(found):
            used.append((kind, name, None))
            return found

        def logged(*arguments: Any) -> Any:
            used.append((kind, name, arguments))
            return found(*arguments)

        return logged


class FakeTensorRt:
    """The module. `compute(graph, inputs)` runs engines that have no ONNX file."""

    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    TensorLocation = TensorLocation
    DataType = DataType
    DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy

    def __init__(
        self,
        cuda: FakeCuda,
        compute: Compute | None = None,
        *,
        rtx: bool = False,
        version: str = "11.4.0",
    ) -> None:
        self.__name__ = "tensorrt_rtx" if rtx else "tensorrt"
        self.__version__ = version
        self.cuda, self.compute, self.rtx = cuda, compute, rtx
        self.used: list[Use] = []
        self.loads: list[str] = []
        self.recordable_after = 2 if rtx else 0
        # Runs after new shapes that a lazy context does with fallback kernels, and those done or
        # launched from a recording of them.
        self.lazy_runs, self.fallbacks = 5, 0
        # True: an older TensorRT, which takes no less scratch memory than the engine's bound.
        self.wants_bound = False
        self.plugins: list[str] = []
        self.logger: Any = None

    class ILogger:
        Severity = Severity

        def __init__(self) -> None:
            return

        def log(self, severity: Severity, msg: str) -> None:
            """Fail as TensorRT's pure virtual function does: a logger must define it."""
            raise RuntimeError('Tried to call pure virtual function "ILogger::log"')

    def Runtime(self, logger: Any) -> Runtime:  # noqa: N802
        self.used.append(("Runtime", "__init__", (logger,)))
        self.logger = logger
        return Runtime(self)

    def get_plugin_registry(self) -> IPluginRegistry:
        return IPluginRegistry(self)

    def error(self, line: str) -> None:
        self.logger.log(Severity.WARNING, "a warning that says nothing")
        self.logger.log(Severity.ERROR, line)


class IPluginRegistry(Fake):
    def load_library(self, plugin_path: str) -> object | None:
        if not Path(plugin_path).read_bytes().startswith(b"\x7fELF"):
            self._world.error(f"Unable to load library: {plugin_path}")
            return None
        self._world.plugins.append(plugin_path)
        return object()


class Runtime(Fake):
    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        world, cuda = self._world, self._world.cuda
        try:
            about = json.loads(bytes(serialized_engine))
        except ValueError:
            world.error("Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed.")
            return None
        if about["version"] != world.__version__:
            world.error("The engine plan file is not compatible with this version of TensorRT")
            return None
        if about["plugin"] and not world.plugins:
            world.error("Cannot find plugin: MultiImageDeformableAttention, version: 1")
            return None
        failed, weights = object.__getattribute__(cuda, "cudaMalloc")(about["weights"])
        if failed:
            world.error("Error Code 2: OutOfMemory (no further information)")
            return None
        world.loads.append(about["graph"])
        return ICudaEngine(world, about, weights)


class ICudaEngine(Fake):
    def __init__(self, world: FakeTensorRt, about: dict[str, Any], weights: int) -> None:
        super().__init__(world)
        self._about, self._contexts = about, weakref.WeakSet[Any]()
        self.num_io_tensors = len(about["types"])
        self.num_optimization_profiles = len(about["profiles"])
        weakref.finalize(self, _unload, world.cuda, about["graph"], weights, self._contexts)

    def get_tensor_name(self, index: int) -> str:
        return list(self._about["types"])[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._about["shapes"][name])

    def get_tensor_dtype(self, name: str) -> DataType:
        return TYPES[self._about["types"][name]]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in self._about["host"] else TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self._about["profiles"][profile_index][name]]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self._about["in_place"].get(name)

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return int(self._about["scratch"]) // (1 + profile_index)

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig(self._world)

    def create_execution_context(self, how: Any) -> IExecutionContext:
        strategy = how._strategy if isinstance(how, IRuntimeConfig) else how
        if self._world.rtx != isinstance(how, IRuntimeConfig):
            raise Fault("a context is made in the other TensorRT's way")
        if strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            raise Fault("the context allocates memory that nobody planned")
        context = IExecutionContext(self._world, self)
        lazy = DynamicShapesKernelSpecializationStrategy.LAZY
        context._lazy = isinstance(how, IRuntimeConfig) and how._specialization == lazy
        self._contexts.add(context)
        kept = int(self._about.get("context_bytes", 0))
        self._world.cuda.accounted += kept
        weakref.finalize(context, _account, self._world.cuda, -kept)
        return context


def _account(cuda: FakeCuda, size: int) -> None:
    cuda.accounted += size


def _unload(cuda: FakeCuda, graph: str, weights: int, contexts: Any) -> None:
    if contexts:
        cuda.faults.append(f"the engine of {graph} goes before its contexts")
    with cuda.lock:
        cuda._free(DEVICE, weights)


class IRuntimeCache(Fake):
    def deserialize(self, blob: bytes) -> bool:
        return blob.startswith(b"kernels")

    def serialize(self) -> bytes:
        return b"kernels"


class IRuntimeConfig(Fake):
    _strategy = ExecutionContextAllocationStrategy.STATIC
    _specialization = DynamicShapesKernelSpecializationStrategy.LAZY

    @property
    def dynamic_shapes_kernel_specialization_strategy(
        self,
    ) -> DynamicShapesKernelSpecializationStrategy:
        return self._specialization

    @dynamic_shapes_kernel_specialization_strategy.setter
    def dynamic_shapes_kernel_specialization_strategy(
        self, strategy: DynamicShapesKernelSpecializationStrategy
    ) -> None:
        name = "dynamic_shapes_kernel_specialization_strategy"
        self._world.used.append((type(self).__name__, name, None))
        self._specialization = strategy

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache(self._world)

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        return isinstance(cache, IRuntimeCache)


class IExecutionContext(Fake):
    def __init__(self, world: FakeTensorRt, engine: ICudaEngine) -> None:
        super().__init__(world)
        self._engine, self._about = engine, engine._about
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)
        self._need: int | None = None  # of the shapes that are set, once it was asked for
        self._unsettled = True  # shapes are new: TensorRT allocates at the next run
        self._reshaped = 0  # how often they were
        self._asked = 0
        self._lazy, self._since = False, 0  # runs since the shapes were new

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._world.cuda.stream(stream_handle)
        self._profile, self._unsettled = profile_index, True
        self._shapes.clear()
        return 0 <= profile_index < len(self._about["profiles"])

    def set_device_memory(self, memory: int, size: int) -> None:
        if memory % ALIGNMENT:
            raise Fault("the scratch memory is not aligned")
        self._world.cuda.find(memory, size, DEVICE)
        if self._world.wants_bound and size < self._bound:
            self._world.error("The device memory is smaller than getDeviceMemorySizeV2")
        self._scratch = (memory, size)

    @property
    def _bound(self) -> int:
        return self._engine.get_device_memory_size_for_profile_v2(self._profile)

    def update_device_memory_size_for_shapes(self) -> int:
        """Scratch of the shapes that are set: in proportion to the elements of the dynamic inputs,
        so that the largest shapes need the bound."""
        if missing := self.infer_shapes():
            raise Fault(f"{missing} have no shape")
        ends = self._about["profiles"][self._profile]
        given = sum(int(np.prod(self._shapes[name])) for name in ends)
        most = sum(int(np.prod(greatest)) for _, _, greatest in ends.values())
        self._need = -(-self._bound * given // most) if most else self._bound
        return self._need

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name not in self._about["inputs"]:
            raise Fault(f"{name} is not an input")
        ends = self._about["profiles"][self._profile].get(name)
        if ends:
            least, _, greatest = ends
            inside = all(a <= s <= b for a, s, b in zip(least, shape, greatest, strict=True))
        else:
            inside = list(shape) == self._about["shapes"][name]
        if not inside:
            self._world.error(f"{name}: {shape} is not in the profile")
            return False
        if self._shapes.get(name) != shape:
            self._unsettled = True
            self._reshaped += 1
            self._since = 0
            self._need = None
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._about["types"]:
            raise Fault(f"{name} is not a tensor of the engine")
        if not memory or memory % ALIGNMENT:
            raise Fault(f"the address of {name} is not aligned")
        self._addresses[name] = memory
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self._about["inputs"] if name not in self._shapes]

    def is_stream_capturable(self, stream: int) -> bool:
        self._world.cuda.stream(stream)
        self._asked += 1
        return self._asked > self._world.recordable_after

    def execute_async_v3(self, stream_handle: int) -> bool:
        about, cuda = self._about, self._world.cuda
        if missing := [name for name in about["types"] if name not in self._addresses]:
            raise Fault(f"{missing} have no address")
        if missing := self.infer_shapes():
            raise Fault(f"{missing} have no shape")
        need = self._bound if self._need is None or self._world.wants_bound else self._need
        if self._scratch[1] < need:
            raise Fault(f"{need} bytes of scratch memory are needed")
        if cuda.stream(stream_handle).recording is not None and self._unsettled:
            raise Fault("a run is recorded whose shapes are new")
        self._unsettled = False
        run = _Run(self._world, about, dict(self._shapes), dict(self._addresses), self._scratch)
        run.check()
        run.context, run.reshaped = self, self._reshaped
        run.fallback = self._lazy and self._since < self._world.lazy_runs
        self._since += 1
        cuda.enqueue(stream_handle, run)
        return True


class _Run:
    """One enqueued run: addresses and shapes are those of the time when it was enqueued."""

    def __init__(
        self,
        world: FakeTensorRt,
        about: dict[str, Any],
        shapes: dict[str, tuple[int, ...]],
        addresses: dict[str, int],
        scratch: tuple[int, int],
    ) -> None:
        self.world, self.about, self.scratch = world, about, scratch
        self.addresses = addresses
        self.context: IExecutionContext | None = None
        self.reshaped = 0
        self.fallback = False  # with kernels for any shape; a recording keeps them
        self.shapes = shapes | _output_shapes(about, shapes)
        self.host = {name: self._view(name).copy() for name in about["host"]}

    def _view(self, name: str) -> np.ndarray:
        dtype, shape = np.dtype(self.about["types"][name]), self.shapes[name]
        size = dtype.itemsize * int(np.prod(shape))
        if name in self.about["host"]:
            import ctypes

            raw = np.frombuffer(ctypes.string_at(self.addresses[name], size), np.uint8)
        else:
            raw = self.world.cuda.find(self.addresses[name], size, DEVICE)
        return raw.view(dtype).reshape(shape)

    def check(self) -> None:
        """All memory is there, and nothing is written over what is read, but in place."""
        views = {name: self._view(name) for name in self.about["types"]}
        aliases = self.about["in_place"]
        for name in views.keys() - set(self.about["inputs"]):
            for other, view in views.items():
                if other in (name, aliases.get(name)) or other in self.about["host"]:
                    continue
                if np.shares_memory(views[name], view):
                    raise Fault(f"{name} is written over {other}")
            if name in aliases and self.addresses[name] != self.addresses[aliases[name]]:
                raise Fault(f"{name} does not lie where {aliases[name]} lies")

    def launched(self) -> None:
        """From a recording: what TensorRT holds for it must be that of its shapes."""
        if self.context is None or self.context._reshaped != self.reshaped:
            raise Fault("a recording is launched after its context was given other shapes")

    def __call__(self) -> None:
        self.check()
        self.world.fallbacks += self.fallback
        if self.scratch[1]:
            self.world.cuda.find(*self.scratch, DEVICE)[...] = GARBAGE
        inputs = {name: self._view(name).copy() for name in self.about["inputs"]} | self.host
        for name, value in self._compute(inputs).items():
            self._view(name)[...] = value

    def _compute(self, inputs: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        if self.about["onnx"] is None:
            assert self.world.compute is not None
            wide = {name: _wide(array) for name, array in inputs.items()}
            return self.world.compute(self.about["graph"], wide)
        session = onnx_session(self.about["onnx"])
        wide = {name: _wide(array) for name, array in inputs.items()}
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, wide), strict=True))


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array


@cache
def onnx_session(path: str) -> ort.InferenceSession:
    """As the runtime's own engine runs it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _output_shapes(
    about: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    sizes: dict[str, int] = {}
    for name in about["inputs"]:
        for side, size in zip(about["letters"][name], shapes[name], strict=True):
            if isinstance(side, str):
                factor, star, letter = side.rpartition("*")
                sizes[letter] = size // (int(factor) if star else 1)

    def resolved(side: int | str) -> int:
        if isinstance(side, int):
            return side
        factor, star, letter = side.rpartition("*")
        return (int(factor) if star else 1) * sizes[letter]

    outputs = about["types"].keys() - set(about["inputs"])
    return {name: tuple(resolved(side) for side in about["letters"][name]) for name in outputs}
