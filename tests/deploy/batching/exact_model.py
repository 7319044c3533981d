"""Every graph as integer arithmetic in numpy: a row's answer is exact, whatever runs beside it.

Sums are of integers that float64 holds exactly, and the sampler works element by element, so the
order of a sum or the shape of a batch moves no bit. As in the real graphs, a hidden key or image
has the weight zero, and zero times NaN is NaN. Cheap: a run takes tens of microseconds.

Letters: b batch, t tokens, n encoded images, m image slots, c channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from deploy.runtime.fake_model import (
    PREVIEW_MAP,
    SCHEDULES,
    fake_config,
    fake_schedule,
    fake_tokenizer,
)
from mmi_deploy.runtime.backend import HostBackend
from mmi_deploy.runtime.buffers import HOST, Array, Buffer
from mmi_deploy.runtime.engine import Engine
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.config import DistillationConfig, ModelConfig
from mmi_deploy.spec.graphs import DEEP, Graph, Limits, graphs

LIMITS = Limits(context=48, images=6, pool=24)
PRIME = 1009
WIDTH = 8


def exact_config() -> ModelConfig:
    """`fake_config` with one layer."""
    base = fake_config()
    return replace(base, llama=replace(base.llama, layers=1))


def integers(seed: int, *shape: int) -> Array:
    """Random integers below `PRIME`, as float64."""
    return np.random.default_rng(seed).integers(1, PRIME, shape).astype(np.float64)


# Weight of key s for the token at place q: zero for keys after it.
KEYS = np.tril(integers(1, LIMITS.context, LIMITS.context))
PIXELS = integers(2, 16 * 16 * 3, WIDTH)
EMBEDDING = integers(3, 32, WIDTH)
LOGITS = integers(4, WIDTH, 32)
BACK = integers(5, LIMITS.context)
NEAR = np.concatenate([[0.0], integers(6, 60)])  # weight of an image by its relative position

# The end token is rare, and pictures are begun often.
BIAS = np.zeros(32)
BIAS[2], BIAS[3] = -1.0, 1.5


def vision_encoder(x: Mapping[str, Array], graph: Graph) -> dict[str, Array]:
    pixels = x["pixels"]
    code = np.rint(pixels.reshape(len(pixels), -1).astype(np.float64) * 255) @ PIXELS % PRIME
    (_, tokens, _), (_, cells, _) = (graph[name].shape for name in ("visual_tokens", "features"))
    visual, cell = np.arange(int(tokens))[:, None], np.arange(int(cells))[:, None]
    return {
        "visual_tokens": (code[:, None] * (visual + 1) + 17 * visual) % PRIME,
        "features": (code[:, None] * 3 + cell) % PRIME,
    }


def image_values(x: Mapping[str, Array], graph: Graph) -> dict[str, Array]:
    total = x["features"].sum(axis=1, dtype=np.float64)
    code = (total[:, :4] + 5 * total[:, 4:]) % PRIME
    return {
        tensor.name: np.broadcast_to(
            (code * (index + 2) % PRIME).reshape(-1, 1, 2, 2), tensor.resolve(n=len(code))
        )
        for index, tensor in enumerate(graph.outputs)
    }


def seen_images(x: Mapping[str, Array], name: str) -> Array:
    """Sum over image slots of the image's values, weighted by its position [b, ..., m]. name:
    prefix of the tensors, of which the last one counts."""
    last = max(key for key in x if key.startswith(name))
    values = x[last][:, 0].reshape(-1, 4)[x["image_slot"]].astype(np.float64)  # [b, m, 4]
    weights = NEAR[x["image_position"]]
    found: Array = weights @ values if weights.ndim == 3 else (weights[:, None] @ values)[:, 0]
    return found


def llm(x: Mapping[str, Array], graph: Graph) -> dict[str, Array]:
    index, ids, first = x["visual_index"], x["token_ids"], x["write_index"]
    count = ids.shape[1]
    rows = EMBEDDING[ids]
    if (index >= 0).any():
        rows = np.where((index >= 0)[..., None], x["visual_tokens"][np.maximum(index, 0)], rows)
    key, value = x["past_key.00"], x["past_value.00"]  # [b, 2, context, 4]
    new = rows.reshape(len(ids), count, 2, 4).swapaxes(1, 2)
    steps = np.arange(count)[:, None]
    for b, place in enumerate(first):
        key[b, :, place : place + count] = new[b]
        value[b, :, place : place + count] = (3 * new[b] + place + steps) % PRIME
    weight = KEYS[first[:, None] + np.arange(count)]  # [b, t, context]
    cache = (key + 2.0 * value).swapaxes(1, 2).reshape(len(ids), -1, WIDTH)
    hidden = (weight @ cache + np.tile(seen_images(x, "llm_value"), 2)) % PRIME
    hidden = (hidden * hidden + 13 * x["position"][..., None]) % PRIME
    chosen = hidden[np.arange(len(ids))[:, None], x["logit_index"]]
    return {"logits": (chosen @ LOGITS % 997) / 250 + BIAS, "hidden": hidden}


def image_condition(x: Mapping[str, Array], graph: Graph) -> dict[str, Array]:
    length, context = x["context_length"], x["context"]
    back = length[:, None] - 1 - np.arange(context.shape[1])  # from the newest
    weight = np.where(back >= 0, BACK[np.maximum(back, 0)], 0)
    code = (weight[:, None] @ context.astype(np.float64))[:, 0] % PRIME
    code = (code[:, :4] + 3 * code[:, 4:]) % PRIME
    return {
        tensor.name: np.broadcast_to(
            (code * (index + 1) % PRIME)[:, None], tensor.resolve(b=len(code))
        )
        for index, tensor in enumerate(graph.outputs)
    }


def denoise_step(x: Mapping[str, Array], graph: Graph) -> dict[str, Array]:
    code = (x["condition_key.00"][:, 0] + 3.0 * x["condition_value.00"][:, 0]).sum(axis=1)
    deep = np.full((len(code), *graph[DEEP].shape[1:]), 77.0)
    deep[:, 0] = ((code + np.floor(1000 * x["latents"][:, 0, 0, 0])) % PRIME)[:, None, None, None]
    return {**denoise_shallow({**x, DEEP: deep}, graph), DEEP: deep}


def denoise_shallow(x: Mapping[str, Array], graph: Graph) -> dict[str, Array]:
    latents, history, step = x["latents"], x["history"], x["step"]
    deep = x[DEEP][:, :, 0, 0, 0].astype(np.float64)
    guided = deep[:, 0]
    if "guidance" in x:  # a distilled model has one branch
        guided = deep[:, 1] + x["guidance"] * (deep[:, 0] - deep[:, 1])
    looked = seen_images(x, "unet_value") % PRIME  # [b, 4]: the latents' channels
    offset = guided[:, None] * 0.01 + looked * 0.003 + x["time_table"][step][:, :1]
    prediction = 0.25 * latents + offset[..., None, None]
    terms = (latents, prediction, x["noise"], history[:, 0], history[:, 1], history[:, 2])
    table = x["coefficients"][step][:, 0].astype(np.float64)
    state = np.zeros(latents.shape)
    for index, term in enumerate(terms):
        state = state + table[:, index][:, None, None, None] * term
    bounded = state - np.floor(state)
    kept = np.stack([prediction, history[:, 0], history[:, 1]], axis=1)
    return {"next_latents": bounded, "next_history": kept - np.floor(kept)}


def vae_decoder(x: Mapping[str, Array], graph: Graph) -> dict[str, Array]:
    pixels = np.abs(x["latents"][:, :3] * 7.3) % 1
    factor = int(graph["pixels"].shape[3]) // pixels.shape[3]
    return {"pixels": pixels.repeat(factor, axis=2).repeat(factor, axis=3)}


_GRAPHS: dict[str, Callable[[Mapping[str, Array], Graph], dict[str, Array]]] = {
    "vision_encoder": vision_encoder,
    "llm_values": image_values,
    "llm": llm,
    "image_condition": image_condition,
    "unet_values": image_values,
    "denoise_step": denoise_step,
    "denoise_shallow": denoise_shallow,
    "vae_decoder": vae_decoder,
}

Inputs = Mapping[str, Array]
Outputs = dict[str, Array]


class Hooks:
    """Observation and disturbance of all engines.

    before(name, inputs): called before each run; may raise. after(name, inputs, outputs): may
    change the outputs. counts: runs that ended, by graph. rows: rows of the encoder, by run.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.encoded = 0  # images, padding included
        self.reset()

    def reset(self) -> None:
        """Let the engines run undisturbed."""
        self.before: Callable[[str, Inputs], None] = lambda name, inputs: None
        self.after: Callable[[str, Inputs, Outputs], None] = lambda name, inputs, outputs: None


class ExactEngine(Engine):
    """Runs one of the functions above."""

    def __init__(self, graph: Graph, hooks: Hooks) -> None:
        super().__init__(graph, HOST)
        self._hooks = hooks

    def _execute(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        self._prepare(inputs, outputs)()

    def _prepare(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> Callable[[], None]:
        # Views of host memory, which show what is written to it later.
        given = {key: buffer.read() for key, buffer in inputs.items()}
        return partial(self._run, given, {key: buffer.read() for key, buffer in outputs.items()})

    def _run(self, given: Mapping[str, Array], written: Mapping[str, Array]) -> None:
        name, hooks = self.graph.name, self._hooks
        hooks.before(name, given)
        with np.errstate(invalid="ignore"):
            found = _GRAPHS[name](given, self.graph)
            hooks.after(name, given, found)
            for key, array in found.items():
                written[key][...] = array
        hooks.counts[name] += 1
        if name == "vision_encoder":
            hooks.encoded += len(given["pixels"])


def exact_runtime(
    limits: Limits = LIMITS, distilled: DistillationConfig | None = None
) -> tuple[Runtime, Hooks]:
    """A runtime of the exact model, and the hooks of its engines."""
    config, hooks = exact_config(), Hooks()
    config = replace(config, image_decoder=replace(config.image_decoder, distillation=distilled))
    backend = HostBackend(graphs(config, limits), limits, lambda graph: ExactEngine(graph, hooks))
    words = fake_tokenizer(config)
    return Runtime(config, words, backend, fake_schedule, SCHEDULES, PREVIEW_MAP), hooks
