"""The batch engine under threads that cancel, close, look and misbehave. Nothing here may hang."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from threading import Event as Flag
from threading import Thread
from typing import Any

import numpy as np
import pytest

from deploy.batching.exact_model import Hooks, exact_runtime
from deploy.batching.harness import Alone, told
from deploy.runtime.fake_model import picture
from mmi_deploy.batching.batch_engine import BatchEngine
from mmi_deploy.batching.event_stream import EventStream, wake_all
from mmi_deploy.batching.run_times import RunTimes
from mmi_deploy.batching.scheduler import Policy
from mmi_deploy.documents.document import Document, Draw, Image, Text, document_of
from mmi_deploy.errors import BusyError, ConfigError, DocumentError, EngineError
from mmi_deploy.runtime.events import Event, Finished, ImageDone
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime

# Seconds after which a thread counts as hanging.
LONG = 20.0

World = tuple[Runtime, Hooks]
STORY = document_of(Text("w5 w6"), Image(picture(1)), Draw(), Text("w7"))
OPTIONS = GenerationOptions(max_tokens=6, max_images=1, seed=3)


@pytest.fixture
def world() -> World:
    return exact_runtime()


@contextmanager
def opened(world: World, **how: Any) -> Iterator[BatchEngine]:
    how = {"slots": 3, "warm_up": False, **how}
    engine = BatchEngine(world[0], **how)
    try:
        yield engine
    finally:
        in_time(engine.close)


def in_time(do: Callable[[], Any]) -> Any:
    """Result of `do`, which must end soon; its error is raised here."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append((do(), None))
        except BaseException as error:
            found.append((None, error))

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(LONG)
    assert found, "it hangs"
    result, error = found[0]
    if error is not None:
        raise error
    return result


def last(stream: EventStream) -> Event:
    """Last event of a stream, in time."""
    events: list[Event] = in_time(lambda: list(stream))
    return events[-1]


def block(world: World) -> tuple[Flag, Flag]:
    """Make the next run of an engine wait; returns the flags (it has begun, it may go on)."""
    begun, go = Flag(), Flag()

    def before(name: str, inputs: Any) -> None:
        begun.set()
        assert go.wait(LONG)

    world[1].before = before
    return begun, go


# Streams.


def test_threads_and_two_event_loops_read_at_once(world: World) -> None:
    alone = Alone(world[0], STORY, OPTIONS)

    def read() -> list[Any]:
        return [told(event) for event in engine.submit(STORY, OPTIONS)]

    async def read_many() -> list[list[Any]]:
        async def one() -> list[Any]:
            async with engine.submit(STORY, OPTIONS) as stream:
                return [told(event) async for event in stream]

        return list(await asyncio.wait_for(asyncio.gather(*(one() for _ in range(4))), LONG))

    found: list[list[Any]] = []
    with opened(world) as engine:
        threads = [Thread(target=lambda: found.append(read())) for _ in range(4)]
        threads += [Thread(target=lambda: found.extend(asyncio.run(read_many()))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
    assert found == [alone.told] * 12


def test_an_event_loop_that_ends_while_it_waits_harms_nobody(world: World) -> None:
    """Its loop is closed when the next event comes."""
    begun, go = block(world)
    with opened(world) as engine:
        left = engine.submit(document_of(Text("w5 w6")), OPTIONS)

        async def begin() -> None:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext(left), 0.05)

        asyncio.run(begin())
        loop = asyncio.new_event_loop()
        task = loop.create_task(anext(left))  # type: ignore[arg-type]
        loop.run_until_complete(asyncio.sleep(0.05))
        other = engine.submit(STORY, OPTIONS)
        task.cancel()
        loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        loop.close()
        go.set()
        assert isinstance(last(other), Finished)
        assert isinstance(last(left), Finished)


def test_waking_a_loop_that_closes_at_that_moment_harms_nobody() -> None:
    class Closing(asyncio.SelectorEventLoop):
        def call_soon_threadsafe(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("Event loop is closed")  # since the stream looked

    stream, loop = EventStream(), Closing()
    task = loop.create_task(anext(stream))  # type: ignore[arg-type]
    loop.run_until_complete(asyncio.sleep(0))
    stream.emit(None)  # by the thread of the engine
    wake_all([stream])
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()


def test_two_readers_of_one_stream_both_end(world: World) -> None:
    with opened(world) as engine:
        stream, ended = engine.submit(STORY, OPTIONS), Flag()
        events: list[Event] = []

        def read() -> None:
            events.extend(stream)
            ended.set()

        async def read_too() -> None:
            events.extend([event async for event in stream])

        other = Thread(target=read, daemon=True)
        other.start()
        in_time(lambda: asyncio.run(read_too()))
        assert ended.wait(LONG), "the second reader hangs"
    assert len(events) == len(Alone(world[0], STORY, OPTIONS).events)


def test_cancelled_by_another_thread_while_iterating(world: World) -> None:
    alone = Alone(world[0], STORY, OPTIONS)
    with opened(world) as engine:
        for after in range(len(alone.told)):
            stream = engine.submit(STORY, OPTIONS)
            events = []
            for event in stream:
                events.append(told(event))
                if len(events) == after:
                    threads = [Thread(target=stream.cancel) for _ in range(2)]
                    for thread in threads:
                        thread.start()
                    for thread in threads:
                        thread.join(LONG)
            assert events == alone.told or alone.could_be_stopped_as(events, "cancelled")
        stream.cancel()
        assert engine.stats().running == 0


def test_leaving_the_block_of_a_stream_cancels(world: World) -> None:
    begun, go = block(world)
    with opened(world) as engine:
        with engine.submit(STORY, OPTIONS) as stream:
            assert begun.wait(LONG)
        go.set()
        finished = last(stream)
        assert isinstance(finished, Finished) and finished.reason == "cancelled"
        assert stream.stats is not None


def test_what_a_caller_does_to_its_pictures_changes_no_answer(world: World) -> None:
    """The given array is overwritten after `submit`, the drawn one as soon as it comes: neither
    reaches a document, nor the pool, where others find the picture by its former pixels."""
    document = document_of(Text("w5"), Image(picture(1)), Draw(), Text("w7"))
    alone = Alone(world[0], document, OPTIONS)
    begun, go = block(world)
    with opened(world, slots=1) as engine:
        first = engine.submit(document_of(Text("w9")), OPTIONS)
        assert begun.wait(LONG)
        mine = picture(1)
        parts = (Text("w5"), Image(mine), Draw(), Text("w7"))
        second = engine.submit(document_of(*parts), OPTIONS)
        mine[...] = 0
        go.set()
        in_time(lambda: list(first))
        events = []
        for event in second:
            events.append(told(event))
            if isinstance(event, ImageDone):
                event.rgb[...] = 0
        assert events == alone.told
        assert [told(event) for event in engine.submit(document, OPTIONS)] == alone.told


# The engine's life.


def test_closing_ends_every_stream(world: World) -> None:
    begun, go = block(world)
    with opened(world, slots=2) as engine:
        streams = [engine.submit(STORY, OPTIONS) for _ in range(5)]
        assert begun.wait(LONG)
        closing = Thread(target=engine.close)
        closing.start()
        go.set()
        closing.join(LONG)
        assert not closing.is_alive()
        for stream in streams:
            finished = last(stream)
            assert isinstance(finished, Finished) and finished.reason == "cancelled"
        with pytest.raises(EngineError, match="closed"):
            engine.submit(STORY)
        engine.close()
        streams[0].cancel()
        stats = engine.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert stats.ended["cancelled"] == 5


def break_turn(engine: BatchEngine, begun: Flag | None = None, go: Flag | None = None) -> None:
    """Let the scheduler's own code fail at its next turn."""

    def turn() -> bool:
        if begun and go:
            begun.set()
            go.wait(LONG)
        raise ZeroDivisionError("a fault of the scheduler")

    engine._scheduler.turn = turn  # type: ignore[method-assign]


def test_a_fault_of_the_scheduler_ends_all_streams_with_an_error(world: World) -> None:
    begun, go = block(world)
    with opened(world, slots=2) as engine:
        streams = [engine.submit(STORY, OPTIONS) for _ in range(5)]
        assert begun.wait(LONG)
        break_turn(engine)
        go.set()
        for stream in streams:
            with pytest.raises(EngineError, match="a fault of the scheduler"):
                last(stream)
        with pytest.raises(EngineError, match="a fault of the scheduler"):
            engine.submit(STORY)
        assert engine.stats().running == 0


def test_a_document_submitted_while_the_engine_breaks_ends_too(world: World) -> None:
    """Between the check of the engine's state and the place in the queue, the engine breaks."""
    with opened(world, slots=1) as engine:
        breaking, go, queued = Flag(), Flag(), Flag()
        break_turn(engine, breaking, go)
        first = engine.submit(STORY, OPTIONS)
        assert breaking.wait(LONG)
        check = engine._scheduler.check

        def slow_check(*given: Any) -> None:
            go.set()  # the engine breaks now, while this thread is on its way into the queue
            time.sleep(0.3)
            check(*given)
            queued.set()

        engine._scheduler.check = slow_check  # type: ignore[method-assign]
        try:
            second = engine.submit(STORY, OPTIONS)
        except EngineError:
            second = None
        for stream in (first, second):
            if stream is not None:
                with pytest.raises(EngineError, match="a fault of the scheduler"):
                    last(stream)


def test_one_stream_that_cannot_end_does_not_keep_the_others(world: World) -> None:
    begun, go = block(world)
    with opened(world, slots=2) as engine:
        streams = [engine.submit(STORY, OPTIONS) for _ in range(4)]
        assert begun.wait(LONG)

        def emit(item: Any) -> None:
            raise RuntimeError("nobody listens")

        streams[0].emit = emit  # type: ignore[method-assign]
        closing = Thread(target=engine.close)
        closing.start()
        time.sleep(0.05)
        go.set()
        closing.join(LONG)
        for stream in streams[1:]:
            assert isinstance(last(stream), Finished)


def test_nonsense_is_refused_by_submit_and_not_by_the_thread(world: World) -> None:
    with opened(world) as engine:
        for wrong in (
            {"priority": "high"},
            {"priority": None},
            {"priority": float("nan")},
            {"tenant": 5},
            {"tenant": None},
            {"max_seconds": -1.0},
            {"max_seconds": float("nan")},
            {"max_seconds": "soon"},
        ):
            with pytest.raises(ConfigError):
                engine.submit(STORY, OPTIONS, **wrong)  # type: ignore[arg-type]
        with pytest.raises(DocumentError):
            engine.submit(document_of(Text("w5 " * 60)))
        with pytest.raises(DocumentError):
            engine.submit(Document(()))
        assert isinstance(last(engine.submit(STORY, OPTIONS, priority=2, tenant="a")), Finished)


def test_a_thousand_documents_at_once(world: World) -> None:
    """The queue takes its number, refuses the rest at once, and has room afterwards."""
    begun, go = block(world)
    document, options = document_of(Text("w5")), GenerationOptions(max_tokens=1, max_images=0)
    alone = Alone(exact_runtime()[0], document, options)
    with opened(world, slots=3, policy=Policy(queue=64)) as engine:
        first = engine.submit(document, options)
        assert begun.wait(LONG)
        taken, refused = [], []
        for _ in range(1000):
            start = time.thread_time()
            try:
                taken.append(engine.submit(document, options))
            except BusyError:
                refused.append(time.thread_time() - start)
        assert len(taken) == 64 + 2 and len(refused) == 1000 - 66
        assert np.median(refused) < 0.02
        go.set()
        for stream in (first, *taken):
            assert [told(event) for event in in_time(lambda s=stream: list(s))] == alone.told
        assert [told(event) for event in engine.submit(document, options)] == alone.told


def test_looking_at_the_state_all_the_time_disturbs_nothing(world: World) -> None:
    alone = Alone(world[0], STORY, OPTIONS)
    stop, errors = Flag(), []

    def look() -> None:
        try:
            while not stop.is_set():
                engine.stats()
        except Exception as error:
            errors.append(error)

    with opened(world, slots=3) as engine:
        watchers = [Thread(target=look) for _ in range(2)]
        for watcher in watchers:
            watcher.start()
        for _ in range(8):
            streams = [engine.submit(STORY, OPTIONS) for _ in range(4)]
            for stream in streams:
                assert [told(event) for event in in_time(lambda s=stream: list(s))] == alone.told
        stop.set()
        for watcher in watchers:
            watcher.join(LONG)
        stats = engine.stats()
    assert not errors
    assert stats.running == stats.waiting == 0 and sum(stats.ended.values()) == 32


def test_run_times_are_read_while_they_grow() -> None:
    """Another thread may add a size between any two steps of a reader."""

    class Growing(dict[int, float]):
        def __iter__(self) -> Iterator[int]:
            for key in super().__iter__():
                yield key
                self[1000 + len(self)] = 1.0

    times = RunTimes()
    times.add("decode", 1, 1.0)
    times._seconds["decode"] = Growing(times._seconds["decode"])
    assert times.expected("decode", 1) == 1.0


def test_an_image_counts_as_found_again_from_the_second_document_on(world: World) -> None:
    document = document_of(Text("w5"), Image(picture(1)))
    options = GenerationOptions(max_tokens=1, max_images=0)
    with opened(world, slots=2) as engine:
        for hits in range(3):
            in_time(lambda: list(engine.submit(document, options)))
            assert engine.stats().image_hits == hits
            assert engine.stats().images == 1


def anonymous_memory() -> int:
    """Bytes of the process that lie in no file: RssAnon and VmSwap."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
    return sum(int(sizes[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_many_short_documents_leave_the_memory_as_it_was(world: World) -> None:
    rng = random.Random(0)

    def some(number: int) -> None:
        streams = []
        for _ in range(number):
            document = document_of(Text("w5"), Image(picture(rng.randrange(1000))), Draw())
            streams.append(engine.submit(document, GenerationOptions(max_tokens=2, max_images=0)))
            if rng.random() < 0.2:
                streams[-1].cancel()
            if len(streams) == 4:
                for stream in streams:
                    in_time(lambda s=stream: list(s))
                streams.clear()

    with opened(world, slots=4) as engine:
        sizes = []
        for _ in range(5):
            some(80)
            gc.collect()
            sizes.append(anonymous_memory())
    # What leaks grows in every round; the allocator may keep more after some of them.
    grown = min(after - before for before, after in pairwise(sizes))
    assert grown < 0.2e6, f"{sizes} bytes"


def test_an_engine_that_cannot_be_opened_keeps_no_engines_of_the_bundle(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, hooks = world
    monkeypatch.setattr(Runtime, "open", lambda *_, **__: runtime)

    def refuse(name: str, inputs: Any) -> None:
        if name == "denoise_step":  # in the warm-up
            raise EngineError("out of memory")

    hooks.before = refuse
    with pytest.raises(EngineError, match="out of memory"):
        BatchEngine.open("bundle", slots=2)
    assert not runtime._engines
    with pytest.raises(ConfigError):
        BatchEngine.open("bundle", slots=0)
    hooks.reset()
    with BatchEngine.open("bundle", slots=2) as engine:
        assert isinstance(last(engine.submit(STORY, OPTIONS)), Finished)
    assert not runtime._engines
