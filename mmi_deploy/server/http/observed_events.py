"""Events of one document on their way to the client: looked at for metrics, and for the first one
before an answer begins."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from time import perf_counter

from mmi_deploy.batching.job import JobStats
from mmi_deploy.errors import MmiError
from mmi_deploy.runtime.events import Event, Finished, ImageDone, TextDelta
from mmi_deploy.server.api.errors import ApiError
from mmi_deploy.server.engine.client import RemoteEvents
from mmi_deploy.server.http.metrics import Metrics


class ObservedEvents:
    """Events of an engine; `first` waits for the first of them, which stays to be read."""

    def __init__(
        self,
        events: RemoteEvents,
        metrics: Metrics,
        begun: float,
        ended: Callable[[], None],
        refused: Callable[[MmiError], ApiError],
    ) -> None:
        """begun: time of the request. ended: called at the document's end. refused: what the API
        says of an error."""
        self._events, self._metrics, self._begun = events, metrics, begun
        self._ended, self._refused = ended, refused
        self._first: Event | None = None
        self._text: float | None = None  # time of the last text
        self._image: float | None = None  # time of the last picture
        self._picture_since_text = False
        self._over = False
        self.reason = "error"
        self.tokens = self.images = 0

    @property
    def stats(self) -> JobStats | None:
        """Statistics of the document, once it has ended."""
        return self._events.stats

    def cancel(self, where: str) -> None:
        """End the document, which nobody reads on. where: cause, for the metrics."""
        if self._over:
            return
        self._metrics.cancelled.labels(where).inc()
        self._events.cancel()
        self.reason = "error" if where == "error" else "cancelled"
        self._end()

    @property
    def waiting_bytes(self) -> int:
        """Bytes of pictures that the client has not read."""
        return self._events.bytes

    async def first(self) -> None:
        """Wait for the first event. Raises `ApiError` for a document that ends before it."""
        if self._first is None:
            self._first = await self._next()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if self._first is not None:
            event, self._first = self._first, None
            return event
        return await self._next()

    async def _next(self) -> Event:
        try:
            event = await self._events.__anext__()
        except MmiError as error:
            self._end()
            raise self._refused(error) from error
        self._observe(event)
        return event

    def _observe(self, event: Event) -> None:
        now, metrics = perf_counter(), self._metrics
        match event:
            case TextDelta():
                if self._text is None:
                    metrics.first_token.observe(now - self._begun)
                elif self._picture_since_text:
                    metrics.picture_stall.observe(now - self._text)
                else:
                    metrics.text_gap.observe(now - self._text)
                self._text, self._picture_since_text = now, False
            case ImageDone():
                if self._image is None:
                    metrics.first_image.observe(now - self._begun)
                else:
                    metrics.image_interval.observe(now - self._image)
                self._image, self._picture_since_text = now, True
            case Finished():
                self.reason, self.tokens, self.images = event.reason, event.tokens, event.images
                metrics.tokens.labels("written").inc(event.tokens)
                metrics.images.labels("drawn").inc(event.images)
                self._end()

    def _end(self) -> None:
        if self._over:
            return
        self._over = True
        self._metrics.finished.labels(self.reason).inc()
        self._metrics.seconds.observe(perf_counter() - self._begun)
        if (stats := self._events.stats) is not None:
            self._metrics.queue.observe(stats.queued)
            self._metrics.tokens.labels("cached").inc(stats.cached)
        self._ended()
