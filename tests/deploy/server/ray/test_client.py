"""The client of replicas on Ray, with replicas in this process in place of Ray's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from deploy.batching.harness import told
from deploy.runtime.fake_model import fake_runtime, picture
from mmi_deploy.batching.batch_engine import BatchEngine
from mmi_deploy.documents.document import Document, Draw, Image, Text, document_of
from mmi_deploy.errors import ConfigError, DocumentError, EngineError
from mmi_deploy.runtime.events import Event
from mmi_deploy.runtime.generation import generate
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.server.engine.affinity import hash_of_beginning, weight
from mmi_deploy.server.engine.client import EngineDied
from mmi_deploy.server.engine.open_options import OpenOptions
from mmi_deploy.server.ray import client as module
from mmi_deploy.server.ray import replica as replica_module
from mmi_deploy.server.ray.client import RayEngine, Replicas
from mmi_deploy.server.ray.replica import EngineReplica

SLOTS = 2

DOCUMENTS = [
    (document_of(Text("w6 w7")), GenerationOptions(seed=3, max_tokens=6, max_images=0)),
    (document_of(Image(picture(1)), Text("w5"), Draw()), GenerationOptions(max_images=1)),
    (document_of(Draw(), Text("w8")), GenerationOptions(seed=9, max_tokens=3)),
]
LONG = (document_of(Text("w5")), GenerationOptions(turn_tokens=1, max_images=4))


class Stream:
    """Messages of one call, as Ray's `DeploymentResponseGenerator`."""

    def __init__(self, messages: AsyncIterator[bytes], dies: Callable[[], bool]) -> None:
        self._messages, self._dies, self._cancelled = messages, dies, False
        self._next: asyncio.Task[bytes] | None = None

    def cancel(self) -> None:
        self._cancelled = True
        if self._next is not None:
            self._next.cancel()

    def cancelled(self) -> bool:
        return self._cancelled

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> bytes:
        if self._dies():
            raise RuntimeError("The actor died.")
        self._next = asyncio.ensure_future(self._messages.__anext__())  # type: ignore[arg-type]
        return await self._next


class Handle:
    """Handle of a deployment with one replica."""

    def __init__(self, replica: EngineReplica) -> None:
        self._replica, self.dead = replica, False
        self.affinities: list[int] = []

    def options(self, *, stream: bool) -> Handle:
        assert stream
        return self

    def __getattr__(self, method: str) -> Any:
        call = getattr(self._replica, method)

        def remote(affinity: int, *arguments: Any) -> Any:
            if method != "generate":
                return call(affinity, *arguments)
            self.affinities.append(affinity)
            return Stream(call(affinity, *arguments), lambda: self.dead)

        return type("Method", (), {"remote": staticmethod(remote)})


class Deployed:
    """A client, its handle, and the number of replicas that Ray is said to have."""

    def __init__(self) -> None:
        self.running, self.engine = 1, BatchEngine(fake_runtime()[0], slots=SLOTS)
        self.lines: list[str] = []


def deployed(
    monkeypatch: pytest.MonkeyPatch,
    scenario: Callable[[RayEngine, Handle, Deployed], Coroutine[Any, Any, None]],
) -> None:
    """Run a scenario with a client that is ready."""
    ours = Deployed()
    handles: list[Handle] = []

    def deploy(options: OpenOptions, replicas: Replicas) -> Handle:
        handles.append(Handle(EngineReplica({"bundle": options.bundle})))
        return handles[0]

    monkeypatch.setattr(replica_module, "open_engine", lambda options: ours.engine)
    monkeypatch.setattr(
        replica_module,
        "description",
        lambda *_: {"pid": 1, "slots": SLOTS, "text_gap_bound": 0.1, "kernels": ""},
    )
    monkeypatch.setattr(module, "_deploy", deploy)
    monkeypatch.setattr(module, "_running", lambda: ours.running)
    monkeypatch.setattr(module, "_shut_down", lambda: None)
    monkeypatch.setattr(module, "LOOK", 0.01)

    async def run() -> None:
        replicas = Replicas(1, 2, SLOTS)
        client = RayEngine(OpenOptions("b"), lambda _: None, ours.lines.append, replicas=replicas)
        client.start()
        await until(lambda: client.state == "ready")
        await scenario(client, handles[0], ours)
        await client.close()
        assert client.documents == 0

    try:
        asyncio.run(asyncio.wait_for(run(), 60))
    finally:
        ours.engine.close()


async def until(done: Callable[[], object]) -> None:
    while not done():
        await asyncio.sleep(0.005)


def submitted(client: RayEngine, document: Document, options: GenerationOptions) -> Any:
    return client.submit(document, options, max_seconds=60, tenant="t")


async def all_of(events: AsyncIterator[Event]) -> list[tuple[Any, ...]]:
    return [told(event) async for event in events]


def kept(events: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Pictures and the end; other events are merged while nobody reads."""
    return [event for event in events if event[0] in ("done", "finished")]


def test_documents_at_once_get_what_generate_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(client: RayEngine, handle: Handle, _: Deployed) -> None:
        streams = [submitted(client, *one) for one in 3 * DOCUMENTS]
        for stream, (document, options) in zip(streams, 3 * DOCUMENTS, strict=True):
            expected = [told(event) for event in generate(fake_runtime()[0], document, options)]
            assert kept(await all_of(stream)) == kept(expected)
            assert stream.stats is not None and stream.stats.total > 0
        assert handle.affinities[:3] == [hash_of_beginning(one, "t") for one, _ in DOCUMENTS]
        await until(lambda: client.documents == 0)

    deployed(monkeypatch, scenario)


def test_a_cancelled_document_ends_in_the_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(client: RayEngine, _: Handle, ours: Deployed) -> None:
        stream = submitted(client, *LONG)
        await anext(stream)
        stream.cancel()
        *_, (_, reason, _, _) = await all_of(stream)
        assert reason == "cancelled"
        await until(lambda: ours.engine.stats().running == 0)
        assert ours.engine.stats().ended.get("cancelled") == 1

    deployed(monkeypatch, scenario)


def test_the_death_of_a_replica_ends_its_documents_with_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(client: RayEngine, handle: Handle, _: Deployed) -> None:
        stream = submitted(client, *LONG)
        await anext(stream)
        handle.dead = True
        with pytest.raises(EngineDied):
            await all_of(stream)

    deployed(monkeypatch, scenario)


def test_an_error_of_the_document_keeps_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(client: RayEngine, *_: object) -> None:
        with pytest.raises(DocumentError, match="w99"):
            await all_of(submitted(client, document_of(Text("w99")), GenerationOptions()))

    deployed(monkeypatch, scenario)


def test_the_client_follows_the_number_of_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(client: RayEngine, _: Handle, ours: Deployed) -> None:
        for running, state in ((2, "ready"), (0, "restarting"), (1, "ready")):
            ours.running = running
            await until(lambda: client.ready.slots == SLOTS * ours.running)  # type: ignore[union-attr]
            assert client.state == state
            if not running:
                with pytest.raises(EngineError):
                    submitted(client, *LONG)
        assert client.restarts == 1
        stats = await client.stats()
        assert stats is not None and stats["slots"] == SLOTS and stats["running"] == 0
        stream = submitted(client, *LONG)
        await anext(stream)
        stats = await client.stats()
        assert stats is not None and (stats["running"], stats["waiting"]) == (1, 0)
        stream.cancel()
        await until(lambda: client.documents == 0)
        stats = await client.stats()
        assert stats is not None and (stats["running"], stats["waiting"]) == (0, 0)

    deployed(monkeypatch, scenario)


def test_a_deployment_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("no bundle\nat all")

    async def run() -> None:
        monkeypatch.setattr(module, "_deploy", refused)
        monkeypatch.setattr(module, "_shut_down", lambda: None)
        lines: list[str] = []
        replicas = Replicas(1, 1, SLOTS)
        client = RayEngine(OpenOptions("b"), lambda _: None, lines.append, replicas=replicas)
        client.start()
        await until(lambda: client.state == "failed")
        assert lines == ["the engine cannot be deployed: no bundle at all"]
        await client.close()

    asyncio.run(run())


def test_documents_move_only_with_their_own_replica() -> None:
    def usual(affinity: int, replicas: set[str]) -> str:
        return min(replicas, key=lambda one: weight(affinity, one))

    names = {"a", "b", "c", "d"}
    before = {affinity: usual(affinity, names) for affinity in range(400)}
    assert all(80 < list(before.values()).count(name) < 120 for name in names)
    for gone in names:
        after = {affinity: usual(affinity, names - {gone}) for affinity in before}
        assert all(after[one] == name for one, name in before.items() if name != gone)


@pytest.mark.parametrize("text, numbers", [("1", (1, 1)), ("3", (3, 3)), ("1:8", (1, 8))])
def test_replicas_are_a_number_or_two(text: str, numbers: tuple[int, int]) -> None:
    assert Replicas.parse(text) == numbers


@pytest.mark.parametrize("text", ["", "0", "2:1", "a", "1:2:3", "-1", "1.5"])
def test_other_words_are_no_number_of_replicas(text: str) -> None:
    with pytest.raises(ConfigError, match="LEAST:MOST"):
        Replicas.parse(text)
