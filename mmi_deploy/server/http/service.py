"""Service: the engines, the model and what all requests share; admission of documents."""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from PIL import Image

from mmi_deploy.documents.document import Document, Text
from mmi_deploy.documents.images import Rgb, to_png
from mmi_deploy.errors import BusyError, ConfigError, DocumentError, MmiError
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.server.api import models
from mmi_deploy.server.api.api_request import ApiRequest, OutputFormat
from mmi_deploy.server.api.errors import ApiError, api_error_of
from mmi_deploy.server.api.usage import picture_tokens
from mmi_deploy.server.engine.affinity import hash_of_beginning
from mmi_deploy.server.engine.client import EngineClient, EngineDied
from mmi_deploy.server.engine.open_options import OpenOptions, bundle_digest
from mmi_deploy.server.http.image_fetch import ImageFetch
from mmi_deploy.server.http.keys import Keys
from mmi_deploy.server.http.metrics import Metrics
from mmi_deploy.server.http.observed_events import ObservedEvents
from mmi_deploy.server.http.picture_store import PATH, PictureStore
from mmi_deploy.server.http.tracing import NoTracing, Tracing
from mmi_deploy.server.served_model import ServedModel
from mmi_deploy.server.settings import ServerSettings
from mmi_deploy.spec.backends import CPU

State = Literal["starting", "ready", "draining", "engine_died", "failed"]

# Documents whose ends tell how fast the queue moves.
RECENT = 32

# Seconds between two looks at the bundle and at idle engines.
WATCH = 5.0

# Bounds of the seconds in `Retry-After`; `openai` does not retry at all above 120.
SOONEST, LATEST = 1, 60

JPEG_QUALITY = 90

# Threads that read bodies with pictures; more where these may be waited for.
READERS, FETCHING_READERS = 2, 16


class Service:
    """Everything behind the routes. All methods are called in the event loop."""

    def __init__(
        self,
        model: ServedModel,
        engines: Sequence[OpenOptions],
        settings: ServerSettings,
        log: logging.Logger,
        tracing: Tracing | None = None,
        client: Callable[..., EngineClient] = EngineClient,
    ) -> None:
        """engines: options of each engine process. client: makes the client of one."""
        self.tracing = tracing or NoTracing()
        self.settings, self.log, self._base = settings, log, model
        self.model = model  # with the fingerprint, once an engine is ready
        self.engines = [client(options, self._changed, self._say) for options in engines]
        self.metrics, self.keys = Metrics(), Keys(settings.keys)
        self.pictures = PictureStore(settings.picture_seconds, settings.picture_bytes)
        self._remote = (
            ImageFetch(settings.image_hosts, settings.limits.image_bytes)
            if settings.image_hosts
            else None
        )
        # Apart, so that large pictures, or slow hosts of them, hold up no replies.
        readers = FETCHING_READERS if self._remote else READERS
        self.readers = ThreadPoolExecutor(readers, thread_name_prefix="mmi-reader")
        self.encoders = ThreadPoolExecutor(2, thread_name_prefix="mmi-encoder")
        self.draining = False
        self.requests = 0  # in flight, of any kind
        self.changed = asyncio.Event()  # of any state; whoever waits clears it
        self._ends: deque[float] = deque(maxlen=RECENT)
        self.was_ready = False
        self._restarts = 0

    def start(self) -> None:
        """Start the engine processes."""
        for engine in self.engines:
            engine.start()

    async def close(self) -> None:
        """End the engine processes at once."""
        await asyncio.gather(*(engine.close() for engine in self.engines))
        await asyncio.to_thread(self.tracing.close)
        for pool in (self.readers, self.encoders):
            pool.shutdown(wait=False, cancel_futures=True)

    def kill(self) -> None:
        """End the engine processes without waiting."""
        for engine in self.engines:
            engine.kill()

    # State.

    @property
    def state(self) -> State:
        """State of the whole server: it is ready with one engine that is."""
        if self.draining:
            return "draining"
        states = {engine.state for engine in self.engines}
        if "ready" in states:
            return "ready"
        if states <= {"failed", "closed"}:
            return "failed"
        return "engine_died" if self.was_ready else "starting"

    def check_ready(self) -> None:
        """Raise `ApiError` 503 unless documents are taken, and an engine that works answers."""
        state = self.state
        if state != "ready":
            self.metrics.rejected.labels(state).inc()
            raise _unavailable(state)
        if all(self._stalled(engine) for engine in self._ready_engines()):
            raise ApiError(503, "stalled", "the engine does not answer", retry_after=LATEST)

    def _stalled(self, engine: EngineClient) -> bool:
        """True if a busy engine has sent nothing for long."""
        silent = asyncio.get_running_loop().time() - engine.last_message
        return engine.documents > 0 and silent > self.settings.stall_seconds

    def _ready_engines(self) -> list[EngineClient]:
        return [engine for engine in self.engines if engine.state == "ready"]

    def _changed(self, engine: EngineClient) -> None:
        if engine.state == "ready" and engine.ready is not None:
            self.was_ready = True
            parts = (engine.options.digest, self._base.target, version("mmi_deploy"))
            digest = sha256("\0".join((*parts, engine.ready.kernels)).encode()).hexdigest()
            self.model = replace(self._base, fingerprint=f"mmi-{digest[:12]}")
            self.metrics.build.clear()
            build = (version("mmi_deploy"), self.model.target, self.model.fingerprint)
            self.metrics.build.labels(*build).set(1)
        restarts = sum(other.restarts for other in self.engines)
        self.metrics.restarts.inc(restarts - self._restarts)
        self._restarts = restarts
        self.changed.set()

    def _say(self, line: str) -> None:
        self.log.warning(line)

    # Documents.

    def submit(
        self, requests: Sequence[ApiRequest], tenant: str, begun: float
    ) -> list[ObservedEvents]:
        """Give documents to an engine, all or none. begun: time of their request. Raises `ApiError`
        if no engine takes them now."""
        self.check_ready()
        engine = self._engine_for(requests[0].document, tenant)
        assert engine.ready is not None, "an engine is ready"
        if engine.documents + len(requests) > engine.ready.slots + self.settings.queue:
            self.metrics.rejected.labels("queue_full").inc()
            raise ApiError(
                429,
                "queue_full",
                f"{self.settings.queue} documents are waiting; try again later",
                retry_after=self.retry_after(),
            )
        cached_by = "" if self.settings.share_cache else tenant
        found = []
        for one in requests:
            events = engine.submit(
                one.document, one.options, max_seconds=one.max_seconds, tenant=cached_by
            )
            self.metrics.tokens.labels("prompt_text").inc(one.prompt_usage.text)
            self.metrics.tokens.labels("prompt_image").inc(one.prompt_usage.image)
            given = one.prompt_usage.image // picture_tokens(self.model.config)
            self.metrics.images.labels("given").inc(given)
            found.append(ObservedEvents(events, self.metrics, begun, self._ended, self._refusal))
        return found

    def _refusal(self, error: MmiError) -> ApiError:
        """Error of the API for an error of a document."""
        if isinstance(error, EngineDied):
            return _unavailable("engine_died")
        if isinstance(error, BusyError):
            self.metrics.rejected.labels("draining" if self.draining else "queue_seconds").inc()
            if self.draining:
                return _unavailable("draining")
            message = f"no slot was free within {self.settings.queue_seconds:g} s; try again later"
            return ApiError(503, "queue_timeout", message, retry_after=self.retry_after())
        if not isinstance(error, DocumentError | ConfigError):
            self.log.error("a document failed", extra={"fields": {"error": str(error)}})
        return api_error_of(error)

    def _engine_for(self, document: Document, tenant: str) -> EngineClient:
        """The engine that has had documents with the same beginning, unless it is much busier than
        another one."""
        engines = self._ready_engines()
        least = min(engines, key=lambda engine: engine.documents)
        if len(engines) == 1:
            return least
        usual = engines[hash_of_beginning(document, tenant) % len(engines)]
        slots = usual.ready.slots if usual.ready is not None else 0
        return usual if usual.documents < max(slots, 2 * least.documents) else least

    def _ended(self) -> None:
        self._ends.append(time.monotonic())

    def retry_after(self) -> int:
        """Seconds until the queue should have moved by half, from the last ends of documents."""
        if len(self._ends) < 2:
            return SOONEST
        rate = (len(self._ends) - 1) / max(self._ends[-1] - self._ends[0], 1e-3)
        seconds = self.settings.queue / 2 / rate
        return max(SOONEST, min(LATEST, round(seconds)))

    def drain(self) -> None:
        """Take no more documents; those that wait are refused, those that run go on."""
        self.draining = True
        for engine in self.engines:
            engine.drain()

    def cancel_all(self) -> None:
        """End all documents within one run of their engines."""
        for engine in self.engines:
            engine.cancel_all()

    @property
    def exactness(self) -> str:
        """Dependence of an answer on what else runs: with our kernels, on the CPU, none."""
        kernels = all(engine.ready and engine.ready.kernels for engine in self.engines)
        return models.EXACT if self.model.target == CPU and kernels else models.WITHIN_RECEIPTS

    @property
    def documents(self) -> int:
        """Documents in all engines."""
        return sum(engine.documents for engine in self.engines)

    # Pictures.

    def fetch(self, url: str, tenant: str) -> bytes:
        """Read a picture that is no data URL: one of this server, or of an allowed host. Runs in a
        thread. Raises `ApiError`."""
        if url.startswith(PATH):
            picture = self.pictures.get(url.removeprefix(PATH), tenant)
            if picture is None:
                raise ApiError(400, "image_not_found", "the picture is not kept, or not any more")
            return picture.data
        if self._remote is None:
            raise ApiError(
                400,
                "remote_images_off",
                "this server fetches no pictures: send the picture itself, as "
                "data:image/png;base64,...",
            )
        return self._remote(url)

    async def encode(self, rgb: Rgb, format: OutputFormat, compression: int | None) -> bytes:
        """Encode a picture in a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.encoders, encode_picture, rgb, format, compression)

    # Checks in the background.

    async def watch(self) -> None:
        """Look whether the bundle has changed on disk, and try idle engines, for as long as the
        server runs."""
        tried = time.monotonic()
        while True:
            await asyncio.sleep(WATCH)
            changed = await asyncio.to_thread(self._bundle_changed)
            if changed and not self.metrics.bundle_changed._value.get():
                self.log.warning("the bundle has changed on disk; the opened one is served")
            self.metrics.bundle_changed.set(changed)
            seconds = self.settings.probe_seconds
            if seconds and time.monotonic() - tried > seconds and self.state == "ready":
                tried = time.monotonic()
                await self._probe()

    def _bundle_changed(self) -> bool:
        options = self.engines[0].options
        try:
            return bundle_digest(Path(options.bundle), options.target) != options.digest
        except OSError:
            return True

    async def _probe(self) -> None:
        """Generate one token on every idle engine."""
        for engine in self._ready_engines():
            if engine.documents:
                continue
            events = engine.submit(
                Document((Text("a"),)),
                GenerationOptions(max_tokens=1, max_images=0),
                max_seconds=self.settings.stall_seconds,
                tenant="probe",
            )
            try:
                async with asyncio.timeout(self.settings.stall_seconds):
                    async for _ in events:
                        pass
            except Exception:
                self.log.error("an idle engine did not generate a token; it is started again")
                engine.kill()

    async def collect(self) -> bytes:
        """The metrics, with fresh statistics of the engines."""
        stats = await asyncio.gather(*(engine.stats(0.5) for engine in self.engines))
        self.metrics.engines.stats = dict(enumerate(stats))
        self.metrics.pictures.set(self.pictures.bytes)
        return self.metrics.text()


def encode_picture(rgb: Rgb, format: OutputFormat, compression: int | None) -> bytes:
    """Encode a picture. compression: quality of JPEG and WebP; lossless WebP without one."""
    if format == "png":
        return to_png(rgb)
    buffer = io.BytesIO()
    image = Image.fromarray(rgb)
    if format == "jpeg":
        image.save(buffer, "JPEG", quality=JPEG_QUALITY if compression is None else compression)
    elif compression is None:
        image.save(buffer, "WEBP", lossless=True)
    else:
        image.save(buffer, "WEBP", quality=compression)
    return buffer.getvalue()


def _unavailable(state: State) -> ApiError:
    messages = {
        "starting": "the engine is starting; try again soon",
        "draining": "the server is shutting down; try another one",
        "engine_died": "the engine died and is started again; try again soon",
        "failed": "the engine cannot be started; see the server's log",
    }
    code = "engine_died" if state == "failed" else state
    return ApiError(
        503, code, messages[state], retry_after=SOONEST if state != "failed" else LATEST
    )
