"""Random schedules on real graphs, in 32 bits on the CPU: the same tokens and the same PNG bytes as
`generate` gives alone, to the bit, with prefix hits, joins, leaves and cancellations.

With the kernel library: the ONNX functions in its place (`--kernels none`) sum over the image slots
of a run in an order that depends on their number, which moves the last digit of logits.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

from deploy.batching.exact_model import Hooks
from deploy.batching.harness import Alone, Sent, Service
from exports import SHIPPED
from mmi_deploy.batching.executor import Executor
from mmi_deploy.batching.scheduler import Policy
from mmi_deploy.documents.document import Document, Draw, Image, Part, Text, document_of
from mmi_deploy.documents.images import to_png
from mmi_deploy.errors import DocumentError
from mmi_deploy.runtime.events import ImageDone
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime

if TYPE_CHECKING:
    from exports import Exported

pytestmark = pytest.mark.slow

# Schedules that share an executor, and so its prefixes and encoded images.
SHARED = 10

WORDS = "the red green blue square circle moves up down left right".split()


def some_text(rng: random.Random, known: list[str], count: int) -> Text:
    return Text(" " + " ".join(rng.choice(known) for _ in range(count)))


def document(rng: random.Random, known: list[str], side: int) -> Document:
    """A random document; half of them begin with the same text and picture."""
    parts: list[Part] = []
    if rng.random() < 0.5:
        parts += [some_text(random.Random(7), known, 18), picture(1, side)]
    else:
        parts += [some_text(rng, known, rng.randrange(1, 8))]
    if rng.random() < 0.4:
        parts.append(picture(rng.randrange(4), side))
    if rng.random() < 0.5:
        parts.append(some_text(rng, known, rng.randrange(1, 6)))
    if rng.random() < 0.4:
        parts.append(Draw())
    return document_of(*parts)


def picture(seed: int, side: int) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


def options(rng: random.Random, runtime: Runtime) -> GenerationOptions:
    return GenerationOptions(
        seed=rng.randrange(3),
        max_tokens=rng.randrange(1, 7),
        max_images=rng.choice((0, 0, 1)),
        draw_first=rng.random() < 0.1,
        temperature=rng.choice((0.0, 1.0)),
        repetition_penalty=rng.choice((1.0, 1.4)),
        logprobs=rng.choice((None, 3)),
        schedule=rng.choice([key for key in runtime.schedules if not key.endswith(":20")]),
        guidance=rng.choice((1.0, 3.5)),
        full_every=rng.choice((1, 2)),
        previews=rng.choice((0, 0, 1, 3)),
    )


def documents(rng: random.Random, runtime: Runtime, count: int) -> dict[Alone, Alone | None]:
    """Documents, each with a second turn if it fits."""
    tokenizer, side = runtime.tokenizer, runtime.config.vision.image_size
    known = []
    for word in WORDS:
        try:
            tokenizer.encode(word)
        except DocumentError:
            continue
        known.append(word)
    assert len(known) > 4
    found: dict[Alone, Alone | None] = {}
    for _ in range(count):
        first = Alone(runtime, document(rng, known, side), options(rng, runtime))
        try:
            again = first.second_turn(some_text(rng, known, 3))
            found[first] = Alone(runtime, again, options(rng, runtime))
        except DocumentError:  # the turn is too long, or its text has no spelling
            found[first] = None
    return found


def pngs(sent: Sent) -> list[bytes]:
    return [to_png(event.rgb) for event in sent.events if isinstance(event, ImageDone)]


@pytest.mark.parametrize(
    ("name", "schedules", "pool"),
    [("released", 110, 8), ("paper", 70, 8), (SHIPPED, 30, 5)],
)
def test_every_document_gets_what_it_gets_alone(
    exported_once: Callable[[str], Exported], name: str, schedules: int, pool: int
) -> None:
    runtime = Runtime.open(exported_once(name).bundle, threads=2)
    rng = random.Random(name)
    turns = documents(rng, runtime, pool)
    executor: Executor | None = None
    cached = rows = 0
    for number in range(schedules):
        if number % SHARED == 0:
            executor = Executor(runtime, rng.choice((2, 3, 5, 8)), rng.choice((4, 12, 30)))
        policy = Policy(text_gap=rng.choice((None, 0.0, 1e-3)), max_wait=rng.choice((2, 8)))
        service = Service(runtime, Hooks(), policy=policy, executor=executor)
        left = rng.choice((2, 3, 4))
        follow: list[tuple[Sent, Alone]] = []
        while left or follow or not service.scheduler.idle:
            if left and (service.scheduler.idle or rng.random() < 0.4):
                left -= 1
                first = rng.choice([*turns])
                sent = service.submit(first, tenant=rng.choice(("", "", "other")))
                second = turns[first]
                if second is not None and rng.random() < 0.6:
                    follow.append((sent, second))
            for sent, second in [pair for pair in follow if pair[0].ended]:
                follow.remove((sent, second))
                service.submit(second)
            if service.sent and rng.random() < 0.01:
                rng.choice(service.sent).job.cancel()
            service.clock.now += rng.random() * 1e-3
            service.turn()
        service.until_idle()
        service.check()
        for sent in service.sent:
            assert sent.error is None
            assert (
                pngs(sent)
                == pngs(Sent(sent.alone, sent.job, [*sent.alone.events]))[: len(pngs(sent))]
            )
        counts = service.scheduler.runs.counts
        cached += counts.cached
        rows += counts.rows["decode"] + counts.rows["denoise"]
        rows -= counts.runs["decode"] + counts.runs["denoise"]
    assert cached and rows, "no prefix was found, or no run was shared"
