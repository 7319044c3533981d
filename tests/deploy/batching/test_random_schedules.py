"""Random schedules on exact engines: each document gets what it gets alone, whatever comes beside,
before and in between.

A schedule is a random mix of documents, slots, pools, policies, joins, cancellations, deadlines and
faults, on a clock that jumps. It is found again by its number.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import dataclass
from functools import cache
from math import inf

import numpy as np
import pytest

from deploy.batching.exact_model import LIMITS, Hooks, Inputs, Outputs, exact_runtime
from deploy.batching.harness import Alone, Clock, Sent, Service
from deploy.runtime.fake_model import picture
from mmi_deploy.batching.executor import Executor, powers_of_two
from mmi_deploy.batching.scheduler import Policy
from mmi_deploy.documents.document import Document, Draw, Image, Part, Text, document_of
from mmi_deploy.errors import BusyError, ConfigError, DocumentError, EngineError
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime

SCHEDULES = int(os.environ.get("MMI_SCHEDULES", "4000"))
SHARDS = 5

# Of the last picture, the encoder's output is never finite.
PICTURES = [picture(seed) for seed in range(7)]
NOT_FINITE = 6

# Schedules that share an executor, and so its prefixes and encoded images.
SHARED = 5


class Injected(Exception):
    """Raised by an engine on purpose."""


@dataclass(frozen=True)
class World:
    """Documents that schedules choose from: first turns, and the second turns of some of them."""

    runtime: Runtime
    hooks: Hooks
    first: list[Alone]
    second: dict[int, Alone]  # by index of the first turn
    poor: list[Alone]  # with pictures that the encoder fails at


def spoil(name: str, inputs: Inputs, outputs: Outputs) -> None:
    """The encoder's output of the picture `NOT_FINITE` is not finite."""
    if name == "vision_encoder":
        corner = np.rint(inputs["pixels"][:, :, 0, 0] * 255)
        bad = (corner == PICTURES[NOT_FINITE][0, 0]).all(axis=1)
        for array in outputs.values():
            array[bad] = np.nan


def options(rng: random.Random) -> GenerationOptions:
    beams = rng.choice((1, 1, 1, 2, 3))
    searched = beams > 1
    return GenerationOptions(
        seed=rng.randrange(4),
        max_tokens=rng.randrange(0, 7),
        min_tokens=rng.choice((0, 0, 3)),
        max_images=rng.choice((0, 0, 1, 1, 2)),
        draw_first=rng.random() < 0.15,
        turn_tokens=None if searched else rng.choice((None, None, None, 0, 2)),
        stop=rng.choice(((), (), ("w7", "w9 w1"), (" ",))),
        temperature=0.0 if searched else rng.choice((0.0, 1.0, 1.3)),
        top_k=rng.choice((0, 5)),
        top_p=rng.choice((0.9, 1.0)),
        repetition_penalty=rng.choice((1.0, 1.7)),
        frequency_penalty=rng.choice((0.0, 0.5)),
        logit_bias=rng.choice(((), ((3, 4.0),), ((2, 3.0),))),
        logprobs=None if searched else rng.choice((None, None, 2)),
        beams=beams,
        length_penalty=rng.choice((0.0, 1.0, 2.0)) if searched else 1.0,
        early_stopping=searched and rng.random() < 0.3,
        schedule=rng.choice((None, "plain:4", "ancestral:4")),
        guidance=rng.choice((1.0, 3.5)),
        full_every=rng.choice((1, 1, 2, 3)),
        previews=rng.choice((0, 0, 1, 3)),
    )


def document(rng: random.Random, pictures: list[int], opening: str) -> Document:
    """A random document; many begin alike, so that prefixes are found."""
    parts: list[Part] = [Text(opening)] if rng.random() < 0.7 else []
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.5:
            words = (f"w{rng.randrange(5, 32)}" for _ in range(rng.choice((1, 2, 9))))
            parts.append(Text(" ".join(words)))
        elif rng.random() < 0.85:
            parts.append(Image(PICTURES[rng.choice(pictures)]))
        else:
            parts.append(Draw())
    return document_of(*parts)


OPENINGS = ["w5 w6 w7", *(" ".join(f"w{5 + at % 27}" for at in range(n)) for n in (19, 19, 37))]


def documents(rng: random.Random, runtime: Runtime, count: int, pictures: list[int]) -> list[Alone]:
    found: list[Alone] = []
    while len(found) < count:
        try:
            opening = rng.choice(OPENINGS)
            found.append(Alone(runtime, document(rng, pictures, opening), options(rng)))
        except DocumentError:  # too long
            continue
    return found


@cache
def world(shard: int) -> World:
    """The documents of one shard of the schedules."""
    rng = random.Random(shard)
    runtime, hooks = exact_runtime()
    hooks.after = spoil
    first = documents(rng, runtime, 60, [*range(NOT_FINITE)])
    second = {}
    for index, turn in enumerate(first):
        if turn.error is None and rng.random() < 0.7:
            more = [Text(f"w{rng.randrange(5, 32)} w8 w9")]
            more += [Image(PICTURES[rng.randrange(NOT_FINITE)])] if rng.random() < 0.3 else []
            try:
                second[index] = Alone(runtime, turn.second_turn(*more), options(rng))
            except DocumentError:
                continue
    poor = documents(rng, runtime, 6, [0, NOT_FINITE])
    return World(runtime, hooks, first, second, [alone for alone in poor if alone.error])


class Schedule:
    """One random schedule."""

    def __init__(self, world: World, number: int, executor: Executor | None) -> None:
        rng = self.rng = random.Random(number)
        self.world = world
        hooks = world.hooks
        self.faults = rng.random() < 0.25
        self.clock = Clock()
        policy = Policy(
            text_gap=rng.choice((None, 0.0, 0.0, 1.0, inf)),
            picture_share=rng.choice((0.05, 1 / 3, 0.9)),
            max_wait=rng.choice((1, 2, 8)),
            overtakes=rng.choice((0, 1, 16)),
            queue=rng.choice((0, 2, 64)),
            queue_seconds=rng.choice((inf, inf, inf, 20.0)),
        )
        device = rng.random() < 0.4
        slots = rng.choice((1, 2, 2, 3, 4, 5, 8, 11))
        most = min(LIMITS.batch, slots if executor is None else len(executor.slots.slots))
        self.service = Service(
            world.runtime,
            hooks,
            slots=slots,
            images=rng.choice((1, 2, 3, 5, 8, 23)),
            policy=policy,
            clock=self.clock,
            row_counts=powers_of_two(most) if device else range(1, most + 1),
            exact=not device,
            executor=executor,
        )
        hooks.before, hooks.after = self.before, spoil
        self.busy = self.too_many = self.too_wide = 0
        self.broken = 0

    def before(self, name: str, inputs: Inputs) -> None:
        """Time passes, and an engine may raise."""
        self.clock.now += self.rng.expovariate(1)
        if self.faults and self.rng.random() < 0.02:
            self.broken += 1
            raise Injected(name)

    def run(self) -> list[Sent]:
        rng, service, world = self.rng, self.service, self.world
        left, haste = rng.choice((1, 2, 2, 3, 3, 4, 9)), rng.choice((0.2, 0.5, 1.0))
        follow: list[tuple[Sent, Alone]] = []
        while left or follow or not service.scheduler.idle:
            if left and (service.scheduler.idle or rng.random() < haste):
                left -= 1
                index = rng.randrange(len(world.first))
                poor = world.poor and rng.random() < 0.04
                sent = self.submit(rng.choice(world.poor) if poor else world.first[index])
                if sent and index in world.second and not poor and rng.random() < 0.5:
                    follow.append((sent, world.second[index]))
            for first, alone in [pair for pair in follow if pair[0].ended]:
                follow.remove((first, alone))
                self.submit(alone)
            if service.sent and rng.random() < 0.03:
                rng.choice(service.sent).job.cancel()
            if not service.turn() and not left and not follow:
                break
        service.until_idle()
        return service.sent

    def submit(self, alone: Alone) -> Sent | None:
        rng = self.rng
        try:
            return self.service.submit(
                alone,
                priority=rng.choice((0, 0, 0, 1, -1)),
                max_seconds=rng.choice((None, None, None, None, 0.0, 10.0, 40.0)),
                tenant=rng.choice(("", "", "", "other")),
            )
        except BusyError:
            self.busy += 1
        except ConfigError:
            assert alone.options.beams > len(self.service.executor.slots.slots)
            self.too_wide += 1
        except DocumentError:
            assert len(alone.document.images) > self.service.executor.images.rows
            self.too_many += 1
        return None

    def check(self) -> None:
        self.service.check()
        pool = self.service.executor.images.rows
        for sent in self.service.sent:
            match sent.error:
                case None:
                    pass
                case Injected():
                    assert self.broken
                case BusyError():
                    assert self.service.scheduler.policy.queue_seconds < inf
                case EngineError() as error if "rows for images" in str(error):
                    wanted = len(sent.alone.document.images) + sent.alone.options.max_images
                    assert wanted > pool, "a document that fits alone found no room"
                case EngineError():
                    assert sent.alone.error is not None, f"fails only in company: {sent.error}"
                case error:
                    raise AssertionError("an error of the service's own") from error


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_document_gets_what_it_gets_alone(shard: int) -> None:
    here, executor = world(shard), None
    reasons: Counter[str] = Counter()
    cached = shared = 0
    for index in range(SCHEDULES // SHARDS):
        number = shard * 1_000_000 + index
        schedule = Schedule(here, number, executor if index % SHARED else None)
        executor = schedule.service.executor
        try:
            sent = schedule.run()
            schedule.check()
        except AssertionError as error:
            raise AssertionError(f"schedule {number}: {error}") from error
        reasons.update(each.reason or type(each.error).__name__ for each in sent)
        counts = schedule.service.scheduler.runs.counts
        cached += counts.cached
        shared += counts.rows["decode"] > counts.runs["decode"]
        assert counts.cached <= counts.given
    # The schedules reach what they are meant to.
    assert {"end", "stop", "max_tokens", "max_images", "context", "cancelled", "deadline"} <= {
        *reasons
    }, reasons
    assert {"Injected", "EngineError", "BusyError"} <= {*reasons}, reasons
    assert cached and shared
