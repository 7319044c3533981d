"""Benchmark the latency of one decoded token by precision, on the CPU.

    python -m mmi_bench.decode bundles/tiny --precisions int8 int4

Only the language model is run, token after token, with its KV cache written in place as in the
runtime. The precisions take turns in one process, so that a machine that slows down slows all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmi_bench.statistics import Statistics, ratios
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.errors import ConfigError, MmiError
from mmi_deploy.runtime.buffers import HOST, Buffer
from mmi_deploy.runtime.onnxruntime.engine import OnnxOptions, OnnxRuntimeEngine
from mmi_deploy.spec.backends import CPU
from mmi_deploy.spec.graphs import Graph
from mmi_deploy.system.files import prepare_file, write_new_file
from mmi_deploy.system.temporary_folder import temporary_folder
from mmi_deploy.targets.precision import recipe, rewrite

# Precision of the portable graph.
PLAIN = "fp32"

# Tokens that are decoded before the measured ones.
WARM_UP = 3


class Decoder:
    """Decoder that runs one file of the `llm` graph from slot `start` on, with one hidden image."""

    def __init__(self, path: Path, graph: Graph, threads: int, start: int) -> None:
        self._engine = OnnxRuntimeEngine(path, graph, OnnxOptions(threads=threads))
        sizes = dict.fromkeys(graph.ranges, 1)
        draw = np.random.default_rng(0)
        self._buffers: dict[str, Buffer] = {}
        for tensor in graph.inputs:
            shape = tensor.resolve(**sizes)
            if tensor.dtype == "float32":
                array = draw.standard_normal(shape, np.float32)
            else:
                array = np.full(shape, max(tensor.min, 0), tensor.dtype)
            self._buffers[tensor.name] = HOST.from_array(array)
        self._buffers["visual_index"].read()[...] = -1
        self._slot = start
        outputs = [tensor for tensor in graph.outputs if tensor.name not in graph.in_place]
        self._outputs = {t.name: HOST.allocate(t.resolve(**sizes), t.dtype) for t in outputs}

    def token(self) -> float:
        """Decode one token; return its latency in seconds."""
        for name in ("position", "write_index"):
            self._buffers[name].read()[...] = self._slot
        self._slot += 1
        began = time.perf_counter()
        self._engine.run(self._buffers, self._outputs)
        return time.perf_counter() - began


def compare(
    portable: Path, graph: Graph, precisions: Sequence[str], tokens: int, threads: int, start: int
) -> dict[str, list[float]]:
    """Measure `tokens` tokens of every precision, in turns; latencies in seconds by precision."""
    with temporary_folder(portable.parent, ".decode-") as folder:
        decoders = {PLAIN: Decoder(portable, graph, threads, start)}
        for name in precisions:
            out = folder / name / portable.name
            out.parent.mkdir()
            rewrite(recipe(name), graph, portable, out, runtime=CPU)
            decoders[name] = Decoder(out, graph, threads, start)
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for count in range(WARM_UP + tokens):
        for name, decoder in decoders.items():
            spent = decoder.token()
            if count >= WARM_UP:
                seconds[name].append(spent)
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mmi_bench.decode", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precisions", nargs="+", default=["int8", "int4"], metavar="NAME")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument(
        "--start",
        type=int,
        default=128,
        help="tokens in the KV cache before the first measured one",
    )
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all latencies to this JSON file")
    given = parser.parse_args(arguments)
    try:
        if given.json:
            prepare_file(given.json)
        bundle = Bundle.open(given.bundle)
        graph = bundle.graphs["llm"]
        tokens = min(given.tokens, bundle.limits.context - given.start - WARM_UP)
        if tokens < 1:
            raise ConfigError(
                f"{given.bundle} has no free slot after --start",
                expected=f"--start of at most {bundle.limits.context - WARM_UP - 1}",
                got=given.start,
            )
        portable = bundle.graph_file("llm")
        found = compare(portable, graph, given.precisions, tokens, given.threads, given.start)
    except MmiError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for name, seconds in found.items():
        print(line(name, seconds, found[PLAIN]))
    if given.json:
        write_new_file(given.json, json.dumps(found))
    return 0


def line(name: str, seconds: Sequence[float], plain: Sequence[float]) -> str:
    """Format the median and quartiles of a token's milliseconds and of its speedup."""
    each, faster = Statistics.of([1000 * one for one in seconds]), ratios(plain, seconds)
    return (
        f"{name:8} {each.median:8.2f} ms ({each.low:.2f} to {each.high:.2f})   "
        f"{faster.median:.2f} times as fast ({faster.low:.2f} to {faster.high:.2f})"
    )


if __name__ == "__main__":
    sys.exit(main())
