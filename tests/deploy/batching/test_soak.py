"""Eight hours of mixed load under a fake clock: nothing is lost, and nothing grows."""

from __future__ import annotations

import random

from deploy.batching.exact_model import Inputs, exact_runtime
from deploy.batching.harness import Clock, Sent, Service
from deploy.batching.test_batch_engine_hostile import anonymous_memory
from deploy.batching.test_random_schedules import documents, spoil
from mmi_deploy.errors import BusyError, DocumentError

HOUR = 3600.0
HOURS = 8

# Seconds of a run, and between two arrivals: more than can be served, so that the queue is full.
RUN, BETWEEN = 1.0, 4.0


def test_eight_hours_of_mixed_load() -> None:
    rng = random.Random(8)
    runtime, hooks = exact_runtime()
    pool = documents(rng, runtime, 60, [*range(4)])
    clock = Clock()
    hooks.after = spoil

    def before(name: str, inputs: Inputs) -> None:
        clock.now += rng.uniform(0.5 * RUN, 1.5 * RUN)

    hooks.before = before
    service = Service(runtime, hooks, slots=4, images=8, clock=clock)
    ended: dict[str | None, int] = {}
    refused, memory, hour = 0, [], 0
    arrival = 0.0
    running: list[Sent] = []
    while clock.now < HOURS * HOUR:
        while arrival <= clock.now:
            arrival += rng.expovariate(1 / BETWEEN)
            try:
                seconds = rng.choice((None, None, None, 300.0))
                running.append(service.submit(rng.choice(pool), max_seconds=seconds))
            except (BusyError, DocumentError):
                refused += 1
        if running and rng.random() < 0.002:
            rng.choice(running).job.cancel()
        if not service.turn():
            clock.now = max(arrival, clock.now)
        service.turns = 0
        for sent in [sent for sent in running if sent.ended]:
            sent.check()
            ended[sent.reason] = ended.get(sent.reason, 0) + 1
            running.remove(sent)
            service.sent.remove(sent)
        if clock.now >= hour * HOUR:
            memory.append(anonymous_memory())
            hour += 1
    for sent in running:
        sent.job.cancel()
    service.until_idle()
    service.check()
    # The first hour allocates plans, caches and what Python keeps; the queue is full from then on.
    assert max(memory[1:]) <= 1.02 * memory[1], memory
    assert sum(ended.values()) > 500 and {"end", "max_tokens", "deadline", "cancelled"} <= {*ended}
    assert refused
