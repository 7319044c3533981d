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

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from mmi_deploy.spec.schedule import LCM, Schedule
from mmi_export.graphs.image_decoder import condition_names
from mmi_export.parity.llm_rows import LlmRows, random_rows
from mmi_export.schedules import parse_schedule, schedule_table, scheduler_of
from mmi_train.model.image_decoder import DenoisingStep, PreviousImages
from mmi_train.model.llama import Llama
from mmi_train.model.mm_interleaved import EncodedImages, MMInterleaved
from mmi_train.model.unet import UNet

Arrays = dict[str, NDArray[Any]]

COMPARED_WITH = {
    "vision_encoder": "MMInterleaved.encode_images in PyTorch",
    "llm_values": "Llama.image_values in PyTorch, norms and projections unfolded",
    "llm": "MMInterleaved.read and head in PyTorch, row by row, without cache, padding or folding",
    "image_condition": "ImageDecoder.condition in PyTorch, picture by picture, without padding",
    "unet_values": "UNet.image_values in PyTorch, norms and projections unfolded",
    "denoise_step": "ImageDecoder.draw in PyTorch with diffusers' schedulers, picture by picture "
    "and step by step, MMFS unfolded",
    "denoise_shallow": "the same drawing with the deep features of its first step used again",
    "vae_decoder": "Vae.decode in PyTorch",
}

# Fix of a graph that fails.
VERSIONS = "install the versions of torch, onnxscript and onnxruntime that pyproject.toml names"

# Maximum length of a row, so that a proof stays quick.
_MOST_TOKENS = 512

# Tokens of each row that are decoded one at a time.
_DECODED = 3

# Steps of each picture: enough for a second-order solver to use its whole history, and a divisor of
# the steps of training, for which alone the ancestral sampler is DDIM with noise in any spacing.
_STEPS = 4


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


def _values(
    model: MMInterleaved, graph: Graph, limits: Limits, run: Run, draw: np.random.Generator
) -> Cases:
    unfolded: Llama | UNet = model.llm if graph.name == "llm_values" else model.image_decoder.unet
    for n in _batches(limits):
        features = _normal(draw, graph["features"].resolve(n=n))
        values = unfolded.image_values(torch.from_numpy(features))
        wanted = dict(zip((tensor.name for tensor in graph.outputs), values, strict=True))
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
    if limits.batch > 1:
        yield from _slots(model, graph, min(3, limits.batch), half, images, run, draw)


def _slots(
    model: MMInterleaved,
    graph: Graph,
    b: int,
    tokens: int,
    images: int,
    run: Run,
    draw: np.random.Generator,
) -> Cases:
    """Documents in slots: each is prefilled alone, then all are decoded in one run, at unlike
    places."""
    rows = random_rows(model.config, draw, b, tokens, images)
    wanted = _read(model, rows)
    values = model.llm.image_values(torch.from_numpy(rows.features))
    fixed = {
        "visual_tokens": rows.visual_tokens.reshape(-1, model.config.llama.width),
        **{
            name: value.numpy()
            for name, value in zip(graph.names("llm_value"), values, strict=True)
        },
    }
    caches = {
        name: np.zeros(graph[name].resolve(b=b), np.float32) for name in graph.in_place.values()
    }
    # Unlike even where the rows are equally long.
    places = [max(len(wanted[row]) - _DECODED - row, 1) for row in range(b)]
    decoded = min(len(hidden) - place for hidden, place in zip(wanted, places, strict=True))
    for row, place in enumerate(places):
        own = {name: cache[row : row + 1] for name, cache in caches.items()}
        outputs = run(fixed | own | rows.in_slots([row], [0], place))
        for new, old in graph.in_place.items():
            caches[old][row] = outputs[new][0]
    for _ in range(min(decoded, _DECODED)):
        inputs = fixed | caches | rows.in_slots(range(b), places, 1)
        outputs = run(inputs)
        caches = {old: outputs[new] for new, old in graph.in_place.items()}
        sizes = {
            "b": b,
            "t": 1,
            "w": 1,
            "v": len(fixed["visual_tokens"]),
            "n": len(rows.features),
            "m": rows.image_slot.shape[1],
        }
        compared = []
        for row, place in enumerate(places):
            hidden = wanted[row][place : place + 1]
            got = {name: outputs[name][row] for name in ("hidden", "logits")}
            expected = {"hidden": hidden, "logits": model.head(hidden)}
            compared.append(compare_with_model(graph, got, expected))
        places = [place + 1 for place in places]
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
        rows = [
            torch.from_numpy(context[row : row + 1, :end][:, ::-1].copy())
            for row, end in enumerate(length)
        ]
        alone = [decoder.condition(row, torch.tensor([row.shape[1]])) for row in rows]
        pairs = decoder.unet.condition_keys_values(torch.cat(alone))
        wanted = {
            name: tensor
            for names, pair in zip(condition_names(graph), pairs, strict=True)
            for name, tensor in zip(names, pair, strict=True)
        }
        got = run({"context": context, "context_length": length})
        yield {"b": b, "x": x}, compare_with_model(graph, got, wanted)


@dataclass(frozen=True)
class _Picture:
    """A picture of a batch as the model draws it alone.

    schedule: the sampler's table. first: its first row in the table of all samplers. latents, noise
    [steps, 1, z, side, side]: random draws. steps: the model's steps. constants: inputs that stay
    the same, one row each, with slots in the batch's pool.
    """

    schedule: Schedule
    first: int
    guidance: float
    latents: NDArray[np.float32]
    noise: NDArray[np.float32]
    steps: list[DenoisingStep]
    constants: Arrays

    def begin(self, history: tuple[int, ...]) -> Arrays:
        """State before the first step."""
        return {
            "latents": self.latents * np.float32(self.schedule.initial_sigma),
            "history": np.zeros(history, np.float32),
        }

    def moment(self, index: int) -> Arrays:
        """Inputs that change from step to step."""
        return {
            "step": np.array([self.first + index]),
            "guidance": np.array([self.guidance], np.float32),
            "noise": self.noise[index],
        }

    def after(self, index: int, state: Arrays) -> Arrays:
        """The model's state after a step that began with `state`: its latents, and the history that
        the sampler's table makes of its prediction."""
        step = self.steps[index]
        terms = np.concatenate(
            [state["latents"], step.prediction.numpy(), self.noise[index], state["history"][0]]
        )
        _, *history = np.tensordot(self.schedule.coefficients[index], terms, 1)
        return {"latents": step.latents.numpy(), "history": np.stack(history)[None]}


# Samplers of the rows of a batch, with and without noise of their own, and their guidance, which a
# distilled U-Net has of its own.
_SOLVERS = ("unipc", "ddpm", "ddim")
_GUIDANCE = (3.5, 1.0, 7.0)


def _denoise(
    model: MMInterleaved, graph: Graph, limits: Limits, run: Run, draw: np.random.Generator
) -> Cases:
    """Compare every step of pictures of a few steps, so that the solver's history is proved too.
    The rows of a batch differ in sampler, guidance, images and step: row r begins r runs after the
    first. The graph runs the steps of its kind; the model supplies the others.

    Every step begins with the model's latents and history. Random conditions and features are no
    picture's: with guidance, some of them let rounding errors grow tenfold with each step, in
    PyTorch as in the graph.
    """
    config, unet = model.config.image_decoder, model.image_decoder.unet
    shallow = any(tensor.name == DEEP for tensor in graph.inputs)
    schedules = [schedule_table(solver, _STEPS, config.diffusion) for solver in _SOLVERS]
    distilled = config.distillation
    if distilled is not None and distilled.solver_steps is not None:
        # The graph is the same for a model that draws in fewer steps.
        distilled = replace(distilled, solver_steps=max(_STEPS, distilled.solver_steps))
        config = replace(config, distillation=distilled)
        schedules[0] = parse_schedule(f"{LCM}:{_STEPS}", config.diffusion, distilled)
    tables = {
        "coefficients": np.concatenate([schedule.coefficients for schedule in schedules]),
        "time_table": np.concatenate(
            [unet.time_rows(torch.from_numpy(schedule.timesteps)).numpy() for schedule in schedules]
        ),
    }
    most = graph.ranges["m"].max
    few = min(3, limits.images)
    for b, n, m in ((1, 1, 0), (1, 1, 1), (min(3, limits.batch), few, most)):
        features = torch.from_numpy(_normal(draw, (n, *_feature_shape(model))))
        pictures = [
            _picture(
                model,
                graph,
                draw,
                features,
                row,
                max(m - row, 0),
                schedules[row],
                scheduler_of(schedules[row].key, config),
                shallow,
            )
            for row in range(b)
        ]
        values = dict(
            zip(
                (numbered("unet_value", index) for index in range(len(unet.look_back))),
                (value.numpy() for value in unet.image_values(features)),
                strict=True,
            )
        )
        taken = {tensor.name for tensor in graph.inputs}
        shared = tables | {name: value for name, value in values.items() if name in taken}
        compared = _draw_together(graph, run, pictures, shared, shallow)
        slots = max(picture.constants["image_slot"].shape[1] for picture in pictures)
        yield {"b": b, "steps": len(tables["coefficients"]), "n": n, "m": slots}, worst_of(compared)


def _draw_together(
    graph: Graph, run: Run, pictures: Sequence[_Picture], shared: Arrays, shallow: bool
) -> list[Comparison]:
    """Draw all pictures with `run`, row r beginning r runs late; compare each step of each."""
    history = graph["history"].resolve(b=1)
    state = [picture.begin(history) for picture in pictures]
    compared = []
    for turn in range(_STEPS + len(pictures) - 1):
        running = []
        for row, picture in enumerate(pictures):
            index = turn - row
            if not 0 <= index < _STEPS:
                continue
            if shallow and index == 0:  # a whole step, which the model supplies
                state[row] = picture.after(0, state[row])
                continue
            running.append((row, index))
        if not running:
            continue
        taken = {tensor.name for tensor in graph.inputs}
        inputs = [
            pictures[row].constants
            | state[row]
            | pictures[row].moment(index)
            | ({DEEP: _deep(pictures[row].steps[index])} if shallow else {})
            for row, index in running
        ]
        stacked = {name: array for name, array in _stacked(inputs).items() if name in taken}
        outputs = run(shared | stacked)
        for place, (row, index) in enumerate(running):
            own = {name: array[place : place + 1] for name, array in outputs.items()}
            state[row] = pictures[row].after(index, state[row])
            wanted = {f"next_{name}": torch.from_numpy(array) for name, array in state[row].items()}
            if not shallow:
                wanted[DEEP] = torch.from_numpy(_deep(pictures[row].steps[index]))
            compared.append(compare_with_model(graph, own, wanted))
    return compared


def _stacked(rows: Sequence[Arrays]) -> Arrays:
    """Inputs of one row each as one batch; images are padded with hidden ones."""
    most = max(row["image_slot"].shape[1] for row in rows)

    def padded(name: str, array: NDArray[Any]) -> NDArray[Any]:
        if name not in ("image_slot", "image_position"):
            return array
        return np.pad(array, ((0, 0), (0, most - array.shape[1])))

    return {name: np.concatenate([padded(name, row[name]) for row in rows]) for name in rows[0]}


def _picture(
    model: MMInterleaved,
    graph: Graph,
    draw: np.random.Generator,
    features: Tensor,
    row: int,
    m: int,
    schedule: Schedule,
    scheduler: Any,
    shallow: bool,
) -> _Picture:
    """Draw a picture of a few steps with the model. `features`: pool of images, of which it sees
    `m`. scheduler: diffusers', of which `schedule` is the table."""
    decoder, config = model.image_decoder, model.config.image_decoder
    noisy = schedule.draws_noise(0)
    guidance = _GUIDANCE[row] if config.branches > 1 else config.guidance_of(None)
    images = _previous_images(model, draw, features, m)
    latents = _normal(draw, graph["latents"].resolve(b=1))
    noise = _normal(draw, (_STEPS, *latents.shape))
    condition = torch.from_numpy(_normal(draw, (1, *decoder.null_condition.shape[1:])))
    steps: list[DenoisingStep] = []
    decoder.draw(
        condition,
        images,
        torch.from_numpy(latents),
        scheduler,
        guidance=guidance,
        full_every=_STEPS if shallow else 1,
        step_noise=list(torch.from_numpy(noise)) if noisy else None,
        on_step=steps.append,
    )
    constants = {"image_slot": images.slot.numpy(), "image_position": images.position.numpy()}
    for index, pair in enumerate(decoder.unet.condition_keys_values(condition)):
        for kind, tensor in zip(("key", "value"), pair, strict=True):
            constants[numbered(f"condition_{kind}", index)] = tensor.numpy()
    taken = {tensor.name for tensor in graph.inputs}
    constants = {name: array for name, array in constants.items() if name in taken}
    first = row * _STEPS
    return _Picture(schedule, first, guidance, latents, noise, steps, constants)


def _deep(step: DenoisingStep) -> NDArray[np.float32]:
    """Deep features of one picture, the conditional branch first: [1, branches, c, side, side]."""
    return step.deep.numpy()[None]


def _previous_images(
    model: MMInterleaved, draw: np.random.Generator, features: Tensor, m: int
) -> PreviousImages:
    """A pool of images of which one picture sees `m`; one hidden slot if `m` is 0."""
    seen = model.config.image_decoder.mmfs.images_seen
    position = np.arange(m, 0, -1)[None] if m else np.zeros((1, 1), np.int64)
    return PreviousImages(
        features,
        torch.from_numpy(draw.integers(0, len(features), position.shape).astype(np.int32)),
        torch.from_numpy(np.where(position <= seen, position, 0).astype(np.int32)),
    )


def _vae_decoder(
    model: MMInterleaved, graph: Graph, limits: Limits, run: Run, draw: np.random.Generator
) -> Cases:
    for b in _batches(limits):
        latents = _normal(draw, graph["latents"].resolve(b=b))
        wanted = {"pixels": model.image_decoder.vae.decode(torch.from_numpy(latents))}
        yield {"b": b}, compare_with_model(graph, run({"latents": latents}), wanted)


_COMPARISONS: dict[str, Callable[..., Cases]] = {
    "vision_encoder": _vision_encoder,
    "llm_values": _values,
    "llm": _llm,
    "image_condition": _image_condition,
    "unet_values": _values,
    "denoise_step": _denoise,
    "denoise_shallow": _denoise,
    "vae_decoder": _vae_decoder,
}


def _feature_shape(model: MMInterleaved) -> tuple[int, int]:
    vision = model.config.vision
    return sum(side * side for side in vision.level_sides), vision.width


def _batches(limits: Limits) -> list[int]:
    return sorted({1, min(2, limits.batch), limits.batch})


def _normal(draw: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return draw.standard_normal(shape, np.float32)
