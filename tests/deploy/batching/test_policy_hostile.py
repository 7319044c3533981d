"""Attempts to starve a document: by texts, by pictures, by those that come later."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import ceil, inf

import pytest

from deploy.batching.exact_model import Hooks, Inputs, exact_runtime
from deploy.batching.harness import Alone, Service
from deploy.runtime.fake_model import picture
from mmi_deploy.batching.job import Job
from mmi_deploy.batching.scheduler import PATIENCE, Policy
from mmi_deploy.documents.document import Draw, Image, Part, Text, document_of
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime

World = tuple[Runtime, Hooks]

# Seconds of a run of each graph, for any number of rows.
SECONDS = {"denoise_step": 2.0, "denoise_shallow": 1.0, "vae_decoder": 1.5, "vision_encoder": 1.0}


@pytest.fixture
def world() -> World:
    return exact_runtime()


def alone(world: World, *parts: Part, **options: object) -> Alone:
    options = {"max_tokens": 4, "max_images": 0, "logit_bias": ((2, -90.0),), **options}
    return Alone(world[0], document_of(*parts), GenerationOptions(**options))  # type: ignore[arg-type]


def words(count: int, first: int = 5) -> Text:
    return Text(" ".join(f"w{5 + (first + at) % 27}" for at in range(count)))


class Watched(Service):
    """A service whose time passes with its runs, and which notes how long ready work waits."""

    def __init__(self, runtime: Runtime, hooks: Hooks, **how: object) -> None:
        super().__init__(runtime, hooks, **how)  # type: ignore[arg-type]
        hooks.before = self._before
        self.longest = 0  # turns that work waited after it became ready
        runs, run = self.scheduler.runs, self.scheduler.runs.run

        def watched(jobs: Sequence[Job], gap: float) -> float:
            self.longest = max(self.longest, *(runs.turn - job.ready for job in jobs[:1]))
            return run(jobs, gap)

        runs.run = watched  # type: ignore[method-assign]

    def _before(self, name: str, inputs: Inputs) -> None:
        self.clock.now += SECONDS.get(name, 0.1)

    def most_turns(self) -> int:
        """Turns that ready work may wait: `max_wait` other runs with their decode runs, then those
        of all documents that became ready before it, one run each."""
        slots = len(self.executor.slots.slots)
        decodes = ceil(slots / self.executor.rows_of_a_run)
        policy = self.scheduler.policy
        runs = PATIENCE if policy.text_gap == inf else 2
        return runs * policy.max_wait + (1 + decodes) * (slots + 1)


@pytest.mark.parametrize("seed", range(30))
def test_no_ready_work_waits_beyond_the_promise(world: World, seed: int) -> None:
    """Texts, prompts and pictures without end, at extreme shares and text gaps."""
    rng = random.Random(seed)
    kinds = [
        alone(world, words(2), max_tokens=30),
        alone(world, words(30), max_tokens=2),
        alone(world, words(1), Image(picture(1)), Image(picture(2)), max_tokens=3),
        alone(world, words(2), Draw(), max_tokens=2, full_every=2),
        alone(world, words(2), Draw(), Draw(), max_tokens=2, schedule="ancestral:4"),
    ]
    weights = [rng.choice((1, 1, 6)) for _ in kinds]
    policy = Policy(
        text_gap=rng.choice((0.0, None, inf)),
        picture_share=rng.choice((0.01, 1 / 3, 0.99)),
        max_wait=rng.choice((1, 4, 8)),
    )
    service = Watched(*world, slots=rng.choice((2, 5, 8, 11)), images=23, policy=policy)
    left = 60
    while left or not service.scheduler.idle:
        while left and len(service.scheduler.waiting) < 3:
            left -= 1
            service.submit(rng.choices(kinds, weights)[0], priority=rng.choice((0, 0, 1)))
        service.turn()
    service.until_idle()
    service.check()
    assert service.longest <= service.most_turns()


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_neither_prompts_nor_pictures_starve(world: World, share: float) -> None:
    """A picture among prompts that never stop, and a prompt among pictures that never stop."""
    prompt, drawing = alone(world, words(30), max_tokens=1), alone(world, words(2), Draw())
    for many, one in ((prompt, drawing), (drawing, prompt)):
        service = Watched(*world, slots=4, images=12, policy=Policy(picture_share=share))
        for _ in range(3):
            service.submit(many)
        single = service.submit(one)
        while not single.ended:
            if len(service.scheduler.waiting) < 2:
                service.submit(many)
            service.turn()
            assert service.turns < 400, "it starves"
        service.until_idle()
        service.check()


def test_a_text_is_decoded_after_every_other_run(world: World) -> None:
    """While pictures are drawn and prompts come, no running text waits for two other runs."""
    service = Watched(*world, slots=6, images=18, policy=Policy(text_gap=0.0))
    texts = [service.submit(alone(world, words(2, at), max_tokens=25)) for at in range(2)]
    while not all(sent.events for sent in texts):
        service.turn()
    for at in range(4):
        service.submit(alone(world, words(20, at), Draw()))
    counts, since = service.scheduler.runs.counts, 0
    while not any(sent.ended for sent in texts):
        decoded = counts.runs["decode"]
        service.turn()
        since = 0 if counts.runs["decode"] > decoded else since + 1
        assert since <= 1
    service.until_idle()
    service.check()


@pytest.mark.parametrize("most", [0, 1, 16])
def test_a_document_that_does_not_fit_is_overtaken_at_most_so_often(
    world: World, most: int
) -> None:
    """A document that needs the whole pool of images, behind one that holds a row of it and before
    many that fit."""
    holder = alone(world, Image(picture(1)), words(2), max_tokens=40)
    large = alone(world, *(Image(picture(seed)) for seed in range(4)), max_tokens=1)
    small = alone(world, words(1), max_tokens=1)
    service = Watched(*world, slots=2, images=4, policy=Policy(overtakes=most))
    service.submit(holder)
    service.turn()
    blocked = service.submit(large)
    later = [service.submit(small) for _ in range(30)]
    while not blocked.ended:
        service.turn()
    service.until_idle()
    service.check()
    begun = [sent.job.admitted for sent in (blocked, *later)]
    assert None not in begun
    overtook = sum(time < begun[0] for time in begun[1:])  # type: ignore[operator]
    assert blocked.job.overtaken == overtook <= most
    assert overtook or not most


def test_higher_priorities_come_first_and_equal_ones_in_their_order(world: World) -> None:
    service = Watched(*world, slots=1)
    service.submit(alone(world, words(3), max_tokens=5))
    service.turn()
    priorities = (0, 1, -1, 1, 0, 5)
    sent = [service.submit(alone(world, words(1), max_tokens=1), priority=p) for p in priorities]
    service.until_idle()
    service.check()
    order = sorted(range(len(sent)), key=lambda index: sent[index].job.admitted or 0.0)
    assert order == [5, 1, 3, 0, 4, 2]


def test_an_idle_turn_encodes_a_picture_that_came_last(world: World) -> None:
    """A document that ends with its picture never needs it again, but its next turn does."""
    first = alone(world, words(20), Draw(), max_tokens=0)
    again = Alone(
        world[0],
        first.second_turn(words(4, first=9)),
        GenerationOptions(max_tokens=2, max_images=0, logit_bias=((2, -90.0),)),
    )
    service = Service(*world, slots=2, images=8)
    service.run(first)
    encoded = service.executor.images.kept
    assert encoded == 1
    service.run(again)
    assert service.executor.images.kept == encoded
    assert service.scheduler.runs.counts.runs["encode"] == 0  # of the second turn and of the first
    assert service.sent[1].job.cached > 20
    service.check()


def test_while_nobody_watches_pictures_gather(world: World) -> None:
    """Denoising runs are as full as the documents allow, for all prompts and texts come first."""
    drawers = [
        alone(world, words(2), turn_tokens=5 * at, max_tokens=40, max_images=1) for at in range(5)
    ]
    watched = Service(*world, slots=5, images=8)
    watched.run(*drawers)
    alike = Service(*world, slots=5, images=8, policy=Policy(text_gap=inf))
    alike.run(*drawers)
    alike.check()
    counts = alike.scheduler.runs.counts
    assert counts.runs["denoise"] == 4 and counts.rows["denoise"] == 5 * 4
    assert watched.scheduler.runs.counts.runs["denoise"] > 4
