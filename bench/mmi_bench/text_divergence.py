"""Measure the text of a precision against the portable graph's on text files, without pictures.

    python -m mmi_bench.text_divergence BUNDLE --calibrate A.md --measure B.md -p int4 -p int4-awq

The language model alone runs, in chunks of a file that begin with `<s>`. Precisions that scale by
activations record those of the first tokens of `--calibrate`; no token of `--measure` is seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx_ir as ir
import typer
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.cli import program
from mmi_deploy.cli.console import print_json, remarks, results
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import DocumentError
from mmi_deploy.runtime.onnxruntime.run_graph import Run, model_runner, runner
from mmi_deploy.spec.backends import CPU, TENSORRT
from mmi_deploy.spec.graphs import Graph
from mmi_deploy.system.progress import Progress, shown
from mmi_deploy.system.temporary_folder import temporary_folder
from mmi_deploy.targets.calibration import needs_moments
from mmi_deploy.targets.precision import recipe, rewrite
from mmi_deploy.targets.precision.emulation import emulated
from mmi_deploy.targets.precision.moments import measure_moments
from mmi_deploy.targets.precision.rewrite import read_model

GRAPH = "llm"

# Tokens of a chunk, `<s>` included.
CHUNK = 129

Logits = NDArray[np.float64]


@dataclass(frozen=True)
class Divergence:
    """One precision beside the portable graph. error: of the logits, root mean square relative.
    divergence: Kullback-Leibler, of the next token. same: share of equal most likely tokens.
    entropy: cross entropy of the text."""

    precision: str
    error: float
    divergence: float
    same: float
    entropy: float


def chunks(files: Sequence[Path], tokenizer: Tokenizer, bos: int, most: int) -> Iterator[list[int]]:
    """The files' tokens in chunks of `CHUNK` that begin with `bos`, at most `most` tokens of text
    together, as many of each file. Raises `DocumentError` for a file that is too short."""
    each = most // (CHUNK - 1) // len(files)
    for file in files:
        ids = tokenizer.encode(file.read_text(encoding="utf-8"))
        if not each or len(ids) < each * (CHUNK - 1):
            raise DocumentError(
                f"{file} is too short",
                expected=f"at least {max(each, 1) * (CHUNK - 1)} tokens",
                got=len(ids),
            )
        for index in range(each):
            yield [bos, *ids[index * (CHUNK - 1) : (index + 1) * (CHUNK - 1)]]


def inputs_of(graph: Graph, token_ids: Sequence[int]) -> dict[str, NDArray[Any]]:
    """Inputs of a prefill of text alone, with the logits of every token."""
    sizes = {"b": 1, "t": len(token_ids), "w": len(token_ids), "m": 1, "n": 1, "v": 1}
    every = np.arange(len(token_ids))[None]
    given = {
        "token_ids": np.array([token_ids]),
        "visual_index": np.full((1, len(token_ids)), -1),
        "position": every,
        "logit_index": every,
    }
    return {
        tensor.name: given.get(tensor.name, np.zeros(tensor.resolve(**sizes))).astype(tensor.dtype)
        for tensor in graph.inputs
    }


def logits_of(run: Run, graph: Graph, given: Sequence[Sequence[int]]) -> list[Logits]:
    """Logits [t, u] of every chunk."""
    return [run(inputs_of(graph, ids))["logits"][0].astype(np.float64) for ids in given]


def compare(
    precision: str, ours: Sequence[Logits], theirs: Sequence[Logits], given: Sequence[Sequence[int]]
) -> Divergence:
    """Compare the logits of a precision, `ours`, with the portable graph's."""
    found, wanted = np.concatenate(ours), np.concatenate(theirs)
    log_found, log_wanted = _log_softmax(found), _log_softmax(wanted)
    divergence = (np.exp(log_wanted) * (log_wanted - log_found)).sum(axis=1).mean()
    following = [
        -_log_softmax(logits[:-1])[np.arange(len(ids) - 1), ids[1:]]
        for logits, ids in zip(ours, given, strict=True)
    ]
    return Divergence(
        precision,
        float(np.sqrt(((found - wanted) ** 2).mean() / (wanted**2).mean())),
        float(divergence),
        float((found.argmax(1) == wanted.argmax(1)).mean()),
        float(np.concatenate(following).mean()),
    )


def _log_softmax(logits: Logits) -> Logits:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def measure(
    bundle: Bundle,
    precisions: Sequence[str],
    runtime: str,
    calibration: Sequence[Sequence[int]],
    given: Sequence[Sequence[int]],
    progress: Progress,
) -> Iterator[Divergence]:
    """Measure the portable graph, then each precision. runtime: whose form of the graph runs; that
    of TensorRT is emulated."""
    graph, source = bundle.graphs[GRAPH], bundle.graph_file(GRAPH)
    progress("running the portable graph")
    wanted = logits_of(runner(source), graph, given)
    yield compare("portable", wanted, wanted, given)
    for name in precisions:
        chosen, moments = recipe(name), None
        if needs_moments(GRAPH, chosen):
            progress(f"recording activations for {name}")
            runs = [inputs_of(graph, ids) for ids in calibration]
            moments = measure_moments(read_model(source, graph), source.parent, runs)
        with temporary_folder(bundle.folder, ".text-divergence-") as folder:
            progress(f"rewriting to {name}")
            out = folder / f"{GRAPH}.onnx"
            rewrite(chosen, graph, source, out, runtime=runtime, moments=moments)
            progress(f"running {name}")
            model: ir.Model | None = emulated(out) if runtime == TENSORRT else None
            run = runner(out) if model is None else model_runner(model, folder)
            yield compare(name, logits_of(run, graph, given), wanted, given)


def text_divergence(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    measured: Annotated[
        list[Path], typer.Option("--measure", help="Text file to measure on; repeat it.")
    ],
    calibrate: Annotated[
        list[Path] | None, typer.Option(help="Text file to record activations of; repeat it.")
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option("--precision", "-p", help="Repeat it.")
    ] = None,
    emulate: Annotated[
        bool, typer.Option("--emulate", help="The form of a GPU's engines, emulated.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=CHUNK - 1, help="Tokens to measure on.")] = 896,
    calibration_tokens: Annotated[
        int, typer.Option(min=CHUNK - 1, help="Tokens to record activations of.")
    ] = 768,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Measure the text of precisions against the portable graph's: error of the logits, divergence,
    equal tokens, cross entropy."""
    opened = Bundle.open(bundle, unproved=True)
    tokenizer = Tokenizer.open(opened.tokenizer, opened.config.tokens)
    bos = opened.config.tokens.bos
    given = list(chunks(measured, tokenizer, bos, tokens))
    recorded = list(chunks(calibrate, tokenizer, bos, calibration_tokens)) if calibrate else []
    chosen = precision or ["int8", "int4", "int4-awq"]
    with shown(remarks(), f"measuring {bundle}") as progress:
        runtime = TENSORRT if emulate else CPU
        found = list(measure(opened, chosen, runtime, recorded, given, progress))
    if as_json:
        print_json([asdict(one) for one in found])
        return 0
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("precision", "logits", "divergence", "same token", "cross entropy"):
        table.add_column(heading, justify="left" if heading == "precision" else "right")
    for one in found:
        numbers = (f"{one.error:.3f}", f"{one.divergence:.3f}", f"{one.same:.0%}")
        table.add_row(one.precision, *numbers, f"{one.entropy:.3f}")
    results().print(table)
    return 0


run = program.program("text-divergence", text_divergence)

if __name__ == "__main__":
    program.main(run)
