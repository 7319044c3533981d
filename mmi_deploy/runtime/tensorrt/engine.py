"""TensorRT engine: one graph on a GPU, with buffers bound by address and runs as CUDA graphs.

Arrays given for inputs are copied to staging buffers at fixed addresses. So a run that differs from
an earlier one only in their contents is launched from its recording (cuda_graph.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.runtime.buffers import HOST, Array, Buffer
from mmi_deploy.runtime.caches import padded_count
from mmi_deploy.runtime.device_memory import ALIGNMENT, DeviceMemory
from mmi_deploy.runtime.engine import MAX_SHAPES, Buffers, Engine
from mmi_deploy.runtime.staging import Staging
from mmi_deploy.runtime.tensorrt.cuda_graph import CudaGraphs
from mmi_deploy.runtime.tensorrt.module import TensorRt
from mmi_deploy.spec.graphs import Graph

# dtype of the contract -> name in TensorRT's `DataType`.
_DTYPE_NAMES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int32": "INT32",
    "int64": "INT64",
}

# Engines that are used together, by their group's name in `--resident`.
GROUPS = {
    "encoder": ("vision_encoder", "llm_values"),
    "llm": ("llm",),
    "condition": ("image_condition", "unet_values"),
    "denoise": ("denoise_step", "denoise_shallow"),
    "vae": ("vae_decoder",),
}

# Execution contexts per engine, one per set of input shapes. The least recently used one is given
# the next new shapes, which destroys its recordings. They share the workspace, so a context takes
# little memory of its own.
MAX_CONTEXTS = 8

# Bytes of the GPU that a context takes of its own, and a recorded run: 400 kernels (a token of the
# 13B model has 415) of about 10 kB, as NVIDIA reports (NVIDIA/cccl#3768). Both assumed, not
# measured.
CONTEXT_BYTES = 4 * 10**6
RECORDING_BYTES = 4 * 10**6

Shape = tuple[int, ...]


class Workspace:
    """Workspace: scratch memory for the activations inside engines.

    All engines share one block, as large as the largest requirement of the shapes that have run:
    they run one after another on one stream. bound: requirement of the loaded engines at the
    largest shapes of their profiles, in bytes.
    """

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._block: Buffer | None = None
        self.bound = 0

    @property
    def size(self) -> int:
        return self._block.bytes if self._block else 0

    @property
    def pointer(self) -> int:
        return self._block.pointer if self._block else 0

    def grow(self, need: int) -> None:
        """Grow to at least `need` bytes, in quarters of the bound: each growth moves the block,
        which destroys all recordings. Raises `EngineError`, as `reserve`."""
        step = max(self.bound // 4, 1)
        self.reserve(max(need, min(-(-need // step) * step, self.bound)))

    def reserve(self, size: int) -> None:
        """Grow to at least `size` bytes, which changes `pointer`. Raises `EngineError` if memory is
        short; the workspace then has its old size."""
        size = max(size, ALIGNMENT)  # TensorRT requires an address even for an empty workspace
        if size > self.size:
            self._memory.wait()  # enqueued runs still use the old block
            # Freed before the allocation of the larger one: both together may not fit.
            before, self._block = self.size, None
            try:
                self._block = self._memory.allocate((size,), np.uint8)
            except EngineError:
                if before:  # engines that were loaded before remain usable
                    self._block = self._memory.allocate((before,), np.uint8)
                raise


@dataclass(frozen=True, eq=False)
class _Profile:
    """Optimisation profile of an engine. shapes: dynamic input -> (min, max) shape."""

    index: int
    shapes: Mapping[str, tuple[Shape, Shape]]

    def misfit(self, given: Mapping[str, Buffer]) -> str | None:
        """Name of the first input whose shape is out of range, or None."""
        for name, (min_shape, max_shape) in self.shapes.items():
            shape = given[name].shape
            if any(not a <= s <= b for a, s, b in zip(min_shape, shape, max_shape, strict=True)):
                return name
        return None

    @property
    def width(self) -> int:
        """Elements of all dynamic inputs at their max shapes."""
        return sum(prod(max_shape) for _, max_shape in self.shapes.values())


def contexts_bytes(graph: Graph, images: int, rows: int = 1) -> int:
    """Estimate of the bytes of an engine's contexts and recordings, for documents of up to `images`
    images and runs of up to `rows` rows."""
    visible = min(images, graph.ranges["m"].max) if "m" in graph.ranges else 1
    shapes = len({padded_count(count, visible) for count in range(1, visible + 1)})
    shapes *= rows.bit_length()  # rows are padded to powers of two
    if "t" in graph.ranges:  # each length of a prompt is a shape
        contexts = MAX_CONTEXTS
    else:  # so is that of a picture's context
        contexts = min(images if "x" in graph.ranges else shapes, MAX_CONTEXTS)
    repeated = graph.name in (
        "llm",
        "denoise_step",
        "denoise_shallow",
        "vision_encoder",
        "vae_decoder",
    )
    recordings = min(shapes, MAX_CONTEXTS) if repeated else 0  # others' addresses are new each time
    return contexts * CONTEXT_BYTES + recordings * RECORDING_BYTES


class Residency:
    """Policy of which engines stay on the GPU: resident groups always, and of the others one group
    at a time, which is unloaded when another one is needed."""

    def __init__(self, resident: Collection[str] | None = None) -> None:
        """resident: names of `GROUPS`; None keeps every engine. Raises `ConfigError`."""
        if unknown := sorted(set(resident or ()) - set(GROUPS)):
            raise ConfigError(
                f"no engines are called {unknown[0]!r}",
                expected=", ".join(GROUPS),
                fix="give --resident a comma-separated list of these",
            )
        self._resident = None if resident is None else frozenset(resident)
        self._swapped: list[TensorRtEngine] = []  # loaded now, all of one group

    def is_resident(self, graph: str) -> bool:
        return self._resident is None or group_of(graph) in self._resident

    def make_room(self, engine: TensorRtEngine) -> None:
        """Unload the engines of other groups. Call it before `engine` is loaded."""
        if self.is_resident(engine.graph.name):
            return
        group = group_of(engine.graph.name)
        for other in self._swapped:
            if group_of(other.graph.name) != group:
                other.close()
        same_group = [other for other in self._swapped if group_of(other.graph.name) == group]
        self._swapped = [*same_group, engine]


def group_of(graph: str) -> str:
    """Name of the group in `GROUPS` that `graph` belongs to."""
    return next(group for group, graphs in GROUPS.items() if graph in graphs)


@dataclass(eq=False)
class _Context:
    """Execution context for one set of input shapes.

    workspace: its address as last set. used: number of the engine's run that last used it. bound:
    tensor -> address, shape, and value (of an input that TensorRT reads on the host), as last set.
    """

    inner: Any
    profile: int
    graphs: CudaGraphs
    workspace: int = 0
    used: int = 0
    bound: dict[str, tuple[int, Shape, bytes]] = field(default_factory=dict)


class TensorRtEngine(Engine):
    """One graph on a GPU. Each run uses the smallest optimisation profile that its shapes fit."""

    memory: DeviceMemory

    def __init__(
        self,
        path: Path,
        graph: Graph,
        tensorrt: TensorRt,
        memory: DeviceMemory,
        workspace: Workspace,
        *,
        fix: str,
        residency: Residency | None = None,
        cache_name: str = "",
        record: bool = True,
    ) -> None:
        """Load `path`. fix: command that builds it. record: launch repeated runs as CUDA graphs.

        Raises `EngineError` if the file cannot be loaded or does not match `graph`.
        """
        super().__init__(graph, memory)
        self._lock = memory.lock  # of the stream: engines that share it must not interleave
        self._path, self._tensorrt, self._workspace, self._fix = path, tensorrt, workspace, fix
        self._residency = residency or Residency()
        self._cache_name = cache_name or path.stem
        self._record = record
        self._engine: Any = None
        self._on_host: set[str] = set()
        self._profiles: list[_Profile] = []
        self._bounds: list[int] = []  # workspace of each profile at its largest shapes
        self._sized_by_shapes = True  # False where TensorRT insists on the bounds
        self._staging = Staging(memory)
        self._host_staging: dict[str, Buffer] = {}
        self._chosen: dict[tuple[Shape, ...], int] = {}
        self._contexts: dict[tuple[Shape, ...], _Context] = {}
        self._kernels: Any = None  # RTX's compiled kernels, of all contexts
        # Number of times that a context got new shapes, and that number when they were saved.
        self._compiled = self._saved = 0
        self._runs = 0
        # The order in which keys list the tensors: that of the caller's mappings may differ.
        self._input_names = tuple(tensor.name for tensor in graph.inputs)
        self._output_names = tuple(tensor.name for tensor in graph.outputs)
        self.launches: int = 0
        self.open()

    def open(self) -> None:
        """Load the engine, unless it is loaded."""
        with self.memory.lock:
            if self._engine is not None:
                return
            self._residency.make_room(self)
            self._engine = self._tensorrt.load(self._path, self._fix)
            try:
                self._read_engine()
            except BaseException:
                self._engine = None  # frees its weights
                raise

    def _read_engine(self) -> None:
        """Check the engine's interface, and read its profiles and their workspace."""
        self._check(self._path)
        host = self._tensorrt.module.TensorLocation.HOST
        location = self._engine.get_tensor_location
        need = self._engine.get_device_memory_size_for_profile_v2
        count = self._engine.num_optimization_profiles
        self._on_host = {t.name for t in self.graph.inputs if location(t.name) == host}
        self._profiles = [self._profile(index) for index in range(count)]
        self._bounds = [need(index) for index in range(count)]
        self._workspace.bound = max(self._workspace.bound, *self._bounds)

    def close(self) -> None:
        """Unload the engine after its enqueued runs. The next `run` loads it again."""
        with self.memory.lock:
            self.memory.wait()  # runs in flight use everything that is freed below
            for context in self._contexts.values():
                context.graphs.clear()
            self._contexts.clear()  # TensorRT requires contexts to go before their engine
            self._save(self._kernels)
            self._kernels = None
            self._staging.clear()
            self._host_staging.clear()
            self._engine = None

    def save_kernels(self) -> None:
        """Write RTX's compiled kernels to the cache folder, so that a process that is killed later
        has not compiled them in vain. Skipped until the kernels of twice as many shapes as the last
        time are compiled: writing them takes a while, and many documents have new shapes."""
        with self.memory.lock:
            if self._kernels is not None and self._compiled >= max(1, 2 * self._saved):
                self._save(self._kernels)

    def _save(self, kernels: Any) -> None:
        self._tensorrt.save(kernels, self._cache_name)
        self._saved = self._compiled

    def run(
        self, inputs: Buffers, outputs: Mapping[str, Buffer] | None = None
    ) -> dict[str, Buffer]:
        with self.memory.lock:
            self.open()  # it may have been unloaded to make room for another group
            return super().run(inputs, outputs)

    def _check(self, path: Path) -> None:
        """Raise `EngineError` unless the engine's inputs and outputs are those of the contract."""
        module, engine = self._tensorrt.module, self._engine
        fix = f"build it again with `{self._fix}`"
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        tensors = {tensor.name: tensor for tensor in (*self.graph.inputs, *self.graph.outputs)}
        if wrong := sorted(set(tensors) ^ names):
            raise EngineError(
                f"{path} is not a {self.graph.name} engine: it differs in {', '.join(wrong)}",
                fix=fix,
            )
        for name, tensor in tensors.items():
            shape, kind = tuple(engine.get_tensor_shape(name)), engine.get_tensor_dtype(name)
            same = len(shape) == len(tensor.shape) and all(
                ours == theirs or isinstance(ours, str)
                for ours, theirs in zip(tensor.shape, shape, strict=True)
            )
            if not same or kind != getattr(module.DataType, _DTYPE_NAMES[tensor.dtype]):
                raise EngineError(
                    f"{path} is not a {self.graph.name} engine: {name} differs",
                    expected=f"{tensor.dtype} {tensor.shape}",
                    got=f"{kind.name} {shape}",
                    fix=fix,
                )
        for new, old in self.graph.in_place.items():
            if engine.get_aliased_input_tensor(new) not in (None, "", old):
                raise EngineError(f"{path} does not write {new} in place of {old}", fix=fix)

    def _profile(self, index: int) -> _Profile:
        shapes = {}
        for tensor in self.graph.inputs:
            if any(isinstance(side, str) for side in tensor.shape):
                min_shape, _, max_shape = self._engine.get_tensor_profile_shape(tensor.name, index)
                shapes[tensor.name] = (tuple(min_shape), tuple(max_shape))
        return _Profile(index, shapes)

    def _to_buffer(self, name: str, array: Array) -> Buffer:
        """Copy `array` to the input's staging buffer, unless it is known to hold the same."""
        if name in self._on_host:
            return HOST.from_array(np.ascontiguousarray(array).reshape(np.shape(array)))
        return self._staging.write(name, array, overwritten=name in self.graph.in_place.values())

    def _execute(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        read = {name: self._readable(name, buffer) for name, buffer in inputs.items()}
        written = {}
        for name, buffer in outputs.items():
            if name in self.graph.in_place:
                written[name] = read[self.graph.in_place[name]]
            elif buffer.pointer % ALIGNMENT:
                written[name] = self._staging.reserve(name, buffer.shape, buffer.dtype)
            else:
                written[name] = buffer
        self._run(read, written)
        # On the same stream, so after the engine. Of in-place outputs, the staged cache is written
        # back.
        for name, buffer in outputs.items():
            if written[name].pointer != buffer.pointer:
                self.memory.copy(written[name], buffer)

    def _prepare(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> Callable[[], None]:
        # Views of the caller's memory, made once: they show what is written between runs.
        arrays = {n: b.read() for n, b in inputs.items() if b.memory is not self.memory}

        def start() -> None:
            self.open()  # it may have been unloaded since the plan's last run
            staged = {name: self._to_buffer(name, array) for name, array in arrays.items()}
            self._execute({**inputs, **staged}, outputs)

        return start

    def _readable(self, name: str, buffer: Buffer) -> Buffer:
        """Buffer with the input's contents that TensorRT can read: aligned, and on the GPU or, for
        an input that shapes depend on, on the host."""
        if name in self._on_host:
            block, kept = self._stage_on_host(name, buffer)
            kept[...] = buffer.read()
            return block
        if buffer.memory is not self.memory:
            return self._to_buffer(name, buffer.read())
        if buffer.pointer % ALIGNMENT == 0:
            return buffer
        aligned = self._staging.reserve(name, buffer.shape, buffer.dtype)
        self.memory.copy(buffer, aligned)
        return aligned

    def _stage_on_host(self, name: str, buffer: Buffer) -> tuple[Buffer, Array]:
        """Aligned staging buffer on the host with the input's shape, and the same as an array."""
        inner = self._host_staging.get(name)
        if inner is None or inner.bytes < buffer.bytes:
            room = HOST.allocate((buffer.bytes + ALIGNMENT,), np.uint8)
            inner = room.rows(-room.pointer % ALIGNMENT, room.bytes)
            self._host_staging[name] = inner
        block = Buffer(HOST, inner.pointer, buffer.shape, buffer.dtype, inner.owner)
        return block, block.read()

    def _run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Enqueue a run: launched from a recording, or kernel by kernel, or recorded first."""
        # First, because recordings belong to a context, and because the workspace may have moved
        # since the context's last run.
        shapes = tuple([inputs[name].shape for name in self._input_names])
        context = self._context(shapes, inputs)
        # Everything that is fixed in a recording besides the context's shapes and workspace.
        # TensorRT reads inputs on the host when it enqueues, so their values are fixed too.
        key = (
            *[inputs[name].pointer for name in self._input_names],
            *[outputs[name].pointer for name in self._output_names],
            *[inputs[name].read().tobytes() for name in sorted(self._on_host)],
        )
        # The fast path of decoding: a recording has its addresses, so nothing is bound.
        if context.graphs.launch(key):
            self.launches += 1
            return
        try:
            reshaped = self._bind(context, inputs, outputs)
            if reshaped:
                self._give_workspace(context)
        except EngineError:
            # Only some of its shapes are set, and the next run must not take it for whole.
            self._contexts.pop(shapes)
            self._forget(context)
            raise
        if reshaped:
            self._compiled += 1
            # A recorded run may read its sizes from memory of the context, which `_bind` changed.
            context.graphs.clear()
        # A run after a change of shape must not be captured: TensorRT may allocate in it. RTX is
        # asked after `_bind`, since it compiles kernels for the shapes that are bound.
        stream = self.memory.stream
        ready = self._record and not reshaped and self._tensorrt.may_record(context.inner, stream)
        launched = context.graphs.enqueue(key, partial(self._enqueue, context), ready)
        self.launches += launched
        self.refusal = context.graphs.refusal or self.refusal

    def _profile_of(self, shapes: tuple[Shape, ...], inputs: Mapping[str, Buffer]) -> int:
        """Index of the smallest profile that the shapes fit, cached; raises `EngineError`."""
        if shapes not in self._chosen:
            misfits = {profile: profile.misfit(inputs) for profile in self._profiles}
            fitting = [profile for profile, misfit in misfits.items() if misfit is None]
            if not fitting:
                profile = max(misfits, key=lambda profile: profile.width)
                name = misfits[profile]
                assert name is not None
                min_shape, max_shape = profile.shapes[name]
                raise EngineError(
                    f"{self.graph.name}: {name} does not fit any profile of the engine",
                    expected=f"{min_shape} to {max_shape}",
                    got=inputs[name].shape,
                    fix=f"build it for larger shapes with `{self._fix}`",
                )
            if len(self._chosen) == MAX_SHAPES:
                self._chosen.clear()
            self._chosen[shapes] = min(fitting, key=lambda profile: profile.width).index
        return self._chosen[shapes]

    def _context(self, shapes: tuple[Shape, ...], inputs: Mapping[str, Buffer]) -> _Context:
        """Context of the inputs' shapes. Documents that take turns have one each, so that neither
        destroys the recordings of the other."""
        context = self._contexts.get(shapes)
        if context is None:
            context = self._new_context(self._profile_of(shapes, inputs))
            self._contexts[shapes] = context
        self._runs += 1
        context.used = self._runs
        if context.bound and context.workspace != self._workspace.pointer:
            context.graphs.clear()  # the kernels of a recording use the old block
            self._set_workspace(context)
        return context

    def _give_workspace(self, context: _Context) -> None:
        """Set the workspace of a context whose shapes have just changed, grown to what they need:
        far less than the engine's bound for a short prompt. Raises `EngineError` where memory is
        short."""
        bound = self._bounds[context.profile]
        # Without this function, and where TensorRT refuses a smaller block, the bound.
        size_of = getattr(context.inner, "update_device_memory_size_for_shapes", None)
        need = size_of() if size_of is not None and self._sized_by_shapes else bound
        self._workspace.grow(need)
        self._tensorrt.errors.clear()
        self._set_workspace(context)
        if self._tensorrt.errors and self._workspace.size < bound:
            self._sized_by_shapes = False
            self._workspace.reserve(bound)
            self._set_workspace(context)

    def _set_workspace(self, context: _Context) -> None:
        context.inner.set_device_memory(self._workspace.pointer, self._workspace.size)
        context.workspace = self._workspace.pointer

    def _new_context(self, profile: int) -> _Context:
        """Context without recordings: a new one, or the least recently used one of too many."""
        if len(self._contexts) >= MAX_CONTEXTS:
            oldest = min(self._contexts, key=lambda shapes: self._contexts[shapes].used)
            context = self._contexts.pop(oldest)
            if context.profile == profile:
                context.graphs.clear()
                return context  # `_bind` sets the shapes that differ: cheaper than a new context
            self._forget(context)
        inner, self._kernels = self._tensorrt.context(self._engine, self._cache_name, self._kernels)
        if profile and not inner.set_optimization_profile_async(profile, self.memory.stream):
            raise self._failure(f"cannot take its profile {profile}")
        return _Context(inner, profile, CudaGraphs(self.memory))

    def _forget(self, context: _Context) -> None:
        """Destroy a context after its enqueued runs, which use memory that goes with it."""
        context.graphs.clear()
        self.memory.wait()
        context.inner = None

    def _bind(
        self, context: _Context, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> bool:
        """Set in the context the shapes and addresses that changed; returns True for new shapes.

        A changed value of an input that TensorRT reads on the host counts as a new shape.
        """
        self._tensorrt.errors.clear()
        reshaped = False
        for name, buffer in {**inputs, **outputs}.items():
            value = buffer.read().tobytes() if name in self._on_host else b""
            binding = (buffer.pointer, buffer.shape, value)
            before = context.bound.get(name)
            if before == binding:
                continue
            if name in inputs and (before is None or before[1:] != binding[1:]):
                reshaped = True
                if not context.inner.set_input_shape(name, buffer.shape):
                    raise self._failure(f"refuses {name} of shape {buffer.shape}")
            if not context.inner.set_tensor_address(name, buffer.pointer):
                raise self._failure(f"refuses the address of {name}")
            context.bound[name] = binding
        if reshaped:
            self._infer_shapes(context)
        return reshaped

    def _infer_shapes(self, context: _Context) -> None:
        try:
            unknown = context.inner.infer_shapes()
        except RuntimeError as error:
            raise self._failure(f"cannot take these shapes ({error})") from None
        if unknown:
            raise self._failure(f"does not know the shape of {', '.join(unknown)}")

    def _enqueue(self, context: _Context) -> None:
        if not context.inner.execute_async_v3(self.memory.stream):
            raise self._failure("failed")

    def _failure(self, what: str) -> EngineError:
        return EngineError(f"{self.graph.name} {what}{self._tensorrt.reason()}")
