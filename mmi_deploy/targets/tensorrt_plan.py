"""What a build would do, before it does it: one part per graph and target, with the key of its
engine, its profiles, and what memory and disk it takes. Refuses what cannot be done."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.bundle.manifest import hash_of_files
from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.spec.backends import BACKENDS
from mmi_deploy.spec.graphs import Graph, Limits
from mmi_deploy.spec.target import Target
from mmi_deploy.system.files import size
from mmi_deploy.system.memory import free_memory
from mmi_deploy.targets.cache import EngineCache, key_of
from mmi_deploy.targets.calibration import Evidence, islands_key
from mmi_deploy.targets.precision import Ranges, Recipe
from mmi_deploy.targets.precision.recipes import BITS, quantised_bytes
from mmi_deploy.targets.profiles import Profile, profiles
from mmi_deploy.targets.tensorrt_build import Plugin

# Memory of a build over the bytes of its weights, beyond `MEMORY_BASE`: TensorRT copies them once,
# and those of convolutions twice.
MEMORY_FACTOR = 2.0

# The same for the language model, which has no convolutions.
LLM_FACTOR = 1.5

# Bytes that TensorRT takes for a graph without weights: its libraries and its compiler.
MEMORY_BASE = 700 * 10**6

# Bytes of an engine beyond its weights, about: compiled kernels, which depend on the layers.
KERNELS = 20 * 10**6

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


@dataclass(frozen=True)
class Request:
    """What to build: targets of one runtime and precision, graphs by name, and the limits to which
    their profiles are narrowed (None: the bundle's). ranges: graph -> what the range check saw,
    also of other graphs whose engines may be kept. evidence: what proves the rewritten graphs, None
    to build without."""

    bundle: Bundle
    targets: tuple[Target, ...]
    recipe: Recipe
    graphs: tuple[str, ...]
    plugin: Plugin
    tensorrt: str
    limits: Limits | None = None
    ranges: Mapping[str, Ranges | None] | None = None
    evidence: Evidence | None = None
    force: bool = False


@dataclass(frozen=True)
class Part:
    """One engine. parts: of its cache key. weights: bytes in the target's types. memory, disk: what
    a build takes, in bytes: about, rather more."""

    target: Target
    graph: str
    profiles: tuple[Profile, ...]
    parts: dict[str, str]
    weights: int

    @property
    def key(self) -> str:
        return key_of(self.parts)

    @property
    def memory(self) -> int:
        factor = LLM_FACTOR if self.graph == "llm" else MEMORY_FACTOR
        return MEMORY_BASE + int(factor * self.weights)

    @property
    def disk(self) -> int:
        """The rewritten weights and the engine, which the cache and the target share."""
        return 2 * self.weights + KERNELS


def parts_of(request: Request) -> list[Part]:
    """The parts of `request`, graph by graph. Raises `ConfigError` for graphs or limits that the
    bundle does not have."""
    if request.limits is not None:
        check_limits(request.bundle, request.limits)
    parts = []
    for name in request.graphs:
        graph = graph_of(request.bundle, name)
        weights = weights_of(request.bundle, request.recipe, name)
        shapes = profiles(graph, request.limits)
        for target in request.targets:
            keyed = key_parts(request, target, graph, shapes)
            parts.append(Part(target, name, shapes, keyed, weights))
    return parts


def graph_of(bundle: Bundle, name: str) -> Graph:
    """The contract of one graph; raises `ConfigError` that lists those there are."""
    if name not in bundle.graphs:
        raise ConfigError(f"there is no graph {name!r}", expected=", ".join(bundle.graphs))
    return bundle.graphs[name]


def key_parts(
    request: Request, target: Target, graph: Graph, shapes: Sequence[Profile]
) -> dict[str, str]:
    """All that an engine depends on, by name."""
    files = request.bundle.manifest.graph_files(graph.name)
    ranges = (request.ranges or {}).get(graph.name)
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
        "proved": "yes" if request.evidence else "no",
        "plugin": request.plugin.identity,
        "profiles": json.dumps({shape.name: shape.record() for shape in shapes}),
        "flags": ",".join(BACKENDS[target.runtime].builder_flags),
        "builder": builder_digest(),
    }


def builder_digest() -> str:
    """Hash of the sources that rewrite and build: other code may make other engines."""
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
    """Bytes of a graph's weights in the target's types, scales included, from its file without
    them: about, for what a recipe keeps in float32 is small. Tables that are looked up are in the
    type of activations."""
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
    """Bytes of the weights of an ONNX file, wherever they lie."""
    model = onnx.load(graph_file, load_external_data=False)
    total = 0
    for tensor in model.graph.initializer:
        packed = tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        total += prod(tensor.dims) * (4 if packed else 8 * dtype.itemsize) // 8
    return total


def check_room(parts: Sequence[Part], bundle: Bundle, cache: EngineCache) -> None:
    """Raise `EngineError` where memory or disk are too small for what is to be built."""
    if not parts:
        return
    largest = max(parts, key=lambda part: part.memory)
    free = free_memory()
    if largest.memory > free:
        raise EngineError(
            f"too little memory to build {largest.graph} for {largest.target.architecture}",
            expected=f"about {size(largest.memory)} free",
            got=size(free),
            fix="Close other programs, add swap, build the smaller graphs here with --graph, "
            "or try all the same with --force",
        )
    needed = max(part.disk for part in parts) + sum(part.weights + KERNELS for part in parts)
    for folder in (bundle.folder, cache.folder):
        there = next(path for path in (folder, *folder.parents) if path.is_dir())
        if (room := shutil.disk_usage(there).free) < needed:
            raise EngineError(
                f"too little room on the disk of {there}",
                expected=f"about {size(needed)} free",
                got=size(room),
                fix="Free some space, or try all the same with --force",
            )


def check_limits(bundle: Bundle, wanted: Limits) -> None:
    """Raise `ConfigError` for limits beyond those that the bundle was exported for."""
    for option, asked, most in (
        ("--max-batch", wanted.batch, bundle.limits.batch),
        ("--max-images", wanted.images, bundle.limits.images),
    ):
        if not 1 <= asked <= most:
            raise ConfigError(
                f"{option} is beyond what the bundle was exported for",
                expected=f"1 to {most}",
                got=asked,
                fix=f"Give {option} {most}, or export the bundle for more",
            )
