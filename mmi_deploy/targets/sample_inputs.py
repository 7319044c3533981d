"""What graphs are compared on: inputs recorded from a real run, and random ones at other sizes.

Letters as in `graphs.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from mmi_deploy.runtime.buffers import Buffer
from mmi_deploy.runtime.generation import generate
from mmi_deploy.runtime.onnxruntime.engine import OnnxOptions, OnnxRuntimeEngine
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.graphs import Graph, Limits, Tensor, graphs

Arrays = dict[str, NDArray[Any]]

RECORDED_TOKENS = 24
"""Tokens that are written after the recorded document."""


@dataclass(frozen=True)
class Sample:
    """All inputs of a graph by name, and whether they were recorded or are random."""

    inputs: Arrays
    recorded: bool


_IMAGES = (0, 1, 4)
"""Images that a row looks at in random inputs: none, one, several."""

_TOKENS = (1, 17)
"""Tokens of a run: decode and prefill."""


def record(bundle: Bundle) -> dict[str, list[Arrays]]:
    """Continue a document with the portable graphs: two pictures, words that the tokenizer knows,
    and a picture to draw. Returns inputs by graph.

    Of the runs of a graph those whose number is a power of two are kept: the first ones, where
    little is in the caches, and ever later ones.
    """
    kept: dict[str, list[Arrays]] = {name: [] for name in bundle.graphs}

    def load(graph: Graph) -> _Recorder:
        return _Recorder(bundle.graph_file(graph.name), graph, kept[graph.name])

    tokenizer = Tokenizer.open(bundle.tokenizer, bundle.config.tokens)
    backend = HostBackend(bundle.graphs, bundle.limits, load)
    runtime = Runtime(bundle.config, tokenizer, backend, bundle.schedule)
    # Every second step is a shallow one, so that both kinds are recorded.
    options = GenerationOptions(max_tokens=RECORDED_TOKENS, max_images=0, full_every=2)
    for _ in generate(runtime, _made_up(bundle, tokenizer), options):
        pass
    return kept


class _Recorder(OnnxRuntimeEngine):
    """An engine that keeps copies of some of its inputs."""

    def __init__(self, path: Path, graph: Graph, kept: list[Arrays]) -> None:
        super().__init__(path, graph, OnnxOptions(threads=1))
        self._kept, self._runs = kept, 0

    def _execute(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        self._runs += 1
        if self._runs & (self._runs - 1) == 0:
            self._kept.append({name: buffer.read().copy() for name, buffer in inputs.items()})
        super()._execute(inputs, outputs)


def _made_up(bundle: Bundle, tokenizer: Tokenizer) -> Document:
    """Two pictures with some words each, and one to draw."""
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
    except DocumentError:  # a context for hardly more than one picture
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
    """Random inputs of `graph` at batch 1 and 2 and with no, one and several images.

    Indices are random. Floats are rows drawn from `like`, inputs that were recorded: what no model
    ever sees, such as noise in the cache, tells little about an error. Without any they are normal.
    """
    return [_random(graph, like, sizes, draw, images) for sizes, images in _sizes(graph)]


def _sizes(graph: Graph) -> list[tuple[dict[str, int], int]]:
    """Sizes of the dynamic dimensions, and how many images are visible."""
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


def _random(
    graph: Graph,
    like: Sequence[Arrays],
    sizes: Mapping[str, int],
    draw: np.random.Generator,
    images: int,
) -> Arrays:
    inputs = {}
    for tensor in graph.inputs:
        shape = tensor.resolve(**sizes)
        if tensor.dtype == "float32":
            inputs[tensor.name] = _drawn(tensor, shape, like, draw)
            continue
        below = _below(graph, tensor, sizes)
        inputs[tensor.name] = np.asarray(draw.integers(tensor.min, below, shape), tensor.dtype)
        if tensor.name == "image_position" and not images:
            inputs[tensor.name][...] = 0
    return inputs


def _below(graph: Graph, tensor: Tensor, sizes: Mapping[str, int]) -> int:
    """The bound of an index; what is written must end before the cache does."""
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
    """Rows of a recorded tensor in random order, as many as `shape` asks for."""
    found = [inputs[tensor.name] for inputs in like if inputs[tensor.name].size]
    if not found:
        return np.asarray(draw.standard_normal(shape), np.float32)
    values = found[draw.integers(len(found) // 2, len(found))]  # late ones: caches are filled
    for axis, side in enumerate(tensor.shape):
        if isinstance(side, str):
            rows = draw.integers(0, values.shape[axis], shape[axis])
            values = np.take(values, rows, axis)
    return np.ascontiguousarray(values, np.float32).reshape(shape)


def samples_of(bundle: Bundle, limits: Limits | None = None) -> dict[str, list[Sample]]:
    """Recorded, then random inputs of every graph, within `limits`, the bundle's by default."""
    recorded = record(bundle)
    samples = {}
    for name, graph in graphs(bundle.config, limits or bundle.limits).items():
        drawn = random_inputs(graph, recorded[name], np.random.default_rng(0))
        fitting = [inputs for inputs in recorded[name] if _fits(graph, inputs)]
        samples[name] = [
            *(Sample(inputs, True) for inputs in fitting),
            *(Sample(inputs, False) for inputs in drawn),
        ]
    return samples


def dynamic_sizes(graph: Graph, inputs: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """Sizes of the dynamic dimensions of a set of inputs."""
    sizes: dict[str, int] = {}
    for tensor in graph.inputs:
        for side, found in zip(tensor.shape, inputs[tensor.name].shape, strict=True):
            if isinstance(side, str) and side.isalpha():
                sizes.setdefault(side, found)
    return sizes


def _fits(graph: Graph, inputs: Arrays) -> bool:
    sizes = dynamic_sizes(graph, inputs)
    return all(sizes.get(letter, 0) <= of.max for letter, of in graph.ranges.items())
