"""Plan a TensorRT build: one engine per graph and target, with cache key, profiles, memory and
disk.

Invalid requests are refused here, before anything is built.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import onnx

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.bundle.manifest import hash_of_files
from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.runtime.buffers import element_type
from mmi_deploy.spec.backends import BACKENDS
from mmi_deploy.spec.graphs import Graph, Limits
from mmi_deploy.spec.target import Target
from mmi_deploy.system.files import size
from mmi_deploy.system.memory import free_memory
from mmi_deploy.system.nvidia_driver import nvidia_driver
from mmi_deploy.targets.cache import EngineCache, key_of
from mmi_deploy.targets.calibration import Calibration, islands_key, moments_key
from mmi_deploy.targets.precision import Moments, Ranges, Recipe
from mmi_deploy.targets.precision.recipes import BITS, quantised_bytes
from mmi_deploy.targets.profiles import Profile, profiles
from mmi_deploy.targets.tensorrt_build import Plugin

# Peak memory of a build as a multiple of its weights, on top of `MEMORY_BASE`. TensorRT copies the
# weights once, those of convolutions twice.
MEMORY_FACTOR = 2.0

# `MEMORY_FACTOR` of the language model, which has no convolutions.
LLM_FACTOR = 1.5

# Bytes that TensorRT takes for a graph without weights: libraries and compiler.
MEMORY_BASE = 700 * 10**6

# Bytes of the GPU that CUDA and TensorRT's kernel libraries take before a graph is there. An
# assumption, as no build has run on a GPU yet.
DEVICE_BASE = 600 * 10**6

# Approximate bytes of an engine beyond its weights: compiled kernels, which depend on the layers.
KERNEL_BYTES = 20 * 10**6

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


@dataclass(frozen=True)
class Request:
    """A build request: targets of one runtime and precision, and graphs by name.

    limits: narrow the profiles to these, None for the bundle's. ranges: activation ranges by graph,
    also of graphs whose engines may be kept; moments: likewise. calibration: data to compare
    rewritten graphs on, None to build without a comparison. device: index of the GPU to build on.
    own_products: whether our plugin multiplies with quantised weights, else TensorRT's kernels.
    """

    bundle: Bundle
    targets: tuple[Target, ...]
    recipe: Recipe
    graphs: tuple[str, ...]
    plugin: Plugin
    tensorrt: str
    limits: Limits | None = None
    ranges: Mapping[str, Ranges | None] | None = None
    calibration: Calibration | None = None
    force: bool = False
    device: int = 0
    own_products: bool = False
    moments: Mapping[str, Moments | None] | None = None


@dataclass(frozen=True)
class EnginePlan:
    """One engine to build. weights: bytes in the target's types. bound: bytes of its inputs and
    outputs at the largest shapes. memory, disk, device_memory: estimates of what the build takes,
    in bytes."""

    target: Target
    graph: str
    profiles: tuple[Profile, ...]
    key_parts: dict[str, str]
    weights: int
    bound: int = 0

    @property
    def key(self) -> str:
        return key_of(self.key_parts)

    @property
    def memory(self) -> int:
        factor = LLM_FACTOR if self.graph == "llm" else MEMORY_FACTOR
        return MEMORY_BASE + int(factor * self.weights)

    @property
    def device_memory(self) -> int:
        """Memory of the GPU that measures kernels: weights, inputs and outputs of the layers, which
        are at worst those of the whole graph. 0 for a runtime that builds without a GPU."""
        if BACKENDS[self.target.runtime].cross_compiles:
            return 0
        return DEVICE_BASE + self.weights + self.bound

    @property
    def disk(self) -> int:
        """The rewritten weights, packed once more for our products, and the engine; the cache and
        the target share one file."""
        copies = 3 if self.key_parts["products"] == "plugin" else 2
        return copies * self.weights + KERNEL_BYTES


def plan_engines(request: Request) -> list[EnginePlan]:
    """Plan every engine of `request`, graph by graph. Raises `ConfigError` for graphs or limits
    that the bundle does not have."""
    if request.limits is not None:
        check_limits(request.bundle, request.limits)
    plans = []
    for name in request.graphs:
        graph = graph_of(request.bundle, name)
        weights = weights_of(request.bundle, request.recipe, name)
        shapes = profiles(graph, limits_of(request, name))
        for target in request.targets:
            typed = graph.typed(request.recipe.activations_on(target.runtime))
            keyed = key_parts(request, target, graph, shapes)
            bound = _bound_bytes(typed, shapes)
            plans.append(EnginePlan(target, name, shapes, keyed, weights, bound))
    return plans


def limits_of(request: Request, graph: str) -> Limits:
    """Limits of the engine of `graph`: those of the request, and at least the rows that TensorRT's
    kernels take with its recipe; our plugin takes any number. Raises `ConfigError` where the bundle
    was exported for fewer."""
    limits, exported = request.limits or request.bundle.limits, request.bundle.limits.batch
    theirs = graph in request.recipe.weights and not request.own_products
    least = request.recipe.min_batch if theirs else 1
    if exported < least:
        raise ConfigError(
            f"precision {request.recipe.name} cannot be built for {exported} row: TensorRT would "
            "write its weights dequantised at every token, which is slower than fp16",
            expected=f"at least {least}",
            fix="Leave out --products tensorrt, export the bundle again with "
            f"--rows {least}, or choose --precision fp16",
        )
    return replace(limits, batch=max(limits.batch, least))


def graph_of(bundle: Bundle, name: str) -> Graph:
    """Contract of the graph called `name`. Raises `ConfigError` that lists the graphs."""
    if name not in bundle.graphs:
        raise ConfigError(f"there is no graph {name!r}", expected=", ".join(bundle.graphs))
    return bundle.graphs[name]


def key_parts(
    request: Request, target: Target, graph: Graph, shapes: Sequence[Profile]
) -> dict[str, str]:
    """Everything that an engine depends on, by name; hashed into its cache key."""
    files = request.bundle.manifest.graph_files(graph.name)
    ranges = (request.ranges or {}).get(graph.name)
    own = request.own_products and graph.name in request.recipe.weights
    return {
        "graph": graph.name,
        "source": hash_of_files(files),
        "contract": _digest(repr((graph.inputs, graph.outputs))),
        "runtime": target.runtime,
        "tensorrt": request.tensorrt,
        "architecture": target.architecture or "",
        "precision": target.precision,
        "recipe": _digest(repr(request.recipe)),
        "islands": islands_key(ranges, request.recipe),
        "moments": moments_key((request.moments or {}).get(graph.name)),
        "proved": "yes" if request.calibration else "no",
        "plugin": request.plugin.identity,
        "products": "plugin" if own else "tensorrt",
        "profiles": json.dumps({shape.name: shape.record() for shape in shapes}),
        "flags": ",".join(BACKENDS[target.runtime].builder_flags),
        "builder": builder_digest(),
    }


def builder_digest() -> str:
    """Hash of the source files that rewrite and build, since a code change may change engines."""
    folder = Path(__file__).parent
    sources = [
        folder / "tensorrt_build.py",
        folder / "tensorrt_rewrites.py",
        *sorted(folder.glob("precision/*.py")),
    ]
    return _digest("".join(f"{path.relative_to(folder)}\0{path.read_text()}" for path in sources))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_of(bundle: Bundle, recipe: Recipe, name: str) -> int:
    """Approximate bytes of a graph's weights in the target's types, scales included.

    The weights are not read. The few that a recipe keeps in float32 are counted in the type of
    activations, as are embedding tables (inputs of Gather).
    """
    graph = onnx.load(bundle.graph_file(name), load_external_data=False).graph
    bits, schemes = BITS[recipe.activations], recipe.weights.get(name)
    tables = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    total = 0
    for tensor in graph.initializer:
        if tensor.data_type not in _FLOATS:
            continue
        elements, multiplied = (
            prod(tensor.dims),
            len(tensor.dims) == 2 and tensor.name not in tables,
        )
        scheme = schemes.of(tensor.name, elements) if schemes and multiplied else None
        if scheme is None:
            total += elements * bits // 8
        else:
            total += quantised_bytes((tensor.dims[0], tensor.dims[1]), scheme, bits)
    return total


def weight_bytes(graph_file: Path) -> int:
    """Bytes of the weights of an ONNX file, inline and external."""
    model = onnx.load(graph_file, load_external_data=False)
    total = 0
    for tensor in model.graph.initializer:
        packed = tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        total += prod(tensor.dims) * (4 if packed else 8 * dtype.itemsize) // 8
    return total


def check_resources(plans: Sequence[EnginePlan], bundle: Bundle, cache: EngineCache) -> None:
    """Raise `EngineError` where memory or disk space is too small for the build."""
    if not plans:
        return
    largest = max(plans, key=lambda plan: plan.memory)
    free = free_memory()
    if largest.memory > free:
        raise EngineError(
            f"too little memory to build {largest.graph} for {largest.target.architecture}",
            expected=f"about {size(largest.memory)} free",
            got=size(free),
            fix="Close other programs, add swap, build the smaller graphs here with --graph, "
            "or try all the same with --force",
        )
    needed = max(plan.disk for plan in plans) + sum(plan.weights + KERNEL_BYTES for plan in plans)
    for folder in (bundle.folder, cache.folder):
        there = next(path for path in (folder, *folder.parents) if path.is_dir())
        if (room := shutil.disk_usage(there).free) < needed:
            raise EngineError(
                f"too little space on the disk of {there}",
                expected=f"about {size(needed)} free",
                got=size(room),
                fix="Free some space, or try all the same with --force",
            )


def _bound_bytes(graph: Graph, shapes: Sequence[Profile]) -> int:
    """Bytes of a graph's inputs, and of its outputs that are not in place, at the largest shapes of
    its profiles."""
    sizes = {letter: allowed.max for letter, allowed in graph.ranges.items()}
    found = [0]
    for profile in shapes:
        most = sizes | {letter: allowed.max for letter, allowed in profile.ranges.items()}
        tensors = (*graph.inputs, *(t for t in graph.outputs if t.name not in graph.in_place))
        found.append(sum(prod(t.resolve(**most)) * element_type(t.dtype).itemsize for t in tensors))
    return max(found)


def check_device(plans: Sequence[EnginePlan], device: int) -> None:
    """Raise `EngineError` where GPU `device` has too little free memory to build on. Nothing is
    checked where its memory cannot be read."""
    largest = max(plans, key=lambda plan: plan.device_memory, default=None)
    driver = nvidia_driver()
    if largest is None or not largest.device_memory or driver is None:
        return
    found = driver.memory(device)
    if found is None or largest.device_memory <= found[0]:
        return
    free, total = found
    cause = (
        f"other programs hold {size(total - free)} of it: stop them (nvidia-smi lists them), or "
        "choose another GPU with --device"
        if largest.device_memory <= total
        else "build the smaller graphs here with --graph"
    )
    raise EngineError(
        f"GPU {device} has too little free memory to build {largest.graph}",
        expected=f"about {size(largest.device_memory)}",
        got=f"{size(free)} of {size(total)}",
        fix=f"{cause[0].upper()}{cause[1:]}, or try all the same with --force",
    )


def check_limits(bundle: Bundle, wanted: Limits) -> None:
    """Raise `ConfigError` for limits beyond those that the bundle was exported for."""
    for option, asked, most in (
        ("--rows", wanted.batch, bundle.limits.batch),
        ("--max-images", wanted.images, bundle.limits.images),
    ):
        if not 1 <= asked <= most:
            raise ConfigError(
                f"{option} is beyond what the bundle was exported for",
                expected=f"1 to {most}",
                got=asked,
                fix=f"Give {option} {most}, or export the bundle for more",
            )
