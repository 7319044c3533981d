"""Client of the replicas: in the front's eyes one engine, whose slots are those of all of them."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mmi_deploy.documents.document import Document
from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.runtime.events import Event, Finished, ImageDone, TextDelta
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.timings import Timings
from mmi_deploy.server.engine.affinity import hash_of_beginning
from mmi_deploy.server.engine.client import EngineClient, EngineDied, Readiness, RemoteEvents
from mmi_deploy.server.engine.messages import (
    Arrays,
    pack,
    pack_document,
    pack_options,
    split,
    unpack_event,
)
from mmi_deploy.server.engine.open_options import OpenOptions

# Names in Ray.
APPLICATION, DEPLOYMENT = "mmi", "EngineReplica"

# Seconds between two looks at the number of replicas.
LOOK = 0.5

# Memory of a Ray of our own for messages, in bytes.
STORE = 2**28


@dataclass(frozen=True)
class Replicas:
    """Replicas of the engine. least, most: their number. slots: documents at once that one should
    have; more of them start another replica. cpus, gpus: of each. address: of a cluster, None for a
    Ray of our own on this machine."""

    least: int
    most: int
    slots: int
    cpus: float = 1
    gpus: float = 0
    address: str | None = None

    @classmethod
    def parse(cls, text: str) -> tuple[int, int]:
        """Least and most of `2` or `1:8`. Raises `ConfigError`."""
        least, _, most = text.partition(":")
        try:
            numbers = int(least), int(most or least)
        except ValueError:
            numbers = 0, 0
        if not 1 <= numbers[0] <= numbers[1]:
            raise ConfigError("--replicas is malformed", expected="N or LEAST:MOST", got=text)
        return numbers


class RayEngine(EngineClient):
    """The deployment, with the methods of an engine process."""

    def __init__(
        self,
        options: OpenOptions,
        changed: Callable[[EngineClient], None],
        say: Callable[[str], None],
        *,
        replicas: Replicas,
    ) -> None:
        super().__init__(options, changed, say)
        self._replicas = replicas
        self._handle: Any = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._streams: dict[RemoteEvents, Any] = {}
        self._begun: set[RemoteEvents] = set()  # those that have had an event

    @property
    def documents(self) -> int:
        """Documents that the replicas have of this front."""
        return len(self._tasks)

    def submit(
        self, document: Document, options: GenerationOptions, *, max_seconds: float, tenant: str
    ) -> RemoteEvents:
        """Send a document to a replica. Raises `EngineError` unless there is one."""
        if self.state != "ready":
            raise EngineError("the engine is not ready")
        arrays = Arrays()
        header = {
            "parts": pack_document(document, arrays),
            "options": pack_options(options),
            "max_seconds": max_seconds,
            "tenant": tenant,
        }
        affinity = hash_of_beginning(document, tenant)
        stream = self._handle.options(stream=True).generate.remote(affinity, pack(header, arrays))
        events = RemoteEvents(stream.cancel)
        task = asyncio.get_running_loop().create_task(self._read(stream, events))
        self._tasks.add(task)
        self._streams[events] = stream
        task.add_done_callback(self._tasks.discard)
        return events

    async def stats(self, seconds: float = 2.0) -> Mapping[str, Any] | None:
        """Statistics of one replica, with the slots of all and the documents of this front; None if
        it does not answer in time."""
        if self.state != "ready" or self.ready is None:
            return None
        try:
            found: Mapping[str, Any] = await asyncio.wait_for(self._call("stats"), seconds)
        except Exception:
            return None
        running = len(self._begun)
        waiting = self.documents - running
        return {**found, "slots": self.ready.slots, "running": running, "waiting": waiting}

    def drain(self) -> None:
        """Nothing: replicas may have documents of other fronts, and this one sends no more."""

    def cancel_all(self) -> None:
        """End all documents of this front."""
        for events in list(self._streams):
            events.cancel()

    def kill(self) -> None:
        """Nothing: Ray ends its own processes with the front, those of a cluster stay."""

    async def close(self) -> None:
        """End the documents of this front, and a Ray of our own."""
        self.cancel_all()
        await super().close()
        if self._replicas.address is None:
            await asyncio.to_thread(_shut_down)

    async def _supervise(self) -> None:
        """Deploy, then follow the number of replicas."""
        try:
            self._handle = await asyncio.to_thread(_deploy, self.options, self._replicas)
            _take_signals_back()
            about = await self._call("describe")
        except Exception as error:
            self.refusal = " ".join(str(error).split())[:2000]
            self._say(f"the engine cannot be deployed: {self.refusal}")
            self._enter("failed")
            return
        before = 0
        while True:
            running = await asyncio.to_thread(_running)
            if running != before:
                self._say(f"{running} of {self._replicas.least} to {self._replicas.most} replicas")
                slots = running * about["slots"]
                self.ready = Readiness(
                    about["pid"], slots, about["text_gap_bound"], about["kernels"]
                )
                self.restarts += running < before
                self._enter("ready" if running else "restarting")
                before = running
            await asyncio.sleep(LOOK)

    async def _read(self, stream: Any, events: RemoteEvents) -> None:
        """Pass on the events of a document."""
        loop, tokens, images, last = asyncio.get_running_loop(), 0, 0, False
        try:
            async for message in stream:
                self.last_message = loop.time()
                self._begun.add(events)
                header, arrays = split(message)
                item, stats, last = unpack_event(header["event"], arrays)
                events.stats = stats
                tokens = item.tokens if isinstance(item, TextDelta) else tokens
                images += isinstance(item, ImageDone)
                events.put(item, last)
        except BaseException as error:
            if not last:
                events.put(_end_of(error, stream, tokens, images), last=True)
            if isinstance(error, asyncio.CancelledError) and not stream.cancelled():
                raise
        finally:
            self._streams.pop(events, None)
            self._begun.discard(events)

    async def _call(self, method: str) -> Any:
        return await getattr(self._handle, method).remote(0)


def _end_of(error: BaseException, stream: Any, tokens: int, images: int) -> Event | EngineError:
    """End of a document whose messages ended without it."""
    if stream.cancelled():
        return Finished("cancelled", tokens, images, Timings())
    return EngineDied("the replica died")


def _deploy(options: OpenOptions, replicas: Replicas) -> Any:
    """Start the deployment, or find it unchanged; returns its handle once a replica is ready."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # 30 s are short on a busy machine
    import ray
    from ray import serve
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig

    from mmi_deploy.server.ray.replica import EngineReplica

    own = {"object_store_memory": STORE} if replicas.address is None else {}
    ray.init(
        replicas.address or "local",
        namespace=APPLICATION,
        include_dashboard=None if replicas.address else False,
        log_to_driver=False,
        configure_logging=False,
        **own,
    )
    serve.start(proxy_location="Disabled")  # HTTP is the front's
    deployment = serve.deployment(
        EngineReplica,
        name=DEPLOYMENT,
        autoscaling_config=AutoscalingConfig(
            min_replicas=replicas.least,
            initial_replicas=replicas.least,
            max_replicas=replicas.most,
            target_ongoing_requests=replicas.slots,
        ),
        # A few more than it can run, so that a free slot does not wait for the next.
        max_ongoing_requests=2 * replicas.slots,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        request_router_config=RequestRouterConfig(
            request_router_class="mmi_deploy.server.ray.affinity_router.AffinityRouter"
        ),
        health_check_period_s=2,
        graceful_shutdown_timeout_s=60,
    )
    return serve.run(deployment.bind(asdict(options)), name=APPLICATION, route_prefix=None)


def _take_signals_back() -> None:
    """Install Python's own handling of SIGTERM and SIGINT again: Ray's ends the process."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.getsignal(number))
            signal.siginterrupt(number, False)


def _running() -> int:
    """Replicas that take documents."""
    from ray import serve

    application = serve.status().applications.get(APPLICATION)
    if application is None:
        return 0
    states = application.deployments[DEPLOYMENT].replica_states
    return int(states.get("RUNNING", 0))


def _shut_down() -> None:
    import ray
    from ray import serve

    if ray.is_initialized():
        serve.shutdown()
        ray.shutdown()
