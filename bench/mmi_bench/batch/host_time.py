"""Host time: what Python costs above the engines, measured with engines that compute nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import inf

import numpy as np
import tokenizers

from mmi_bench.batch.sample import at_once, wait_until_idle
from mmi_bench.batch.workloads import Item
from mmi_deploy.batching.batch_engine import BatchEngine
from mmi_deploy.batching.scheduler import Policy
from mmi_deploy.documents.document import Text, document_of
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.runtime.backend import HostBackend
from mmi_deploy.runtime.buffers import HOST, Buffer
from mmi_deploy.runtime.engine import Engine
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.graphs import STATE, TERMS, Graph, Limits, graphs
from mmi_deploy.spec.schedule import Schedule

# Tokens and denoising steps of a document, a multiple of the work that its beginning takes.
TOKENS, STEPS = 64, 100

# Standard deviation of the logits: top-p 0.9 keeps some dozens of candidates.
_SPREAD = 4.0

_PROMPT = 8


class IdleEngine(Engine):
    """Engine that checks its inputs and computes nothing: zeros, and logits that are drawn once."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph, HOST)

    def _execute(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        if "logits" in outputs:
            logits = outputs["logits"].read()
            if not logits[-1, 0, -1]:  # the buffer is new
                draw = np.random.default_rng(0)
                logits[...] = _SPREAD * draw.standard_normal(logits.shape, np.float32)


def idle_runtime(config: ModelConfig, rows: int) -> Runtime:
    """Runtime of `config` whose engines compute nothing, for `rows` documents at once. Its context
    is short, as host time does not depend on it; memory that is never touched takes no pages."""
    context = 2 + _PROMPT + max(TOKENS, config.visual_tokens)
    limits = Limits(context=context, batch=rows, images=2, pool=2 * rows + 1)
    width = sum(config.image_decoder.unet.resnet_widths)
    schedule = Schedule(
        "idle", np.arange(STEPS)[::-1].copy(), np.zeros((STEPS, STATE, TERMS), np.float32), 1.0
    ).with_time_table(np.zeros((STEPS, width), np.float32))
    backend = HostBackend(graphs(config, limits), limits, IdleEngine)
    return Runtime(config, _tokenizer(config), backend, lambda _: schedule)


def _tokenizer(config: ModelConfig) -> Tokenizer:
    """Tokenizer with one word per id."""
    words = {f"w{index}": index for index in range(config.llama.vocab)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=None))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(inner, config.tokens)


@dataclass(frozen=True)
class HostTime:
    """CPU seconds of the process per run of `rows` rows: a decode run, a denoising step."""

    rows: int
    decode: float
    denoise: float


def host_time(config: ModelConfig, rows: int, repeats: int = 5) -> HostTime:
    """Measure documents in a batch engine over idle engines, from submission to the reader of their
    events, sampling included. The least of `repeats`: other processes only add to it."""
    runtime = idle_runtime(config, rows)
    reserved = {config.tokens.bos, *config.tokens.ends, config.tokens.boi, config.tokens.image}
    word = next(f"w{token}" for token in count() if token not in reserved)
    document = document_of(Text(" ".join([word] * _PROMPT)))
    text = GenerationOptions(max_tokens=TOKENS, min_tokens=TOKENS, max_images=0)
    picture = GenerationOptions(draw_first=True, turn_tokens=0, max_images=1)
    policy = Policy(text_gap=inf)
    with BatchEngine(runtime, slots=rows, policy=policy, warm_up=False) as engine:

        def seconds(kind: str, options: GenerationOptions) -> float:
            wait_until_idle()
            sample = at_once(engine, [Item(document, options)] * rows)
            assert sample.runs is not None
            return sample.cpu / sample.runs.runs[kind]

        def of(kind: str, options: GenerationOptions) -> float:
            once = partial(seconds, kind, options)
            once()  # binds the plans
            return min(once() for _ in range(repeats))

        return HostTime(rows, of("decode", text), of("denoise", picture))
