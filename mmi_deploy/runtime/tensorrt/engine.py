"""A TensorRT engine behind the `Engine` interface: reads and writes the GPU where buffers lie.

Arrays that are given for inputs pass through places of the engine's own, which stay where they are:
so a run that differs from the last one only in them is launched from its recording (cuda_graph.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.runtime.buffers import HOST, Array, Buffer
from mmi_deploy.runtime.engine import MAX_SHAPES, Buffers, Engine
from mmi_deploy.runtime.tensorrt.cuda_graph import CudaGraphs
from mmi_deploy.runtime.tensorrt.device_memory import ALIGNMENT, DeviceMemory
from mmi_deploy.runtime.tensorrt.module import TensorRt
from mmi_deploy.spec.graphs import Graph

_DTYPE_NAMES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int32": "INT32",
    "int64": "INT64",
}
"""TensorRT's names of the contract's types."""

GROUPS = {
    "encoder": ("vision_encoder", "image_values"),
    "llm": ("llm",),
    "condition": ("image_condition",),
    "denoise": ("denoise_step", "denoise_shallow"),
    "vae": ("vae_decoder",),
}
"""Engines that are needed together, as `--resident` calls them."""

_COMPARED = 1024
"""Bytes up to which an input is not copied again when it is the same as in the last run."""

Shape = tuple[int, ...]


class Workspace:
    """The memory in which engines compute. All share one block, of the greatest need: they run one
    after another, on one stream."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._block: Buffer | None = None

    @property
    def size(self) -> int:
        return self._block.bytes if self._block else 0

    @property
    def pointer(self) -> int:
        return self._block.pointer if self._block else 0

    def reserve(self, size: int) -> None:
        """Make it at least so large; where it was smaller, it lies elsewhere afterwards."""
        size = max(size, ALIGNMENT)  # an engine that needs none wants an address all the same
        if size > self.size:
            self._memory.wait()
            before, self._block = self.size, None  # gone before the larger one comes
            try:
                self._block = self._memory.allocate((size,), np.uint8)
            except EngineError:
                if before:  # the engines that are there run on
                    self._block = self._memory.allocate((before,), np.uint8)
                raise


@dataclass(frozen=True, eq=False)
class _Profile:
    """The shapes of dynamic inputs that a profile of the engine takes: least and greatest."""

    index: int
    shapes: Mapping[str, tuple[Shape, Shape]]

    def misfit(self, given: Mapping[str, Buffer]) -> str | None:
        """An input whose shape it does not take."""
        for name, (least, greatest) in self.shapes.items():
            shape = given[name].shape
            if any(not a <= s <= b for a, s, b in zip(least, shape, greatest, strict=True)):
                return name
        return None

    @property
    def width(self) -> int:
        return sum(prod(greatest) for _, greatest in self.shapes.values())


class Residency:
    """Which engines stay on the GPU. Of the others there is one group at a time: to make room for
    the next one, it is taken off."""

    def __init__(self, staying: Collection[str] | None = None) -> None:
        """staying: names of `GROUPS`; None lets every engine stay."""
        if unknown := sorted(set(staying or ()) - set(GROUPS)):
            raise ConfigError(
                f"no engines are called {unknown[0]!r}",
                expected=", ".join(GROUPS),
                fix="give --resident names of these, with commas between them",
            )
        self._staying = None if staying is None else frozenset(staying)
        self._guests: list[TensorRtEngine] = []

    def is_resident(self, graph: str) -> bool:
        return self._staying is None or group_of(graph) in self._staying

    def make_room(self, engine: TensorRtEngine) -> None:
        """Called before `engine` is loaded."""
        if self.is_resident(engine.graph.name):
            return
        group = group_of(engine.graph.name)
        for guest in self._guests:
            if group_of(guest.graph.name) != group:
                guest.close()
        alike = [one for one in self._guests if group_of(one.graph.name) == group]
        self._guests = [*alike, engine]


def group_of(graph: str) -> str:
    """The group that `graph` belongs to: they are needed together."""
    return next(group for group, graphs in GROUPS.items() if graph in graphs)


@dataclass
class _Context:
    """TensorRT's context for one profile, and what it has been told."""

    inner: Any
    cache: Any
    graphs: CudaGraphs
    workspace: int = 0
    bound: dict[str, tuple[int, Shape, bytes]] = field(default_factory=dict)


@dataclass
class _Staging:
    """Where an input or output that cannot stay where it is lies while the engine runs."""

    buffer: Buffer
    contents: bytes | None = None  # of a small input, as it was last written


class TensorRtEngine(Engine):
    """One graph on a GPU. The profile is the narrowest one that takes the request."""

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
        """Load `path`; `fix` is the command that builds it. record: launch repeated runs as CUDA
        graphs. Raises `EngineError` when it cannot be loaded or is not `graph`."""
        super().__init__(graph, memory)
        self._lock = memory.lock
        self._path, self._tensorrt, self._workspace, self._fix = path, tensorrt, workspace, fix
        self._residency = residency or Residency()
        self._cache_name = cache_name or path.stem
        self._record = record
        self._engine: Any = None
        self._on_host: set[str] = set()
        self._profiles: list[_Profile] = []
        self._staging: dict[str, _Staging] = {}
        self._chosen: dict[tuple[Shape, ...], int] = {}
        self._contexts: dict[int, _Context] = {}
        self.launches: int = 0
        self.open()

    def open(self) -> None:
        """Load the engine, unless it is on the GPU."""
        with self.memory.lock:
            if self._engine is not None:
                return
            self._residency.make_room(self)
            self._engine = self._tensorrt.load(self._path, self._fix)
            try:
                self._read_engine()
            except BaseException:
                self._engine = None  # it does not stay on the GPU
                raise

    def _read_engine(self) -> None:
        """Read what the engine says of itself, and provide what it needs."""
        self._check(self._path)
        host = self._tensorrt.module.TensorLocation.HOST
        location = self._engine.get_tensor_location
        need = self._engine.get_device_memory_size_for_profile_v2
        count = self._engine.num_optimization_profiles
        self._on_host = {t.name for t in self.graph.inputs if location(t.name) == host}
        self._profiles = [self._profile(index) for index in range(count)]
        self._workspace.reserve(max(need(index) for index in range(count)))

    def close(self) -> None:
        """Take the engine off the GPU, once what runs is done. It comes back when it is run."""
        with self.memory.lock:
            self.memory.wait()
            for context in self._contexts.values():
                context.graphs.clear()
                self._tensorrt.save(context.cache, self._cache_name)
            self._contexts.clear()  # before the engine that they belong to
            self._staging.clear()
            self._engine = None

    def run(
        self, inputs: Buffers, outputs: Mapping[str, Buffer] | None = None
    ) -> dict[str, Buffer]:
        with self.memory.lock:
            self.open()
            return super().run(inputs, outputs)

    def _check(self, path: Path) -> None:
        """Raise `EngineError` unless the engine's inputs and outputs are those of the contract."""
        module, engine = self._tensorrt.module, self._engine
        fix = f"build it again with `{self._fix}`"
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        tensors = {tensor.name: tensor for tensor in (*self.graph.inputs, *self.graph.outputs)}
        if wrong := sorted(set(tensors) ^ names):
            raise EngineError(
                f"{path} is no {self.graph.name}: it differs in {', '.join(wrong)}", fix=fix
            )
        for name, tensor in tensors.items():
            shape, kind = tuple(engine.get_tensor_shape(name)), engine.get_tensor_dtype(name)
            same = len(shape) == len(tensor.shape) and all(
                ours == theirs or isinstance(ours, str)
                for ours, theirs in zip(tensor.shape, shape, strict=True)
            )
            if not same or kind != getattr(module.DataType, _DTYPE_NAMES[tensor.dtype]):
                raise EngineError(
                    f"{path} is no {self.graph.name}: {name} differs",
                    expected=f"{tensor.dtype} {tensor.shape}",
                    got=f"{kind.name} {shape}",
                    fix=fix,
                )
        for new, old in self.graph.in_place.items():
            if engine.get_aliased_input_tensor(new) not in (None, "", old):
                raise EngineError(f"{path} does not write {new} where {old} lies", fix=fix)

    def _profile(self, index: int) -> _Profile:
        shapes = {}
        for tensor in self.graph.inputs:
            if any(isinstance(side, str) for side in tensor.shape):
                least, _, greatest = self._engine.get_tensor_profile_shape(tensor.name, index)
                shapes[tensor.name] = (tuple(least), tuple(greatest))
        return _Profile(index, shapes)

    def _to_buffer(self, name: str, array: Array) -> Buffer:
        """In a place that stays; what is there already is not copied again."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        if name in self._on_host:
            return HOST.from_array(array)
        place, buffer = self._stage(name, array.shape, array.dtype)
        contents = array.tobytes() if array.nbytes <= _COMPARED else None
        if contents is None or contents != place.contents:
            buffer.write(array)
        place.contents = None if name in self.graph.in_place.values() else contents
        return buffer

    def _stage(self, name: str, shape: Shape, dtype: np.dtype[Any]) -> tuple[_Staging, Buffer]:
        """The place of a tensor, made anew where it is too small, and as a buffer."""
        size = prod(shape) * dtype.itemsize
        place = self._staging.get(name)
        if place is None or place.buffer.bytes < size:
            whole = max(ALIGNMENT, 1 << (size - 1).bit_length()) if size else ALIGNMENT
            place = self._staging[name] = _Staging(self.memory.allocate((whole,), np.uint8))
        inner = place.buffer
        return place, Buffer(self.memory, inner.pointer, shape, dtype, inner.owner)

    def _execute(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        read = {name: self._readable(name, buffer) for name, buffer in inputs.items()}
        written = {}
        for name, buffer in outputs.items():
            if name in self.graph.in_place:
                written[name] = read[self.graph.in_place[name]]
            elif buffer.pointer % ALIGNMENT:
                written[name] = self._stage(name, buffer.shape, buffer.dtype)[1]
            else:
                written[name] = buffer
        self._run(read, written)
        for name, buffer in outputs.items():
            if written[name].pointer != buffer.pointer:
                self.memory.copy(written[name], buffer)

    def _readable(self, name: str, buffer: Buffer) -> Buffer:
        """Where TensorRT can read it: in this memory or, for a shape, in the host's; aligned."""
        if name in self._on_host:
            block, kept = self._stage_on_host(name, buffer)
            kept[...] = buffer.read()
            return block
        if buffer.memory is not self.memory:
            return self._to_buffer(name, buffer.read())
        if buffer.pointer % ALIGNMENT == 0:
            return buffer
        place, aligned = self._stage(name, buffer.shape, buffer.dtype)
        place.contents = None
        self.memory.copy(buffer, aligned)
        return aligned

    def _stage_on_host(self, name: str, buffer: Buffer) -> tuple[Buffer, Array]:
        """An aligned place on the host that stays."""
        place = self._staging.get(name)
        if place is None or place.buffer.bytes < buffer.bytes:
            room = HOST.allocate((buffer.bytes + ALIGNMENT,), np.uint8)
            place = self._staging[name] = _Staging(room.rows(-room.pointer % ALIGNMENT, room.bytes))
        inner = place.buffer
        block = Buffer(HOST, inner.pointer, buffer.shape, buffer.dtype, inner.owner)
        return block, block.read()

    def _run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        context = self._context(self._profile_of(inputs))
        tensors = {**inputs, **outputs}
        key = (
            self._workspace.pointer,
            tuple((buffer.pointer, buffer.shape) for buffer in tensors.values()),
            tuple(inputs[name].read().tobytes() for name in sorted(self._on_host)),
        )
        if context.graphs.launch(key):
            self.launches += 1
            return
        reshaped = self._bind(context, inputs, outputs)
        if reshaped:
            # TensorRT may now hold other numbers where a recorded run reads its sizes.
            context.graphs.clear()
        stream = self.memory.stream
        ready = self._record and not reshaped and self._tensorrt.may_record(context.inner, stream)
        launched = context.graphs.enqueue(key, partial(self._enqueue, context), ready)
        self.launches += launched
        self.refusal = context.graphs.refusal or self.refusal

    def _profile_of(self, inputs: Mapping[str, Buffer]) -> int:
        key = tuple(buffer.shape for buffer in inputs.values())
        if key not in self._chosen:
            misfits = {profile: profile.misfit(inputs) for profile in self._profiles}
            fitting = [profile for profile, misfit in misfits.items() if misfit is None]
            if not fitting:
                profile = max(misfits, key=lambda profile: profile.width)
                name = misfits[profile]
                assert name is not None
                least, greatest = profile.shapes[name]
                raise EngineError(
                    f"{self.graph.name} was not built for this: {name} does not fit",
                    expected=f"{least} to {greatest}",
                    got=inputs[name].shape,
                    fix=f"build it for more with `{self._fix}`",
                )
            if len(self._chosen) == MAX_SHAPES:
                self._chosen.clear()
            self._chosen[key] = min(fitting, key=lambda profile: profile.width).index
        return self._chosen[key]

    def _context(self, profile: int) -> _Context:
        """The context of a profile: made once, and given the scratch memory as it is now."""
        if profile not in self._contexts:
            inner, cache = self._tensorrt.context(self._engine, self._cache_name)
            if profile and not inner.set_optimization_profile_async(profile, self.memory.stream):
                raise self._failure(f"cannot take its profile {profile}")
            graphs = CudaGraphs(self.memory)
            self._contexts[profile] = _Context(inner, cache, graphs)
        context = self._contexts[profile]
        if context.scratch != self._workspace.pointer:
            context.inner.set_device_memory(self._workspace.pointer, self._workspace.size)
            context.scratch = self._workspace.pointer
        return context

    def _bind(
        self, context: _Context, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> bool:
        """Tell the context what differs from the last run; whether that was a shape."""
        self._tensorrt.errors.clear()
        reshaped = False
        for name, buffer in {**inputs, **outputs}.items():
            value = buffer.read().tobytes() if name in self._on_host else b""
            told = (buffer.pointer, buffer.shape, value)
            before = context.bound.get(name)
            if before == told:
                continue
            if name in inputs and (before is None or before[1:] != told[1:]):
                reshaped = True
                if not context.inner.set_input_shape(name, buffer.shape):
                    raise self._failure(f"refuses {name} of shape {buffer.shape}")
            if not context.inner.set_tensor_address(name, buffer.pointer):
                raise self._failure(f"refuses the address of {name}")
            context.bound[name] = told
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
