"""Continuations scored in the batch engine, beside documents that are written and drawn."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any

import pytest

from deploy.batching.exact_model import exact_runtime
from deploy.batching.harness import Alone, told
from deploy.batching.test_batch_engine_hostile import LONG, World, block, in_time
from deploy.runtime.fake_model import picture
from mmi_deploy.batching.batch_engine import BatchEngine
from mmi_deploy.batching.scheduler import Policy
from mmi_deploy.documents.document import Document, Draw, Image, Text, document_of
from mmi_deploy.errors import BusyError, ConfigError, DocumentError, EngineError
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.scoring import score

DIALOGUE = document_of(Text("w5 w6"), Image(picture(1)), Text("w7"))


@pytest.fixture
def world() -> World:
    return exact_runtime()


@contextmanager
def opened(world: World, **how: Any) -> Iterator[BatchEngine]:
    engine = BatchEngine(world[0], **{"slots": 4, "warm_up": False, **how})
    try:
        yield engine
    finally:
        in_time(engine.close)


def words(rng: random.Random, most: int) -> str:
    return " ".join(f"w{rng.randrange(5, 20)}" for _ in range(rng.randrange(1, most)))


def dialogue(rng: random.Random) -> Document:
    parts = [Text(words(rng, 6)), Image(picture(rng.randrange(3))), Text(words(rng, 4))]
    return document_of(*parts[: rng.choice((1, 2, 3))])


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_scores_are_those_of_a_session_whatever_runs_beside(world: World, slots: int) -> None:
    """To the bit, with more continuations than slots; so are the documents."""
    rng = random.Random(slots)
    stories = [
        Alone(
            world[0],
            document_of(Text(words(rng, 5)), Draw()),
            GenerationOptions(max_tokens=6, max_images=1, seed=seed),
        )
        for seed in range(4)
    ]
    asked = [(dialogue(rng), [words(rng, 7) for _ in range(rng.randrange(1, 12))]) for _ in "12345"]
    asked.append((DIALOGUE, []))
    asked.append((DIALOGUE, ["w5", "w6"]))  # of one token each
    wanted = [score(world[0], *each) for each in asked]
    with opened(world, slots=slots) as engine:
        streams = [engine.submit(alone.document, alone.options) for alone in stories]
        found = [engine.score(*each) for each in [*asked, *asked]]
        for alone, stream in zip(stories, streams, strict=True):
            assert [told(event) for event in in_time(lambda: list(stream))] == alone.told  # noqa: B023
        assert [future.result(LONG) for future in found] == [*wanted, *wanted]
        assert engine.stats().running == 0


def test_a_document_that_was_scored_before_is_not_read_again(world: World) -> None:
    texts, document = ["w6 w7", "w8 w9 w10"], document_of(Text("w5 w6 w7 w8 " * 8))
    with opened(world) as engine:
        found = [engine.score(document, texts).result(LONG) for _ in range(2)]
        stats = engine.stats()
    assert found[0] == found[1] == score(world[0], document, texts)
    assert stats.cached_tokens > stats.given_tokens / 3


def test_what_cannot_be_scored_is_refused_in_a_line(world: World) -> None:
    with opened(world, slots=2, policy=Policy(queue=0)) as engine:
        for document, texts, said in (
            (document_of(Text("w5"), Draw()), ["w6"], "a picture to draw cannot be scored"),
            (DIALOGUE, ["w6", ""], "without a token"),
            (DIALOGUE, ["w6 " * 60], "does not fit into the context"),
        ):
            with pytest.raises(DocumentError, match=said):
                engine.score(document, texts)
            with pytest.raises(DocumentError, match=said):
                score(world[0], document, texts)
        with pytest.raises(ConfigError, match="max_seconds is out of range"):
            engine.score(DIALOGUE, ["w6"], max_seconds=-1)
        begun, go = block(world)
        first = engine.score(DIALOGUE, ["w6 w7", "w8 w9"])
        assert begun.wait(LONG)
        with pytest.raises(BusyError, match="the queue is full"):
            engine.score(DIALOGUE, ["w6"])
        go.set()
        assert len(first.result(LONG)) == 2
    with pytest.raises(EngineError, match="closed"):
        engine.score(DIALOGUE, ["w6"])


def test_scoring_ends_by_its_deadline_by_its_caller_or_with_the_engine(world: World) -> None:
    with opened(world) as engine:
        late = engine.score(DIALOGUE, ["w6 w7"], max_seconds=0)
        with pytest.raises(BusyError, match="not scored in time"):
            late.result(LONG)
        begun, go = block(world)
        given_up = engine.score(DIALOGUE, ["w6 w7", "w8 w9"])
        assert begun.wait(LONG) and given_up.cancel()
        go.set()
        with pytest.raises(CancelledError):
            given_up.result(LONG)
        until = time.monotonic() + LONG
        while engine.stats().running and time.monotonic() < until:
            time.sleep(0.001)
        assert engine.stats().ended == {"deadline": 1, "cancelled": 1}
        begun, go = block(world)
        unfinished = engine.score(DIALOGUE, ["w6 w7", "w8 w9"])
        assert begun.wait(LONG)
        engine._closed = True
        go.set()
        with pytest.raises(EngineError, match="not scored: cancelled"):
            unfinished.result(LONG)


def test_an_error_of_a_run_is_that_of_its_scores_alone(world: World) -> None:
    wanted = score(world[0], document_of(Text("w9")), ["w6 w7"])

    def before(name: str, inputs: Any) -> None:
        if name == "vision_encoder":
            raise EngineError("no memory is left")

    with opened(world) as engine:
        world[1].before = before
        failing = engine.score(DIALOGUE, ["w6 w7"])
        other = engine.score(document_of(Text("w9")), ["w6 w7"])
        with pytest.raises(EngineError, match="no memory is left"):
            failing.result(LONG)
        assert other.result(LONG) == wanted
        assert engine.stats().tokens == 0  # none was written
