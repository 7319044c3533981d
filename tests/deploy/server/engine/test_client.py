"""The front's side of an engine process: merged events, deaths, restarts, refusals."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from deploy.server.requests import picture
from deploy.server.scripted_engine import Script
from deploy.server.server_process import PYTHONPATH, SCRIPTED_ENGINE, is_alive
from mmi_deploy.batching.job import JobStats
from mmi_deploy.documents.document import Document, Text
from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.events import (
    Event,
    Finished,
    ImageDone,
    ImageProgress,
    ImageStarted,
    TextDelta,
)
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.sampling import Sampled
from mmi_deploy.runtime.timings import Timings
from mmi_deploy.server.engine import client as module
from mmi_deploy.server.engine.client import EngineClient, EngineDied, RemoteEvents
from mmi_deploy.server.engine.open_options import OpenOptions

pytestmark = pytest.mark.timing

Result = TypeVar("Result")

END = Finished("end", 3, 1, Timings())


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(work, 30))


async def read(events: RemoteEvents) -> list[Event]:
    return [event async for event in events]


# Events that wait to be read.


def test_texts_that_wait_become_one() -> None:
    events = RemoteEvents(lambda: None)
    one, two = Sampled(1, -0.5, ()), Sampled(2, -0.25, ())
    events.put(TextDelta("a", (one,), 1), last=False)
    events.put(TextDelta("b", (two,), 2), last=False)
    events.put(ImageStarted(0, 4), last=False)
    events.put(TextDelta("c", (), 3), last=False)
    events.put(END, last=True)
    text = TextDelta("ab", (one, two), 2)
    assert run(read(events)) == [text, ImageStarted(0, 4), TextDelta("c", (), 3), END]


def test_of_the_progress_that_waits_the_latest_is_kept_and_all_previews() -> None:
    events = RemoteEvents(lambda: None)
    shown = ImageProgress(0, 2, 4, picture(1, 8))
    for event in (ImageProgress(0, 1, 4), shown, ImageProgress(0, 3, 4), ImageProgress(0, 4, 4)):
        events.put(event, last=False)
    events.put(END, last=True)
    assert run(read(events)) == [shown, ImageProgress(0, 4, 4), END]


def test_a_million_events_that_nobody_reads_take_one_place() -> None:
    events = RemoteEvents(lambda: None)
    for step in range(100_000):
        events.put(ImageProgress(0, step, 100_000), last=False)
    assert len(events._items) == 1


def test_the_bytes_of_pictures_that_wait_are_counted() -> None:
    events = RemoteEvents(lambda: None)

    async def steps() -> None:
        for index in range(3):
            events.put(ImageDone(index, picture(index)), last=False)
        assert events.bytes == 3 * 64 * 64 * 3
        await events.__anext__()
        assert events.bytes == 2 * 64 * 64 * 3

    run(steps())


def test_a_reader_that_waits_is_woken_and_an_error_ends_the_events() -> None:
    events = RemoteEvents(lambda: None)

    async def steps() -> list[Event]:
        found: list[Event] = []

        async def reader() -> None:
            async for event in events:
                found.append(event)

        task = asyncio.create_task(reader())
        await asyncio.sleep(0)
        events.put(TextDelta("a", (), 1), last=False)
        await asyncio.sleep(0.01)
        assert found == [TextDelta("a", (), 1)]
        events.put(EngineDied("it died"), last=True)
        with pytest.raises(EngineDied):
            await task
        with pytest.raises(StopAsyncIteration):
            await events.__anext__()
        return found

    run(steps())


def test_only_a_document_that_goes_on_is_cancelled() -> None:
    asked: list[int] = []
    events = RemoteEvents(lambda: asked.append(1))
    events.cancel()
    events.put(END, last=True)
    events.cancel()
    assert asked == [1]


# Processes.


@pytest.fixture
def engine_command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Sets the command of the engine process; returns the list of their process ids."""
    started: list[int] = []
    popen = subprocess.Popen

    def use(*command: str) -> list[int]:
        def start(given: list[str], **options: Any) -> subprocess.Popen[bytes]:
            import os

            environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
            process = popen([*command, given[-1]], env=environment, **options)
            started.append(process.pid)
            return process

        monkeypatch.setattr(module.subprocess, "Popen", start)
        return started

    return use


class Watched:
    """An engine client, its states and what it said."""

    def __init__(self, **options: Any) -> None:
        self.states: list[str] = []
        self.said: list[str] = []
        self.changed = asyncio.Event()
        self.client = EngineClient(
            OpenOptions(bundle="bundle", **options), self._note, self.said.append
        )

    def _note(self, client: EngineClient) -> None:
        self.states.append(client.state)
        self.changed.set()

    async def until(self, state: str) -> None:
        while self.client.state != state:
            self.changed.clear()
            await self.changed.wait()

    async def __aenter__(self) -> Watched:
        self.client.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()


def submit(client: EngineClient, script: Script) -> RemoteEvents:
    options = GenerationOptions(seed=script)
    return client.submit(Document((Text("a"),)), options, max_seconds=60, tenant="")


def scripted(use: Callable[..., list[int]]) -> list[int]:
    return use(sys.executable, "-m", SCRIPTED_ENGINE)


def test_an_engine_that_dies_six_times_stays_down(
    engine_command: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = engine_command("sh", "-c", "exit 3")
    monkeypatch.setattr(module, "BACK_OFF", (0.01, 0.02, 0.05))

    async def steps() -> None:
        async with Watched() as watched:
            begun = time.monotonic()
            await watched.until("failed")
            assert time.monotonic() - begun >= 0.01 + 0.02 + 3 * 0.05
            assert watched.states == ["restarting"] * 5 + ["failed"]
            assert watched.client.restarts == 5 and len(started) == 6
            assert "exit code 3" in watched.said[0]
            with pytest.raises(EngineError):
                submit(watched.client, Script.ANSWER)
            assert await watched.client.stats() is None

    run(steps())


def test_deaths_long_ago_do_not_count(
    engine_command: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = engine_command("sh", "-c", "exit 3")
    monkeypatch.setattr(module, "BACK_OFF", (0.01,))
    monkeypatch.setattr(module, "WINDOW", 0.0)

    async def steps() -> None:
        async with Watched() as watched:
            while len(started) < 9:
                await asyncio.sleep(0.01)
            assert watched.client.state in ("starting", "restarting")

    run(steps())


def test_documents_of_a_process_that_dies_end_with_an_error_and_it_is_started_again(
    engine_command: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = scripted(engine_command)
    monkeypatch.setattr(module, "BACK_OFF", (0.01,))

    async def steps() -> None:
        async with Watched() as watched:
            client = watched.client
            await watched.until("ready")
            waiting = submit(client, Script.HANG)
            asked = asyncio.create_task(client.stats(20))
            await asyncio.sleep(0.05)
            dying = submit(client, Script.DIE_LATER)
            assert await dying.__anext__() == TextDelta("one", (), 1)
            for events in (waiting, dying):
                with pytest.raises(EngineDied):
                    await events.__anext__()
            assert await asked is None
            assert client.documents == 0
            await watched.until("ready")
            assert len(started) == 2
            found = await read(submit(client, Script.ANSWER))
            assert found[0] == TextDelta("one two", (), 2)
            assert isinstance(found[1], Finished)

    run(steps())
    assert not any(map(is_alive, started))


def test_a_message_that_cannot_be_read_is_a_death_and_not_the_end_of_the_supervision(
    engine_command: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os, sys, time; os.write(int(sys.argv[1]), b'\\xff' * 100); time.sleep(60)"
    engine_command(sys.executable, "-c", code)
    monkeypatch.setattr(module, "BACK_OFF", (0.01,))

    async def steps() -> None:
        async with Watched() as watched:
            await watched.until("failed")
            assert sum("cannot be read" in line for line in watched.said) == 6

    run(steps())


def test_a_refusal_to_open_the_bundle_is_final(
    engine_command: Callable[..., list[int]], tmp_path: Path
) -> None:
    started = engine_command(sys.executable, "-m", "mmi_deploy.server.engine.process")

    async def steps() -> None:
        async with Watched() as watched:
            await watched.until("failed")
            assert watched.states == ["failed"]
            assert "cannot be opened" in watched.said[0]

    run(steps())
    assert len(started) == 1


def test_closing_ends_the_process_and_its_documents(
    engine_command: Callable[..., list[int]],
) -> None:
    started = scripted(engine_command)

    async def steps() -> None:
        async with Watched() as watched:
            await watched.until("ready")
            events = submit(watched.client, Script.HANG)
            await watched.client.close()
            with pytest.raises(EngineDied):
                await events.__anext__()
            assert watched.client.state == "closed"

    run(steps())
    assert len(started) == 1 and not is_alive(started[0])


def test_statistics_go_with_the_last_event(engine_command: Callable[..., list[int]]) -> None:
    scripted(engine_command)

    async def steps() -> None:
        async with Watched() as watched:
            await watched.until("ready")
            events = submit(watched.client, Script.ANSWER)
            await read(events)
            assert events.stats == JobStats(0.25, 0.5, 1.0, 7, 3)

    run(steps())
