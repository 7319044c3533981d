"""Compare exported graphs with the PyTorch model in its training form.

Every graph is run on random inputs at several sizes. The model computes the expected outputs by
different code: MMFS with its projections unfolded, the language model over whole rows without a
cache, each picture's context without padding, pictures drawn by diffusers' own schedulers. The
function that runs the graph is an argument, so that engines are proved by the same code as
portable files.

Letters: b batch, t tokens, w wanted positions, n encoded images, m image slots, c channels,
v visual tokens, x context tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmi_deploy.parity import (
    EXPORT_TOLERANCES,
    Comparison,
    Proof,
    Sized,
    compare_outputs,
    worst_of,
)
from mmi_deploy.runtime.onnxruntime.run_graph import Run, runner
from mmi_deploy.spec.graphs import DEEP, Graph, Limits, numbered
from mmi_deploy.spec.schedule import Schedule
from mmi_export.parity.llm_rows import LlmRows, random_rows
from mmi_export.schedules import diffusers_scheduler, schedule_table
from mmi_train.model.diffusion import ddim
from mmi_train.model.image_decoder import DenoisingStep, ImageDecoder, PreviousImages
from mmi_train.model.mm_interleaved import EncodedImages, MMInterleaved

Arrays = dict[str, NDArray[Any]]

COMPARED_WITH = {
    "vision_encoder": "MMInterleaved.encode_images in PyTorch",
    "image_values": "image_values of Llama and UNet in PyTorch, norms and projections unfolded",
    "llm": "MMInterleaved.read and head in PyTorch, row by row, without cache, padding or folding",
    "image_condition": "ImageDecoder.condition in PyTorch, picture by picture, without padding",
    "denoise_step": "ImageDecoder.draw in PyTorch with diffusers' schedulers, MMFS unfolded",
    "denoise_shallow": "the same drawing with the deep features of its first step used again",
    "vae_decoder": "Vae.decode in PyTorch",
}

# Fix of a graph that fails.
VERSIONS = "install the versions of torch, onnxscript and onnxruntime that pyproject.toml names"

# Maximum length of a row, so that a proof stays quick.
_MOST_TOKENS = 512

# Tokens of each row that are decoded one at a time.
_DECODED = 3

# Steps of each picture: enough for a second-order solver to use its whole history.
_STEPS = 3


def prove(model: MMInterleaved, graph: Graph, limits: Limits, run: Run, seed: int = 0) -> Proof:
    """Compare `run` with `model`; raises `BundleError` at the first sizes that fail."""
    draw = np.random.default_rng(seed)
    compared = []
    with torch.no_grad():
        for sizes, comparison in _COMPARISONS[graph.name](model, graph, limits, run, draw):
            compared.append((sizes, comparison))
            if not comparison.passed:
                break
    proof = Proof(graph.name, COMPARED_WITH[graph.name], tuple(compared))
    proof.check(f"{graph.name} does not compute what the model does", VERSIONS)
    return proof


def onnx_runner(path: Path) -> Run:
    """Function that runs an ONNX file on as many threads as torch uses; raises as `runner` does."""
    return runner(path, torch.get_num_threads())


def compare_with_model(
    graph: Graph, got: Mapping[str, NDArray[Any]], wanted: Mapping[str, Tensor]
) -> Comparison:
    """Compare the outputs of `graph` with the model's; return the output with the largest error."""
    expected = {name: tensor.numpy() for name, tensor in wanted.items()}
    return compare_outputs(got, expected, EXPORT_TOLERANCES[graph.name])


# Sizes of the dynamic dimensions, and the output with the greatest error.
Cases = Iterator[Sized]


def _vision_encoder(
    model: MMInterleaved, graph: Graph, limits: Limits, run: Run, draw: np.random.Generator
) -> Cases:
    for n in _batches(limits):
        pixels = draw.random(graph["pixels"].resolve(n=n), np.float32)
        images = model.encode_images(torch.from_numpy(pixels))
        wanted = {"visual_tokens": images.tokens, "features": images.features}
        yield {"n": n}, compare_with_model(graph, run({"pixels": pixels}), wanted)


def _image_values(
    model: MMInterleaved, graph: Graph, limits: Limits, run: Run, draw: np.random.Generator
) -> Cases:
    for n in _batches(limits):
        features = _normal(draw, graph["features"].resolve(n=n))
        tensor = torch.from_numpy(features)
        llm = model.llm.image_values(tensor)
        unet = model.image_decoder.unet.image_values(tensor)
        names = graph.names("llm_value") + graph.names("unet_value")
        wanted = dict(zip(names, llm + unet, strict=True))
        yield {"n": n}, compare_with_model(graph, run({"features": features}), wanted)


def _llm(
    model: MMInterleaved, graph: Graph, limits: Limits, run: Run, draw: np.random.Generator
) -> Cases:
    most = min(limits.context, _MOST_TOKENS)
    few = max(most // 8, _DECODED + 1)
    images = max(1, min(4, limits.images))
    half = max(most // 2, few)
    plans = [(1, few, 0), (1, few, 1), (min(2, limits.batch), half, images), (1, most, images)]
    for b, tokens, m in plans:
        rows = random_rows(model.config, draw, b, tokens, m)
        wanted = _read(model, rows)
        values = model.llm.image_values(torch.from_numpy(rows.features))
        fixed = {
            "visual_tokens": rows.visual_tokens.reshape(-1, model.config.llama.width),
            "image_slot": rows.image_slot,
            **{
                name: value.numpy()
                for name, value in zip(graph.names("llm_value"), values, strict=True)
            },
        }
        caches = {
            name: np.zeros(graph[name].resolve(b=b), np.float32) for name in graph.in_place.values()
        }
        tokens = rows.token_ids.shape[1]
        first = tokens - _DECODED
        for start, stop in [(0, first), *((at, at + 1) for at in range(first, tokens))]:
            inputs = fixed | caches | rows.inputs(start, stop, draw)
            outputs = run(inputs)
            caches = {old: outputs[new] for new, old in graph.in_place.items()}
            sizes = {
                "b": b,
                "t": stop - start,
                "w": inputs["logit_index"].shape[1],
                "v": len(fixed["visual_tokens"]),
                "n": len(rows.features),
                "m": rows.image_slot.shape[1],
            }
            compared = _compare_rows(
                model, graph, rows, start, outputs, inputs["logit_index"], wanted
            )
            yield sizes, worst_of(compared)


def _read(model: MMInterleaved, rows: LlmRows) -> list[Tensor]:
    """Hidden states [t, c] of each row without padding, from one pass over the whole row."""
    images = EncodedImages(torch.from_numpy(rows.visual_tokens), torch.from_numpy(rows.features))
    return [
        model.read(
            torch.from_numpy(rows.token_ids[row, start:][None]),
            images,
            torch.from_numpy(rows.own_images[row][None]),
        )[0]
        for row, start in enumerate(rows.start)
    ]


def _compare_rows(
    model: MMInterleaved,
    graph: Graph,
    rows: LlmRows,
    first: int,
    outputs: Arrays,
    logit_index: NDArray[np.int64],
    wanted: list[Tensor],
) -> list[Comparison]:
    """Compare hidden states and logits of the columns from `first`, row by row without padding."""
    found = []
    for row, (start, hidden) in enumerate(zip(rows.start, wanted, strict=True)):
        got = outputs["hidden"][row]
        padding = max(int(start) - first, 0)
        begin = first + padding - int(start)
        own = hidden[begin : begin + len(got) - padding]
        real = logit_index[row] >= padding
        logits = model.head(own[torch.from_numpy(logit_index[row][real] - padding)])
        found.append(
            compare_with_model(
                graph,
                {"hidden": got[padding:], "logits": outputs["logits"][row][real]},
                {"hidden": own, "logits": logits},
            )
        )
    return found


def _image_condition(
    model: MMInterleaved, graph: Graph, limits: Limits, run: Run, draw: np.random.Generator
) -> Cases:
    decoder = model.image_decoder
    most = min(limits.context, _MOST_TOKENS)
    for b, x in ((1, 1), (1, min(64, most)), (min(2, limits.batch), most)):
        context = _normal(draw, graph["context"].resolve(b=b, x=x))
        length = draw.integers(1, x + 1, b)
        length[0] = x
        rows = [torch.from_numpy(context[row : row + 1, :end]) for row, end in enumerate(length)]
        alone = [decoder.condition(row, torch.tensor([row.shape[1]])) for row in rows]
        both = torch.cat([*alone, decoder.null_condition.expand(b, -1, -1)])
        wanted = _condition_inputs(graph, decoder.unet.condition_keys_values(both))
        got = run({"context": context, "context_length": length})
        yield {"b": b, "x": x}, compare_with_model(graph, got, wanted)


def _denoise(
    model: MMInterleaved, graph: Graph, limits: Limits, run: Run, draw: np.random.Generator
) -> Cases:
    """Compare whole pictures of a few steps, so that the solver's history is proved too. The graph
    runs the steps of its kind; the model supplies the others."""
    decoder = model.image_decoder
    diffusion = model.config.image_decoder.diffusion
    shallow = any(tensor.name == DEEP for tensor in graph.inputs)
    pair, pool = min(2, limits.batch), min(3, limits.images)
    most = graph.ranges["m"].max
    for b, n, m, solver in ((1, 1, 0, "unipc"), (1, 1, 1, "ddpm"), (pair, pool, most, "unipc")):
        schedule = schedule_table(solver, _STEPS, diffusion)
        scheduler = ddim(diffusion) if solver == "ddpm" else diffusers_scheduler(solver, diffusion)
        scheduler.set_timesteps(_STEPS)
        images = _previous_images(model, draw, b, n, m)
        latents = _normal(draw, graph["latents"].resolve(b=b))
        noise = _normal(draw, (_STEPS, *latents.shape))
        condition = torch.from_numpy(_normal(draw, (b, *decoder.null_condition.shape[1:])))
        steps: list[DenoisingStep] = []
        decoder.draw(
            condition,
            images,
            torch.from_numpy(latents),
            scheduler,
            guidance=3.5,
            full_every=_STEPS if shallow else 1,
            step_noise=list(torch.from_numpy(noise)) if solver == "ddpm" else None,
            on_step=steps.append,
        )
        fixed = {
            "guidance": np.array(3.5, np.float32),
            "coefficients": schedule.coefficients,
            "time_table": decoder.unet.time_rows(torch.from_numpy(schedule.timesteps)).numpy(),
            **_drawing_constants(decoder, graph, condition, images),
        }
        state = {
            "latents": latents * np.float32(schedule.initial_sigma),
            "history": np.zeros(graph["history"].resolve(b=b), np.float32),
        }
        compared = []
        for index, step in enumerate(steps):
            if shallow and index == 0:
                state = _next_state(schedule, index, state, step.prediction, noise[index])
                continue
            moment: Arrays = {"step": np.array(index), "noise": noise[index]}
            wanted = {"next_latents": step.latents}
            if shallow:
                moment[DEEP] = step.deep.numpy()
            else:
                wanted[DEEP] = step.deep
            outputs = run(fixed | state | moment)
            state = {"latents": outputs["next_latents"], "history": outputs["next_history"]}
            compared.append(compare_with_model(graph, outputs, wanted))
        yield {"b": b, "steps": _STEPS, "n": n, "m": images.slot.shape[1]}, worst_of(compared)


def _previous_images(
    model: MMInterleaved, draw: np.random.Generator, b: int, n: int, m: int
) -> PreviousImages:
    """Pool of `n` images of which each of `b` pictures sees `m`; one hidden slot if `m` is 0."""
    seen = model.config.image_decoder.mmfs.images_seen
    position = np.broadcast_to(np.arange(m, 0, -1), (b, m)) if m else np.zeros((b, 1))
    return PreviousImages(
        torch.from_numpy(_normal(draw, (n, *_feature_shape(model)))),
        torch.from_numpy(draw.integers(0, n, position.shape).astype(np.int32)),
        torch.from_numpy(np.where(position <= seen, position, 0).astype(np.int32)),
    )


def _drawing_constants(
    decoder: ImageDecoder, graph: Graph, condition: Tensor, images: PreviousImages
) -> Arrays:
    """Inputs of `graph` that are the same in every step."""
    pictures = len(condition)
    both = torch.cat([condition, decoder.null_condition.expand(pictures, -1, -1)])
    tensors = {"image_slot": images.slot, "image_position": images.position}
    for index, pair in enumerate(decoder.unet.condition_keys_values(both)):
        for kind, tensor in zip(("key", "value"), pair, strict=True):
            tensors[numbered(f"condition_{kind}", index)] = tensor
    for index, value in enumerate(decoder.unet.image_values(images.features)):
        tensors[numbered("unet_value", index)] = value
    taken = {tensor.name for tensor in graph.inputs}
    return {name: tensor.numpy() for name, tensor in tensors.items() if name in taken}


def _next_state(
    schedule: Schedule, step: int, state: Arrays, prediction: Tensor, noise: NDArray[np.float32]
) -> Arrays:
    """Apply one row of the sampler's table to a prediction, in NumPy."""
    terms = np.stack([state["latents"], prediction.numpy(), noise, *state["history"]])
    latents, *history = np.tensordot(schedule.coefficients[step], terms, 1)
    return {"latents": latents, "history": np.stack(history)}


def _vae_decoder(
    model: MMInterleaved, graph: Graph, limits: Limits, run: Run, draw: np.random.Generator
) -> Cases:
    for b in _batches(limits):
        latents = _normal(draw, graph["latents"].resolve(b=b))
        wanted = {"pixels": model.image_decoder.vae.decode(torch.from_numpy(latents))}
        yield {"b": b}, compare_with_model(graph, run({"latents": latents}), wanted)


_COMPARISONS: dict[str, Callable[..., Cases]] = {
    "vision_encoder": _vision_encoder,
    "image_values": _image_values,
    "llm": _llm,
    "image_condition": _image_condition,
    "denoise_step": _denoise,
    "denoise_shallow": _denoise,
    "vae_decoder": _vae_decoder,
}


def _condition_inputs(graph: Graph, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    keys, values = graph.names("condition_key"), graph.names("condition_value")
    named = dict(zip(keys, (key for key, _ in pairs), strict=True))
    return named | dict(zip(values, (value for _, value in pairs), strict=True))


def _feature_shape(model: MMInterleaved) -> tuple[int, int]:
    vision = model.config.vision
    return sum(side * side for side in vision.level_sides), vision.width


def _batches(limits: Limits) -> list[int]:
    return sorted({1, min(2, limits.batch)})


def _normal(draw: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return draw.standard_normal(shape, np.float32)
