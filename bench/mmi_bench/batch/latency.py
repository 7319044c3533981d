"""Latencies under load: a text beside pictures, and the second turn of a conversation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmi_bench.batch.sample import Record, Runs, follow, new_tenant, wait_until_idle
from mmi_bench.batch.workloads import Item
from mmi_bench.statistics import Statistics, percentile, ratios
from mmi_deploy.batching.batch_engine import BatchEngine
from mmi_deploy.batching.scheduler import Policy
from mmi_deploy.documents.document import Text, document_of
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime


def p99(values: Sequence[float]) -> float | None:
    """99th percentile; None of too few values."""
    return percentile(values, 99)


@dataclass(frozen=True)
class Beside:
    """Text gaps while pictures are drawn. bound: seconds that the engine says a text should wait,
    before and after. drawn: pictures drawn meanwhile. alone: gaps of the same text without them."""

    pictures: int
    gaps: Sequence[float]
    alone: Sequence[float]
    bounds: tuple[float, float]
    drawn: int
    denoise_batch: float | None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "p50": float(np.median(self.gaps)), "p99": p99(self.gaps)}


def beside_pictures(
    runtime: Runtime, text: Item, pictures: Sequence[Item], texts: int, policy: Policy
) -> Beside:
    """Write `text` `texts` times, one after another, while `pictures` are drawn without an end."""
    with BatchEngine(runtime, slots=len(pictures) + 1, policy=policy) as engine:
        before = engine.stats()

        async def write() -> list[float]:
            gaps = []
            for _ in range(texts):
                record = Record(time.perf_counter())
                await follow(engine.submit(text.document, text.options, tenant="text"), record)
                gaps += record.gaps
            return gaps

        async def draw(item: Item) -> None:
            while True:
                stream = engine.submit(item.document, item.options, tenant=new_tenant())
                async with stream:
                    await follow(stream, Record(time.perf_counter()))

        async def both() -> list[float]:
            drawing = [asyncio.create_task(draw(item)) for item in pictures]
            while engine.stats().runs.get("denoise", 0) < 1:
                await asyncio.sleep(0.01)
            gaps = await write()
            for task in drawing:
                task.cancel()
            await asyncio.gather(*drawing, return_exceptions=True)
            return gaps

        alone = asyncio.run(write())
        wait_until_idle()
        gaps = asyncio.run(both())
        after = engine.stats()
    runs = Runs.between(before, after)
    return Beside(
        len(pictures),
        gaps,
        alone,
        (before.text_gap_bound, after.text_gap_bound),
        after.pictures - before.pictures,
        runs.mean_batch("denoise"),
    )


@dataclass(frozen=True)
class SecondTurn:
    """Time to first token of second turns: of the tenant of the first turn, and of a new one, for
    which all is cold. encodes: encoder runs of the warm ones. given, cached: their tokens."""

    warm: Sequence[float]
    cold: Sequence[float]
    encodes: int
    given: int
    cached: int

    @property
    def share(self) -> Statistics:
        """Warm over cold."""
        return ratios(self.warm, self.cold)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "share": self.share.to_json()}


def second_turns(
    engine: BatchEngine, first: Item, question: str, answer_tokens: int, rounds: int
) -> SecondTurn:
    """Ask about `first`, then ask on after the answer, when the engine has become idle."""
    asked = replace(
        first.options, max_images=0, turn_tokens=None, max_tokens=answer_tokens,
        min_tokens=answer_tokens, draw_first=False,
    )  # fmt: skip

    def run(item: Item, tenant: str) -> tuple[Record, int, int]:
        async def read() -> tuple[Record, int, int]:
            record = Record(time.perf_counter())
            stream = engine.submit(item.document, item.options, tenant=tenant)
            await follow(stream, record)
            assert stream.stats is not None, "the document has ended"
            return record, stream.stats.given, stream.stats.cached

        found = asyncio.run(read())
        wait_until_idle()
        return found

    warm, cold = [], []
    encodes = given = cached = 0
    for _ in range(rounds):
        tenant = new_tenant()
        answer, _, _ = run(Item(first.document, asked), tenant)
        more = Text(f"{answer.text} {question}")
        second = Item(document_of(*first.document.parts, more), _one_token(asked))
        before = engine.stats().runs.get("encode", 0)
        record, of_document, found = run(second, tenant)
        encodes += engine.stats().runs.get("encode", 0) - before
        given, cached = given + of_document, cached + found
        other, _, _ = run(second, new_tenant())
        assert record.first_token is not None and other.first_token is not None
        warm.append(record.first_token)
        cold.append(other.first_token)
    return SecondTurn(warm, cold, encodes, given, cached)


def _one_token(options: GenerationOptions) -> GenerationOptions:
    return replace(options, max_tokens=1, min_tokens=1)
