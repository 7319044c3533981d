"""Attempts to make a document's answer depend on its neighbours, or to lose what the service holds.

On exact engines and a fake clock: see `exact_model`, `harness`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from math import inf
from typing import Any

import numpy as np
import pytest

from deploy.batching.exact_model import Hooks, Inputs, Outputs, exact_runtime
from deploy.batching.harness import Alone, Service, told
from deploy.runtime.fake_model import picture
from mmi_deploy.batching.image_rows import ImageRows, image_key
from mmi_deploy.batching.job import Job
from mmi_deploy.batching.kv_slots import common_prefix
from mmi_deploy.batching.scheduler import Policy
from mmi_deploy.documents.document import Draw, Image, Part, Text, document_of
from mmi_deploy.errors import BusyError, DocumentError, EngineError
from mmi_deploy.runtime.buffers import HOST
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.graphs import Limits, Tensor

World = tuple[Runtime, Hooks]


class Refused(Exception):
    """Raised by an engine on purpose."""


@pytest.fixture
def world() -> World:
    return exact_runtime()


def words(*numbers: int) -> Text:
    return Text(" ".join(f"w{number}" for number in numbers))


LONG = words(*range(5, 29))  # two pieces of a prompt, and longer than the shortest prefix
DRAWING = (words(5, 6), Image(picture(1)), Draw(), words(7))


def alone(world: World, *parts: Part, **options: object) -> Alone:
    options = {"max_tokens": 4, "max_images": 1, **options}
    return Alone(world[0], document_of(*parts), GenerationOptions(**options))  # type: ignore[arg-type]


def neighbours(world: World, *seeds: int) -> list[Alone]:
    """Documents of each kind: text, given pictures, drawn ones."""
    return [
        each
        for seed in seeds
        for each in (
            alone(world, words(8, 9), seed=seed, max_images=0),
            alone(world, LONG, Image(picture(seed)), seed=seed),
            alone(world, words(6), Draw(), seed=seed, schedule="ancestral:4", full_every=2),
        )
    ]


def in_llm_row(token: int, inputs: Inputs) -> np.ndarray:
    """Rows [b] of a run of the LLM with `token` among their tokens."""
    return (inputs["token_ids"] == token).any(axis=1)


# Pictures.


def test_padding_of_a_run_leaves_other_pictures_alone(world: World) -> None:
    """Three pictures in a run of four rows, and a fourth picture that waits for a run of the other
    graph; then the other way round."""
    service = Service(*world, slots=4, images=8, row_counts=(1, 2, 4))
    for rhythms in ((2, 2, 2, 1), (1, 1, 1, 4)):
        service.run(
            *(
                alone(world, words(5 + row), Draw(), seed=row, full_every=rhythm, max_images=0)
                for row, rhythm in enumerate(rhythms)
            )
        )
    assert service.scheduler.runs.counts.runs["shallow"] == 2 + 3
    service.check()


def test_a_document_that_waits_for_a_picture_row_holds_no_image_of_the_unet() -> None:
    """One picture at a time: of three documents, the last shares its images with the first."""
    world = exact_runtime(Limits(context=48, images=6, batch=1, pool=24))
    service = Service(*world, slots=3, images=20)
    assert service.executor.pictures.rows == 1
    shared, others = [Image(picture(1)), Image(picture(2))], [Image(picture(3)), Image(picture(4))]
    first, second = alone(world, *shared, Draw()), alone(world, *others, Draw())
    third = alone(world, *shared, words(9), Draw())
    for document in (first, second):
        service.submit(document)
    while service.sent[0].job.stage != "denoise":
        service.turn()
    service.run(third)
    service.check()
    assert [sent.error for sent in service.sent] == [None] * 3


@pytest.mark.parametrize("gap", [0.0, inf])
def test_unlike_options_share_runs(world: World, gap: float) -> None:
    """Samplers, guidance and rhythms of full steps, each picture beside those of the others."""
    service = Service(*world, slots=8, images=23, policy=Policy(text_gap=gap))
    service.run(
        *(
            alone(
                world,
                Image(picture(seed % 3)),
                Draw(),
                seed=seed // 2,
                schedule=("plain:4", "ancestral:4")[seed % 2],
                guidance=(1.0, 3.5, 7.0)[seed % 3],
                full_every=1 + seed % 4,
                max_images=0,
            )
            for seed in range(8)
        )
    )
    service.check()


# Values that are not finite, and engines that raise.


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_a_row_that_is_not_finite_ends_alone(world: World, value: float, slots: int) -> None:
    """Its slot, full of such values, then serves another document."""

    def spoil(name: str, inputs: Inputs, outputs: Outputs) -> None:
        if name == "llm":
            for row in np.flatnonzero(in_llm_row(31, inputs)):
                for tensor in ("logits", "hidden"):
                    outputs[tensor][row] = value
                for tensor in ("past_key.00", "past_value.00"):
                    inputs[tensor][row, :, inputs["write_index"][row] :] = value

    sound, poor = neighbours(world, 0, 1), alone(world, words(31, 5), Draw())
    begun = alone(world, words(8), logit_bias=((31, 100.0),), max_tokens=9)  # writes w31 itself
    world[1].after = spoil
    service = Service(*world, slots=slots, images=12)
    for document in (*sound[:3], poor, begun, *sound[3:], poor, *sound):
        service.submit(document)
    service.until_idle()
    service.check()
    for sent in service.sent:
        assert isinstance(sent.error, EngineError) == (sent.alone in (poor, begun)), sent.error


def test_a_picture_that_is_not_finite_stays_with_its_document(world: World) -> None:
    """Its row of the pools lies beside those of others, some without an image of their own."""

    def spoil(name: str, inputs: Inputs, outputs: Outputs) -> None:
        if name == "vision_encoder":
            bad = (np.rint(inputs["pixels"][:, :, 0, 0] * 255) == picture(66)[0, 0]).all(axis=1)
            for array in outputs.values():
                array[bad] = np.nan

    sound = neighbours(world, 0, 1, 2)
    world[1].after = spoil
    poor = alone(world, words(5), Image(picture(66)), words(6))
    begins = alone(world, words(5), Image(picture(66)), Draw())
    service = Service(*world, slots=8, images=23)
    for _ in range(2):
        service.run(poor, *sound, begins, poor)
    service.check()
    for sent in service.sent:
        assert isinstance(sent.error, EngineError) == (sent.alone in (poor, begins)), sent.error


def test_values_that_were_not_finite_once_are_not_kept(world: World) -> None:
    """A fault of one run of the encoder: the same picture is sound afterwards."""
    document, times = alone(world, words(5), Image(picture(1)), words(6)), count()

    def spoil(name: str, inputs: Inputs, outputs: Outputs) -> None:
        if name == "vision_encoder" and not next(times):
            for array in outputs.values():
                array[...] = np.nan

    world[1].after = spoil
    service = Service(*world)
    first, second = service.run(document)[0], service.run(document)[0]
    assert isinstance(first.error, EngineError) and second.error is None
    service.check()


def engines() -> Iterator[str]:
    yield from exact_runtime()[0].graphs


@pytest.mark.parametrize("graph", engines())
@pytest.mark.parametrize("device", [False, True])
def test_a_row_that_an_engine_refuses_ends_alone(world: World, graph: str, device: bool) -> None:
    """The engine raises for every run that the document is in."""
    sound = [
        alone(world, LONG, Image(picture(seed)), Draw(), seed=seed, full_every=2)
        for seed in range(4)
    ]
    poor = alone(world, LONG, Image(picture(55)), Draw(), seed=9, full_every=2)
    service = Service(
        *world, slots=5, images=20, row_counts=(1, 2, 4) if device else None, exact=not device
    )
    for document in (*sound[:2], poor, *sound[2:]):
        service.submit(document)
    job = service.sent[2].job
    concerned = in_runs_of(service, job)

    def refuse(name: str, inputs: Inputs) -> None:
        if name == graph and concerned():
            raise Refused(name)

    world[1].before = refuse
    service.until_idle()
    service.check()
    assert isinstance(service.sent[2].error, Refused)
    assert [sent.error for sent in service.sent if sent.alone in sound] == [None] * 4


def in_runs_of(service: Service, job: Job) -> Callable[[], bool]:
    """Watch the runs of a service; returns a function that tells if `job` is in the present one."""
    executor, inside = service.executor, [False]

    def watch(name: str, concerns: Callable[..., bool]) -> None:
        run = getattr(executor, name)

        def watched(*given: Any, **named: Any) -> Any:
            inside[0] = concerns(*given, **named)
            return run(*given, **named)

        setattr(executor, name, watched)

    watch("encode", lambda pictures: bool({*job.row.keys} & {*pictures}))
    watch("unet_values", lambda images: bool({*job.row.keys} & {*images}))
    watch("prefill", lambda row, count: row is job.row)
    watch("decode", lambda rows: job.row in rows)
    watch("condition", lambda row, *rest: row is job.row)
    watch("denoise", lambda steps: job.work in steps)
    watch("decode_latents", lambda rows: job.picture_row in rows)
    return lambda: inside[0]


@pytest.mark.parametrize("graph", engines())
def test_an_engine_that_always_raises_ends_each_document_with_its_error(
    world: World, graph: str
) -> None:
    documents = [
        alone(world, words(5 + seed), Image(picture(seed)), Draw(), seed=seed, full_every=2)
        for seed in range(6)
    ]

    def refuse(name: str, inputs: Inputs) -> None:
        if name == graph:
            raise Refused(name)

    world[1].before = refuse
    service = Service(*world, slots=4, images=12)
    sent = service.run(*documents)
    service.check()
    assert all(isinstance(each.error, Refused) for each in sent)
    world[1].reset()
    assert [each.error for each in service.run(*documents)] == [None] * 6
    service.check()


@pytest.mark.parametrize("graph", engines())
def test_an_engine_that_raises_once_is_asked_again_for_each_row(world: World, graph: str) -> None:
    """In a run of several rows nobody notices; in a run of one, one document ends."""
    documents = [
        alone(world, words(5 + seed), Image(picture(seed)), Draw(), seed=seed, full_every=2)
        for seed in range(4)
    ]
    for place in range(6):
        runs = count()

        def refuse(
            name: str, inputs: Inputs, place: int = place, runs: Iterator[int] = runs
        ) -> None:
            if name == graph and next(runs) == place:
                raise Refused(name)

        world[1].before = refuse
        service = Service(*world, slots=4, images=16)
        sent = service.run(*documents)
        service.check()
        assert sum(each.error is not None for each in sent) <= 1


# Ends that come early.


def stories(world: World) -> list[Alone]:
    return [
        alone(world, LONG, Image(picture(1)), Draw(), words(5), Draw(), max_tokens=3, full_every=2),
        alone(world, words(5), max_tokens=5, logit_bias=((3, 3.0),), schedule="ancestral:4"),
        alone(world, Image(picture(2)), words(6), stop=("w7", "w9 w1")),
    ]


@pytest.mark.parametrize("gap", [0.0, inf])
@pytest.mark.parametrize("which", range(3))
def test_cancelled_at_every_turn(world: World, which: int, gap: float) -> None:
    """Before its start, between pieces of its prompt, in each step up to the last one, twice, and
    after its end: its neighbours get what they get alone, and it a beginning of that."""
    documents, turns = stories(world), 0
    reasons = set()
    for at in count():
        service = Service(*world, slots=2, images=12, policy=Policy(text_gap=gap))
        sent = [service.submit(document) for document in documents]
        for _ in range(at):
            service.turn()
        over = sent[which].ended
        sent[which].job.cancel()
        sent[which].job.cancel()
        service.until_idle()
        sent[which].job.cancel()
        service.until_idle()
        service.check()
        reasons.add(sent[which].reason)
        turns = at
        if over:
            break
    assert turns > 8 and "cancelled" in reasons and len(reasons) == 2


@pytest.mark.parametrize("which", range(3))
def test_a_deadline_at_every_turn(world: World, which: int) -> None:
    documents = stories(world)

    def pass_time(service: Service) -> Callable[[str, Inputs], None]:
        def before(name: str, inputs: Inputs) -> None:
            service.clock.now += 1.0

        return before

    reasons = []
    for seconds in range(200):
        service = Service(*world, slots=2, images=12)
        world[1].before = pass_time(service)
        sent = [
            service.submit(document, max_seconds=seconds if index == which else None)
            for index, document in enumerate(documents)
        ]
        service.until_idle()
        service.check()
        reasons.append(sent[which].reason)
        if seconds == 0:
            assert [told(event) for event in sent[which].events] == [("finished", "deadline", 0, 0)]
        if sent[which].reason != "deadline":
            break
    assert reasons[-1] != "deadline" and len(reasons) > 8


def test_a_neighbour_cancelled_in_each_step_of_a_picture(world: World) -> None:
    """The picture behind it moves into its row, with its history, noise and deep features."""
    documents = [
        alone(world, words(5 + row), Draw(), seed=row, full_every=3, schedule="ancestral:4")
        for row in range(4)
    ]
    for step in range(4):
        for which in range(4):
            service = Service(*world, slots=4, images=8)
            sent = [service.submit(document) for document in documents]
            while sent[which].job.picture_row is None or len(sent[which].events) < 1 + step:
                service.turn()
            sent[which].job.cancel()
            service.until_idle()
            service.check()
            assert [each.reason == "cancelled" for each in sent] == [
                row == which for row in range(4)
            ]


# Limits.


def test_a_full_queue_refuses_and_has_room_again(world: World) -> None:
    document = alone(world, words(5))
    service = Service(*world, slots=1, policy=Policy(queue=2))
    sent = [service.submit(document) for _ in range(3)]
    with pytest.raises(BusyError, match="the queue is full"):
        service.submit(document)
    sent[1].job.cancel()  # a waiting one leaves
    service.turn()
    service.submit(document)
    with pytest.raises(BusyError):
        service.submit(document)
    service.until_idle()
    service.check()
    service.run(document)
    service.check()


def test_documents_beyond_a_slot_or_the_pool_are_refused(world: World) -> None:
    with pytest.raises(DocumentError, match="too long"):
        alone(world, words(*[5] * 48))
    service = Service(*world, slots=2, images=2)
    three = alone(world, *(Image(picture(seed)) for seed in range(3)), max_images=0)
    with pytest.raises(DocumentError, match="more pictures than the pool"):
        service.submit(three)
    # One that may draw more than the pool holds ends with an error if it does, and only then.
    asks = alone(world, *(Image(picture(seed)) for seed in range(2)), logit_bias=((3, 90.0),))
    quiet = alone(world, *(Image(picture(seed)) for seed in range(2)), logit_bias=((3, -90.0),))
    beside = neighbours(world, 0)
    sent = service.run(asks, *beside, quiet)
    service.check()
    assert isinstance(sent[0].error, EngineError)
    assert [each.error for each in sent[1:]] == [None] * 4


def test_the_longest_document_and_the_last_place_of_a_slot(world: World) -> None:
    """A slot whose every place but one is taken, idle beside a decoding one."""
    full = alone(world, words(*[5 + at % 27 for at in range(46)]), max_images=0, max_tokens=9)
    assert told(full.events[-1])[1] == "context" and len(full.token_ids) == 48
    service = Service(*world, slots=2)
    service.run(full)
    service.run(alone(world, words(5), max_images=0), full)
    service.check()
    whole = alone(world, words(*[5 + at % 27 for at in range(47)]))
    service.run(whole, alone(world, words(6)), whole)
    service.check()


# Caches.


def test_alternating_images_under_one_text(world: World) -> None:
    """Eight at once, again and again: each answer is its own image's."""
    documents = [alone(world, LONG, Image(picture(seed)), words(5)) for seed in (1, 2)]
    assert documents[0].told != documents[1].told
    service = Service(*world, slots=8, images=20)
    for _ in range(3):
        service.run(*(documents * 4))
    service.check()
    assert service.scheduler.runs.counts.cached > 0


def test_the_key_of_an_image_is_all_of_its_pixels_its_shape_and_its_tenant() -> None:
    rgb = picture(1)
    other = rgb.copy()
    other[-1, -1, -1] ^= 1
    keys = {
        image_key(rgb, ""),
        image_key(other, ""),
        image_key(rgb, "a"),
        image_key(rgb, "b"),
        image_key(rgb.reshape(8, 32, 3), ""),
        image_key(rgb, "')"),
    }
    assert len(keys) == 6 and all(len(key) == 32 for key in keys)
    assert image_key(rgb.copy(order="F"), "a") == image_key(rgb, "a")


def test_keys_that_begin_alike_share_nothing() -> None:
    key = image_key(picture(1), "")
    forged = key[:-1] + bytes([key[-1] ^ 1])
    ids = [1, *range(5, 25), 3, 4, 4, 4, 9]
    assert common_prefix(ids, [key], ids, [key], boi=3) == len(ids)
    assert common_prefix(ids, [key], ids, [forged], boi=3) == 22  # up to the token that begins it
    assert common_prefix(ids, [key], ids, [], boi=3) == 22
    rows = ImageRows([Tensor("x", "float32", ("n", 1))], HOST, 2)
    rows.add(key)
    assert rows.find(forged) is None and rows.add(forged) != rows.find(key)


def test_equal_keys_with_other_tokens_share_nothing_beyond() -> None:
    """The ids are compared besides the keys."""
    key = image_key(picture(1), "")
    ids, other = [1, 3, 4, 4, 4, 9], [1, 3, 4, 4, 4, 8]
    assert common_prefix(ids, [key], other, [key], boi=3) == 5
    assert common_prefix([1, 9], [], [1, 3, 4], [key], boi=3) == 1


def encoded(service: Service, *documents: Alone) -> list[int]:
    """Images encoded for each of the documents, one after another."""
    found = []
    for document in documents:
        before = service.hooks.encoded
        service.run(document)
        found.append(service.hooks.encoded - before)
    return found


def test_a_second_turn_encodes_nothing_and_finds_all_tokens(world: World) -> None:
    """The picture was drawn in the first turn, and comes back as a given one."""
    first = alone(world, LONG, Draw(), words(9), max_images=0, max_tokens=3)
    second = alone(world, *first.second_turn(words(6, 7)).parts, max_images=0)
    service = Service(*world, slots=2, images=8)
    assert encoded(service, first, second) == [1, 0]
    assert service.sent[1].job.cached == len(first.token_ids)
    service.check()


def test_one_more_image_keeps_the_tokens_of_the_first_turn(world: World) -> None:
    first = alone(world, LONG, Image(picture(1)), words(9), max_images=0, max_tokens=3)
    second = alone(world, *first.second_turn(Image(picture(2)), words(6)).parts, max_images=0)
    service = Service(*world, slots=2, images=8)
    assert encoded(service, first, second) == [1, 1]
    assert service.sent[1].job.cached == len(first.token_ids)
    service.check()


def test_a_cached_slot_outlives_the_rows_of_its_images(world: World) -> None:
    """The prefix is used, and the image that was evicted is encoded again."""
    first = alone(world, LONG, Image(picture(1)), words(9), max_images=0, max_tokens=3)
    second = alone(world, *first.second_turn(words(6)).parts, max_images=1)
    others = [alone(world, words(5), Image(picture(seed)), max_images=0) for seed in (2, 3, 4)]
    service = Service(*world, slots=4, images=2)
    service.run(first)
    service.run(*others)
    assert service.executor.images.evictions
    assert encoded(service, second)[0] >= 1
    assert service.sent[-1].job.cached > len(LONG.text.split())
    service.check()


def test_a_row_in_use_is_never_evicted() -> None:
    """Random holds of a pool, beside a plain account of them."""
    rng = np.random.default_rng(0)
    pool = ImageRows([Tensor("x", "float32", ("n", 1))], HOST, 5)
    held: list[bytes] = []
    rows: dict[bytes, int] = {}
    for _ in range(5000):
        key = bytes([rng.integers(9)])
        if held and rng.random() < 0.5:
            pool.release(held.pop(rng.integers(len(held))))
        elif (row := pool.find(key)) is not None:
            assert rows[key] == row
            held.append(key)
        elif len({*held}) == 5:
            with pytest.raises(EngineError, match="all rows for images are in use"):
                pool.add(key)
        else:
            rows[key] = pool.add(key)
            assert 1 <= rows[key] <= 5
            assert rows[key] not in {rows[other] for other in held}
            held.append(key)
        assert pool.in_use == len({*held})
        for other in held:
            assert pool._row[other] == rows[other]


def test_tenants_share_neither_tokens_nor_images(world: World) -> None:
    document = alone(world, LONG, Image(picture(1)), words(9), max_images=0)
    service = Service(*world, slots=4, images=8)
    for tenant in ("a", "b", ""):
        service.run(document, tenant=tenant)
    assert service.scheduler.runs.counts.cached == 0 and service.hooks.encoded == 3 + 1
    service.run(document, tenant="b")
    assert service.sent[-1].job.cached > len(LONG.text.split()) and service.hooks.encoded == 4
    service.check()


def test_a_prefix_is_copied_from_a_document_that_still_writes(world: World) -> None:
    """And what it writes afterwards stays its own."""
    first = alone(world, LONG, Image(picture(1)), words(9), max_images=0, max_tokens=9)
    second = alone(world, LONG, Image(picture(1)), words(8), Draw(), max_tokens=9)
    service = Service(*world, slots=3, images=8)
    sent = service.submit(first)
    while not sent.events:
        service.turn()
    service.run(second, second)
    assert service.sent[1].job.cached > len(LONG.text.split())
    service.check()


def test_slots_change_places_while_documents_read_write_and_draw(world: World) -> None:
    """Long texts at both ends of the slots, and between them prompts and pictures."""
    texts = [
        alone(
            world, words(5 + seed), max_images=0, max_tokens=20, logit_bias=((2, -90.0),), seed=seed
        )
        for seed in range(3)
    ]
    between = [
        alone(world, LONG, Image(picture(seed)), Draw(), words(9), full_every=2, seed=seed)
        for seed in range(5)
    ]
    service = Service(*world, slots=8, images=23, policy=Policy(text_gap=0.0))
    service.run(texts[0], *between[:3], texts[1], *between[3:], texts[2], *between)
    assert service.executor.slots.copies > 1
    service.check()


def test_no_more_tokens_count_as_cached_than_were_given(world: World) -> None:
    """On a device a prefix may leave a single token, which is decoded; the picture that follows is
    no part of what was given."""
    first = alone(world, LONG, max_images=0, max_tokens=1)
    second = alone(world, *first.second_turn().parts, logit_bias=((3, 90.0),))
    assert second.told[-1][3] == 1 and len(second.token_ids) == len(first.token_ids) + 4
    for exact in (False, True):
        service = Service(*world, slots=1, images=8, exact=exact, row_counts=(1,))
        service.run(first)
        (sent,) = service.run(second)
        service.check()
        left = 2 if exact else 1
        assert (sent.job.given, sent.job.cached) == (
            len(first.token_ids),
            len(first.token_ids) - left,
        )
        counts = service.scheduler.runs.counts
        assert (counts.given, counts.cached) == (25 + sent.job.given, sent.job.cached)
