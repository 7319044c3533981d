"""Every graph of the contract as a few lines of numpy: small, exact, and sensitive to each input.

Not a model, but it keeps what the runtime relies on: the LLM sees the keys up to each token and the
images at their relative positions, and writes its cache in place; a step of denoising applies the
coefficient table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import tokenizers

from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.runtime.backend import HostBackend
from mmi_deploy.runtime.buffers import HOST, Array, Buffer
from mmi_deploy.runtime.engine import Engine
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.graphs import DEEP, Graph, Limits, graphs
from mmi_deploy.spec.presets import tiny
from mmi_deploy.spec.preview_map import PreviewMap
from mmi_deploy.spec.schedule import Schedule

VOCAB = 32
LIMITS = Limits(context=64, images=6)
SCHEDULES = ("plain:4", "ancestral:4")
PREVIEW_MAP = PreviewMap(
    weights=((0.05, 0.01, 0.0, 0.02), (0.0, 0.06, -0.01, 0.01), (0.03, 0.0, -0.04, 0.0)),
    bias=(0.5, 0.4, 0.6),
    error=0.0,
    compared_with="nothing",
)


def fake_config(unet_sees: int = 2, llm_sees: int = 49) -> ModelConfig:
    """`tiny`, but so small that numpy runs it at once: 3 visual tokens, 16 px."""
    base = tiny()
    decoder = base.image_decoder
    return replace(
        base,
        vision=replace(base.vision, image_size=16, width=8),
        vision_resampler=replace(base.vision_resampler, queries=3, context_width=8),
        llama=replace(
            base.llama,
            vocab=VOCAB,
            width=8,
            layers=2,
            heads=2,
            kv_heads=2,
            context=64,
            mmfs_every=1,
        ),
        llm_mmfs=replace(base.llm_mmfs, value_width=4, images_seen=llm_sees),
        image_decoder=replace(
            decoder,
            resampler=replace(decoder.resampler, queries=2, width=4, context_width=8),
            unet=replace(
                decoder.unet,
                latent_side=4,
                block_widths=(4, 4),
                condition_width=4,
                attention_heads=(1, 1),
                attention_blocks=(False, True),
                norm_groups=4,
            ),
            mmfs=replace(decoder.mmfs, value_width=4, images_seen=unet_sees),
        ),
    )


def matrix(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[0])


def vision_encoder(config: ModelConfig, x: dict[str, Array]) -> dict[str, Array]:
    pixels = x["pixels"].reshape(len(x["pixels"]), -1)
    tokens, cells = config.visual_tokens, sum(side**2 for side in config.vision.level_sides)
    visual = pixels @ matrix(1, pixels.shape[1], tokens * 8)
    features = pixels @ matrix(2, pixels.shape[1], cells * 8)
    return {
        "visual_tokens": visual.reshape(-1, tokens, 8),
        "features": features.reshape(-1, cells, 8),
    }


def values(config: ModelConfig, x: dict[str, Array], graph: Graph) -> dict[str, Array]:
    mean = x["features"].mean(axis=1)
    return {
        tensor.name: np.broadcast_to(
            (mean @ matrix(10 + index, 8, 4)).reshape(-1, 1, 2, 2),
            tensor.resolve(n=len(mean)),
        )
        for index, tensor in enumerate(graph.outputs)
    }


def seen_images(x: dict[str, Array], prefix: str) -> Array:
    """Sum over visible images of (mean value) / position, for [b, m] or [b, t, m] positions."""
    total: Array = np.zeros(())
    position = x["image_position"]
    weight = np.where(position > 0, 1 / np.maximum(position, 1), 0)
    for name in sorted(name for name in x if name.startswith(prefix)):
        mean = x[name].mean(axis=1).reshape(len(x[name]), -1)[x["image_slot"]]  # [b, m, h*d]
        total = total + np.einsum("b...m,bmc->b...c", weight, mean)
    return total


def llm(config: ModelConfig, x: dict[str, Array]) -> dict[str, Array]:
    visual = x["visual_index"][..., None] >= 0
    rows = x["visual_tokens"][np.maximum(x["visual_index"], 0)]
    embedded = np.where(visual, rows, matrix(3, VOCAB, 8)[x["token_ids"]])  # [b, t, c]
    batch, count = x["token_ids"].shape
    for name in (name for name in x if name.startswith("past_")):
        layer = 1 + int(name.rpartition(".")[2])
        for b in range(batch):
            first = x["write_index"][b]
            new = embedded[b].reshape(count, 2, 4).swapaxes(0, 1) * layer
            x[name][b, :, first : first + count] = new
    hidden = np.empty((batch, count, 8))
    slots = np.arange(x["past_key.00"].shape[2])
    for b in range(batch):
        for t in range(count):
            allowed = (x["start"][b] <= slots) & (slots <= x["write_index"][b] + t)
            weight = np.where(allowed, np.cos(0.7 * slots), 0) / np.sqrt(allowed.sum())
            keys = sum(x[name][b] for name in x if name.startswith("past_"))  # [h, context, d]
            hidden[b, t] = np.einsum("s,hsd->hd", weight, keys).reshape(8)
    hidden += 0.1 * np.sin(x["position"])[..., None]
    hidden += np.tile(seen_images(x, "llm_value"), 2)
    hidden = np.tanh(hidden)
    chosen = np.take_along_axis(hidden, x["logit_index"][..., None], axis=1)
    return {"logits": 3 * chosen @ matrix(4, 8, VOCAB), "hidden": hidden}


def image_condition(config: ModelConfig, x: dict[str, Array], graph: Graph) -> dict[str, Array]:
    back = x["context_length"][:, None] - 1 - np.arange(x["context"].shape[1])  # from the newest
    weight = np.where(back >= 0, 1 / (1 + np.maximum(back, 0)), 0)
    mean = np.einsum("bx,bxc->bc", weight, x["context"])
    found = {}
    for index, tensor in enumerate(graph.outputs):
        _, tokens, width = tensor.shape
        found[tensor.name] = np.repeat(
            (mean @ matrix(20 + index, 8, width))[:, None], tokens, axis=1
        )
    return found


def denoise_step(config: ModelConfig, x: dict[str, Array]) -> dict[str, Array]:
    keys = x["condition_key.00"].mean(axis=(1, 2)) + x["condition_value.00"].mean(axis=(1, 2))
    width = config.image_decoder.unet.deep_width
    side = config.image_decoder.unet.latent_side
    both = np.stack([keys, np.full_like(keys, 0.2)], 1)  # the unconditional row is a constant
    deep = np.broadcast_to(both[:, :, None, None, None], (len(keys), 2, width, side, side))
    deep = deep + 0.1 * x["latents"].mean(axis=(1, 2, 3))[:, None, None, None, None]
    return {**denoise_shallow(config, {**x, DEEP: deep}), DEEP: deep}


def denoise_shallow(config: ModelConfig, x: dict[str, Array]) -> dict[str, Array]:
    latents, step = x["latents"], x["step"]
    conditional, unconditional = x[DEEP].mean(axis=(2, 3, 4)).T
    guided = unconditional + x["guidance"] * (conditional - unconditional)
    looked = seen_images(x, "unet_value")[:, :, None, None]  # [b, 4, 1, 1]: the latents' channels
    bent = np.sin(2 * latents) + guided[:, None, None, None] + looked
    prediction = 0.5 * bent + x["time_table"][step].mean(axis=1)[:, None, None, None]
    terms = np.concatenate([np.stack([latents, prediction, x["noise"]], 1), x["history"]], 1)
    state = np.einsum("bst,bt...->bs...", x["coefficients"][step], terms)
    return {"next_latents": state[:, 0], "next_history": state[:, 1:]}


def vae_decoder(config: ModelConfig, x: dict[str, Array]) -> dict[str, Array]:
    factor = config.image_decoder.vae.factor
    pixels = x["latents"][:, :3].repeat(factor, axis=2).repeat(factor, axis=3)
    return {"pixels": 1 / (1 + np.exp(-pixels))}


_GRAPHS = {
    "vision_encoder": vision_encoder,
    "llm_values": values,
    "llm": llm,
    "image_condition": image_condition,
    "unet_values": values,
    "denoise_step": denoise_step,
    "denoise_shallow": denoise_shallow,
    "vae_decoder": vae_decoder,
}


@dataclass
class Log:
    """Recorded runs of the engines: every call's host inputs, copied."""

    calls: list[tuple[str, dict[str, Array]]] = field(default_factory=list)

    def counts(self) -> Counter[str]:
        return Counter(name for name, _ in self.calls)

    def of(self, name: str) -> list[dict[str, Array]]:
        return [inputs for called, inputs in self.calls if called == name]


class FakeEngine(Engine):
    """Runs one of the functions above."""

    def __init__(self, graph: Graph, config: ModelConfig, log: Log) -> None:
        super().__init__(graph, HOST)
        self._config = config
        self._log = log

    def _execute(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        arrays = {name: buffer.read() for name, buffer in inputs.items()}
        self._log.calls.append((self.graph.name, {n: a.copy() for n, a in arrays.items()}))
        graph = _GRAPHS[self.graph.name]
        more = (self.graph,) if graph in (values, image_condition) else ()
        for name, array in graph(self._config, arrays, *more).items():
            outputs[name].write(np.ascontiguousarray(array, np.float32))


def fake_schedule(key: str | None) -> Schedule:
    """An arbitrary linear solver of 4 steps with a history; `ancestral:4` adds noise."""
    name = (key or "plain:4").partition(":")[0]
    coefficients = matrix(5, 4, 4, 6).astype(np.float32)
    if name == "plain":
        coefficients[:, :, 2] = 0
    time_table = matrix(6, 4, sum(fake_config().image_decoder.unet.resnet_widths))
    return Schedule(name, np.array([900, 600, 300, 0]), coefficients, 1.5).with_time_table(
        time_table
    )


def fake_tokenizer(config: ModelConfig) -> Tokenizer:
    """Words `w5` ... `w31` and the special tokens."""
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<|beginofimage|>": 3, "<|image|>": 4}
    vocabulary = special | {f"w{index}": index for index in range(5, VOCAB)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(list(special))
    return Tokenizer(inner, config.tokens)


def fake_runtime(config: ModelConfig | None = None, limits: Limits = LIMITS) -> tuple[Runtime, Log]:
    config, log = config or fake_config(), Log()
    backend = HostBackend(
        graphs(config, limits), limits, lambda graph: FakeEngine(graph, config, log)
    )
    words = fake_tokenizer(config)
    return Runtime(config, words, backend, fake_schedule, SCHEDULES, PREVIEW_MAP), log


def picture(seed: int, side: int = 16) -> Array:
    """A random picture, uint8 [side, side, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
