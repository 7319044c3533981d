"""Sample inputs of graphs: recorded from a real run, and random ones at other sizes.

Letters as in `graphs.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.documents.document import Document, Draw, Image, Text, document_of, encode_document
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import DocumentError
from mmi_deploy.runtime.backend import HostBackend
from mmi_deploy.runtime.buffers import Buffer, element_type
from mmi_deploy.runtime.generation import generate
from mmi_deploy.runtime.onnxruntime.engine import OnnxOptions, OnnxRuntimeEngine
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.graphs import Graph, Limits, Tensor, graphs

Arrays = dict[str, NDArray[Any]]

# Tokens that are generated after the recorded document.
RECORDED_TOKENS = 24


@dataclass(frozen=True)
class Sample:
    """Inputs of a graph by name. recorded: False for random inputs."""

    inputs: Arrays
    recorded: bool


# Images that a row attends to in random inputs: none, one, several.
_IMAGES = (0, 1, 4)

# Tokens per row in random inputs: decode and prefill.
_TOKENS = (1, 17)


def record(bundle: Bundle) -> dict[str, list[Arrays]]:
    """Record the inputs of every graph while the portable graphs continue a synthetic document.

    The document has two pictures, words of the tokenizer and a picture to draw. Runs 1, 2, 4, 8 ...
    of a graph are kept: the first ones, with nearly empty caches, and a few late ones.
    """
    kept: dict[str, list[Arrays]] = {name: [] for name in bundle.graphs}

    def load(graph: Graph) -> _Recorder:
        return _Recorder(bundle.graph_file(graph.name), graph, kept[graph.name])

    tokenizer = Tokenizer.open(bundle.tokenizer, bundle.config.tokens)
    backend = HostBackend(bundle.graphs, bundle.limits, load)
    runtime = Runtime(bundle.config, tokenizer, backend, bundle.schedule)
    # full_every=2: every second step is shallow, so both denoising graphs are recorded.
    options = GenerationOptions(max_tokens=RECORDED_TOKENS, max_images=0, full_every=2)
    for _ in generate(runtime, _made_up(bundle, tokenizer), options):
        pass
    return kept


class _Recorder(OnnxRuntimeEngine):
    """ONNX Runtime engine that records its inputs at runs 1, 2, 4, 8 ..."""

    def __init__(self, path: Path, graph: Graph, kept: list[Arrays]) -> None:
        super().__init__(path, graph, OnnxOptions(threads=1))
        self._kept, self._runs = kept, 0

    def _execute(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        self._runs += 1
        if self._runs & (self._runs - 1) == 0:  # a power of two
            self._kept.append({name: buffer.read().copy() for name, buffer in inputs.items()})
        super()._execute(inputs, outputs)


def _made_up(bundle: Bundle, tokenizer: Tokenizer) -> Document:
    """Synthetic document: two pictures with some words each, and one picture to draw."""
    draw, config = np.random.default_rng(0), bundle.config
    side = config.vision.image_size
    parts: list[Image | Text | Draw] = []
    for _ in range(2):
        rgb = np.empty((side, side, 3), np.uint8)
        rgb[:] = draw.integers(0, 256, 3)
        top, left = draw.integers(0, side // 2, 2)
        rgb[top : top + side // 3, left : left + side // 3] = draw.integers(0, 256, 3)
        ids = draw.integers(0, config.llama.vocab, 12).tolist()
        parts += [Image(rgb), *_known_words(tokenizer, ids)]
    document = document_of(*parts, Draw())
    try:
        encode_document(document, tokenizer, config, bundle.limits.context)
    except DocumentError:  # the context is too short for three pictures
        return document_of(Draw())
    return document


def _known_words(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Text]:
    text = tokenizer.decode(list(ids)).strip()
    try:
        tokenizer.encode(text)
    except DocumentError:
        return []
    return [Text(text)] if text else []


def random_inputs(graph: Graph, like: Sequence[Arrays], draw: np.random.Generator) -> list[Arrays]:
    """Random inputs of `graph` at batch size 1 and 2, with no, one and several images.

    Indices are uniform. Floats are rows drawn from the recorded inputs `like`, since errors on
    inputs that never occur, such as noise in the KV cache, say little. Without any, floats are
    standard normal.
    """
    return list(each_random_input(graph, like, draw))


def each_random_input(
    graph: Graph, like: Sequence[Arrays], draw: np.random.Generator
) -> Iterator[Arrays]:
    """Yield `random_inputs` one after another: those of a large model do not fit in memory
    together."""
    return (inputs_at(graph, sizes, draw, like, images) for sizes, images in _sizes(graph))


def _sizes(graph: Graph) -> list[tuple[dict[str, int], int]]:
    """Sizes of the dynamic dimensions, with the number of visible images."""
    found: list[tuple[dict[str, int], int]] = []
    images = _IMAGES if "m" in graph.ranges else _IMAGES[:1]
    tokens = _TOKENS if "t" in graph.ranges else _TOKENS[:1]
    for batch in (1, 2):
        for count in images:
            for t in tokens:
                wanted = {"b": batch, "n": batch, "t": t, "w": 1, "v": 8, "x": 9, "steps": 4}
                if "m" in graph.ranges:
                    wanted |= {"m": max(count, 1), "n": max(count, 1)}
                sizes = {
                    letter: min(max(wanted.get(letter, of.opt), of.min), of.max)
                    for letter, of in graph.ranges.items()
                }
                if (sizes, count) not in found:
                    found.append((sizes, count))
    return found


def inputs_at(
    graph: Graph,
    sizes: Mapping[str, int],
    draw: np.random.Generator,
    like: Sequence[Arrays] = (),
    images: int = 1,
) -> Arrays:
    """Random inputs of `graph` at `sizes` of its dynamic dimensions, drawn as in `random_inputs`.
    images: 0 hides all images."""
    inputs: Arrays = {}
    for tensor in graph.inputs:
        shape = tensor.resolve(**sizes)
        if tensor.below is None:
            drawn = _drawn(tensor, shape, like, draw)
            inputs[tensor.name] = drawn.astype(element_type(tensor.dtype), copy=False)
            continue
        below = _below(graph, tensor, sizes)
        inputs[tensor.name] = np.asarray(draw.integers(tensor.min, below, shape), tensor.dtype)
        if tensor.name == "image_position" and not images:
            inputs[tensor.name][...] = 0
    return inputs


def _below(graph: Graph, tensor: Tensor, sizes: Mapping[str, int]) -> int:
    """Exclusive upper bound of an index input. Rows written at `write_index` must fit the cache."""
    assert tensor.below is not None, f"{graph.name}: {tensor.name} has no bound"
    below = sizes[tensor.below] if isinstance(tensor.below, str) else tensor.below
    if tensor.name == "write_index":
        return below - sizes["t"] + 1
    if tensor.name == "start":
        return 1
    if tensor.name == "context_length":
        return sizes["x"] + 1
    return below


def _drawn(
    tensor: Tensor, shape: Sequence[int], like: Sequence[Arrays], draw: np.random.Generator
) -> NDArray[np.float32]:
    """Rows of a recorded tensor, drawn with replacement, in the shape `shape`."""
    found = [inputs[tensor.name] for inputs in like if inputs[tensor.name].size]
    if not found:
        return np.asarray(draw.standard_normal(shape), np.float32)
    values = found[draw.integers(len(found) // 2, len(found))]  # late runs: caches are filled
    for axis, side in enumerate(tensor.shape):
        if isinstance(side, str):
            rows = draw.integers(0, values.shape[axis], shape[axis])
            values = np.take(values, rows, axis)
    return np.ascontiguousarray(values, np.float32).reshape(shape)


def samples_of(bundle: Bundle, limits: Limits | None = None) -> dict[str, list[Sample]]:
    """Recorded, then random inputs of every graph within `limits` (default: the bundle's)."""
    recorded = record(bundle)
    samples = {}
    for name, graph in graphs(bundle.config, limits or bundle.limits).items():
        drawn = random_inputs(graph, recorded[name], np.random.default_rng(0))
        fitting = [inputs for inputs in recorded[name] if fits(graph, inputs)]
        samples[name] = [
            *(Sample(inputs, True) for inputs in fitting),
            *(Sample(inputs, False) for inputs in drawn),
        ]
    return samples


def dynamic_sizes(graph: Graph, inputs: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """Sizes of the dynamic dimensions, read from the shapes of `inputs`."""
    sizes: dict[str, int] = {}
    for tensor in graph.inputs:
        for side, found in zip(tensor.shape, inputs[tensor.name].shape, strict=True):
            if isinstance(side, str) and side.isalpha():
                sizes.setdefault(side, found)
    return sizes


def fits(graph: Graph, inputs: Arrays) -> bool:
    """Test that every dynamic dimension of `inputs` is within the limits of `graph`."""
    sizes = dynamic_sizes(graph, inputs)
    return all(sizes.get(letter, 0) <= of.max for letter, of in graph.ranges.items())
