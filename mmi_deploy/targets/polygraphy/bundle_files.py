"""The folder `polygraphy` of a bundle: inputs, a data loader script, and profile shapes.

load_data.py     functions that yield the inputs; a copy of `load_data.py` beside this file
NAME.npz         inputs of one graph, or of one profile of `llm`
GRAPH.shapes     options of Polygraphy with the graph's optimisation profiles

Letters: t tokens.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import numpy as np
from numpy.typing import NDArray

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.errors import BundleError
from mmi_deploy.spec.graphs import Graph
from mmi_deploy.system.files import write_file
from mmi_deploy.targets.polygraphy import load_data
from mmi_deploy.targets.polygraphy.load_data import DRAWN, read_inputs
from mmi_deploy.targets.profiles import Profile, choose, profiles
from mmi_deploy.targets.sample_inputs import (
    Arrays,
    Sample,
    dynamic_sizes,
    each_random_input,
    fits,
    inputs_at,
)

FOLDER = "polygraphy"

# Nonzero entries up to which a tensor is stored; larger ones are drawn when they are read.
MAX_STORED = 2**18

# Sizes of the dynamic dimensions of inputs that are not recorded.
_SIZES = {"b": 1, "n": 1, "m": 1, "t": 17, "w": 1, "v": 8, "x": 9, "steps": 4}

_MAX_FLOAT16 = 65504.0


def write_polygraphy(
    folder: Path, graphs: Mapping[str, Graph], recorded: Mapping[str, Sequence[Arrays]]
) -> None:
    """Write the folder `folder`. recorded: inputs of each graph as `record` returns them; indices
    are random, and floats are drawn, for a graph or profile without any."""
    folder.mkdir()
    write_file(folder / "load_data.py", Path(load_data.__file__).read_bytes())
    for graph in graphs.values():
        offered = profiles(graph)
        write_file(folder / f"{graph.name}.shapes", shape_options(offered))
        for profile in offered:
            inputs = _inputs(graph, profile, recorded.get(graph.name, ()))
            name = _name(graph, profile, len(offered))
            write_file(folder / f"{name}.npz", packed(inputs))


def loaders(graph: Graph) -> list[str]:
    """Names of the loader functions for `graph`: one per profile."""
    offered = profiles(graph)
    return [_name(graph, profile, len(offered)) for profile in offered]


def _name(graph: Graph, profile: Profile, count: int) -> str:
    return graph.name if count == 1 else f"{graph.name}_{profile.name}"


def shape_options(offered: Iterable[Profile]) -> str:
    """Polygraphy's options for optimisation profiles, one line for each end of each profile."""
    lines = []
    for profile in offered:
        for index, end in enumerate(("min", "opt", "max")):
            shapes = (
                f"{name}:[{','.join(map(str, ends[index]))}]"
                for name, ends in profile.shapes.items()
            )
            lines.append(" ".join((f"--trt-{end}-shapes", *shapes)))
    return "\n".join(lines) + "\n"


def _inputs(graph: Graph, profile: Profile, recorded: Sequence[Arrays]) -> Arrays:
    """Stored arrays of one profile: those of the last recorded run that an engine gives to it."""
    offered = profiles(graph)
    for inputs in reversed(recorded):
        if offered[choose(offered, graph.name, dynamic_sizes(graph, inputs))].name == profile.name:
            return {key: value for name in inputs for key, value in _stored(name, inputs[name])}
    sizes = {
        letter: min(max(_SIZES.get(letter, of.opt), of.min), of.max)
        for letter, of in profile.ranges.items()
    }
    # Only indices are drawn here: the KV cache of a large model would fill the memory.
    indices = tuple(tensor for tensor in graph.inputs if tensor.below is not None)
    made = inputs_at(replace(graph, inputs=indices), sizes, np.random.default_rng(0))
    for tensor in graph.inputs:
        if tensor.name not in made:
            made[DRAWN + tensor.name] = np.array([1.0, *tensor.resolve(**sizes)])
    return made


def _stored(name: str, array: NDArray[np.generic]) -> Iterable[tuple[str, NDArray[np.generic]]]:
    """Key and array that `read_inputs` turns into the tensor `name` again."""
    if array.dtype != np.float32:
        return [(name, array)]
    nonzero = array[array != 0]
    if nonzero.size > MAX_STORED:
        return [(DRAWN + name, np.array([nonzero.std(), *array.shape], np.float64))]
    fitting = np.abs(nonzero).max(initial=0.0) <= _MAX_FLOAT16
    return [(name, array.astype(np.float16) if fitting else array)]


def packed(arrays: Arrays) -> bytes:
    """Arrays as a compressed .npz file: the same arrays give the same bytes."""
    packed = io.BytesIO()
    with ZipFile(packed, "w", ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            data = io.BytesIO()
            np.lib.format.write_array(data, np.asarray(array), allow_pickle=False)
            member = ZipInfo(f"{name}.npy")  # with a constant time
            member.compress_type = ZIP_DEFLATED
            archive.writestr(member, data.getbuffer())
    return packed.getvalue()


def stored_samples(bundle: Bundle, graph: Graph) -> Iterator[Sample]:
    """Inputs of `graph` from the files of the bundle, and random ones drawn from them: the same on
    every machine, and no graph is run for them. graph: of the bundle or of a target with narrower
    limits. Raises `BundleError` for a bundle without these files."""
    whole = bundle.graphs[graph.name]
    recorded = [read_inputs(path) for path in _input_files(bundle, whole)]
    drawn = each_random_input(whole, recorded, np.random.default_rng(0))
    samples = chain(
        (Sample(inputs, True) for inputs in recorded),
        (Sample(inputs, False) for inputs in drawn),
    )
    for sample in samples:
        if fits(graph, sample.inputs):
            yield sample


def _input_files(bundle: Bundle, graph: Graph) -> Iterator[Path]:
    for name in loaders(graph):
        file = f"{FOLDER}/{name}.npz"
        if file not in bundle.manifest.files:
            raise BundleError(
                f"{bundle.folder} has no inputs of {graph.name}: an earlier version exported it",
                fix="export it again with `mmi export`",
            )
        yield bundle.folder / file
