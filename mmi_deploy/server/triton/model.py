"""Model for the Python backend of Triton: one engine, and a stream of events for each request.

`execute` returns at once, so that any number of requests is running; an event loop in a thread of
its own answers them. Triton looks for the class `TritonPythonModel`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from threading import Thread
from typing import Any

import numpy as np

from mmi_deploy.batching.batch_engine import BatchEngine
from mmi_deploy.batching.event_stream import EventStream
from mmi_deploy.batching.scheduler import DEFAULT_POLICY
from mmi_deploy.documents.images import Rgb
from mmi_deploy.errors import BusyError, MmiError
from mmi_deploy.runtime.events import (
    Event,
    Finished,
    ImageDone,
    ImageProgress,
    ImageStarted,
    TextDelta,
)
from mmi_deploy.server.api.errors import api_error_of
from mmi_deploy.server.settings import RequestLimits
from mmi_deploy.server.triton.request import read_request
from mmi_deploy.server.triton.settings import ModelSettings

# Module of the backend, which exists in its process alone.
UTILS = "triton_python_backend_utils"

# Seconds between two questions whether a client has left: each is a message to the server.
CANCELLED_EVERY = 0.05

# Threads that decode the pictures of requests.
_DECODERS = 2

# Seconds that the end of the model waits for its last responses.
_PATIENCE = 5.0


class TritonPythonModel:
    """The model: Triton calls `initialize` once, `execute` with new requests, `finalize` once."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the engines and run each once; until then the model is not ready."""
        self._utils = import_module(UTILS)
        settings = ModelSettings.of(json.loads(args["model_config"]))
        self._engine = BatchEngine.open(
            settings.bundle,
            target=settings.target,
            slots=settings.slots,
            kernels=settings.kernels,
            threads=settings.threads,
            device=int(args.get("model_instance_device_id", 0)),
        )
        runtime = self._engine.runtime
        self._side = runtime.config.vision.image_size
        self._images = min(runtime.limits.images, runtime.config.llm_mmfs.images - 1)
        self._limits = RequestLimits()
        # Requests at once, those whose pictures are being decoded included.
        self._most = self._engine.stats().slots + DEFAULT_POLICY.queue
        self._answers: set[asyncio.Task[None]] = set()
        self._decoders = ThreadPoolExecutor(_DECODERS, "mmi-decode")
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="mmi-triton", daemon=True)
        self._thread.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Begin to answer requests. Raises nothing: an error is the answer to its request."""
        for request in requests:
            replies = _Replies(self._utils, request.get_response_sender())
            try:
                tensor = self._utils.get_input_tensor_by_name(request, "request")
                data = bytes(tensor.as_numpy().flat[0])
                seconds = request.timeout() / 1e6 or self._limits.seconds
            except Exception as error:
                replies.fail(error)
                continue
            self._loop.call_soon_threadsafe(self._begin, replies, data, seconds)

    def finalize(self) -> None:
        """End the documents that are running, then the threads."""
        self._engine.close()
        answered = asyncio.run_coroutine_threadsafe(self._all_answered(), self._loop)
        with suppress(TimeoutError):  # a server that ends may never take a response
            answered.result(_PATIENCE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE)
        self._decoders.shutdown(wait=False)

    def _begin(self, replies: _Replies, data: bytes, seconds: float) -> None:
        if len(self._answers) >= self._most:
            replies.fail(BusyError(f"the queue is full: {self._most} requests", fix="try later"))
            return
        task = self._loop.create_task(self._answer(replies, data, seconds))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _answer(self, replies: _Replies, data: bytes, seconds: float) -> None:
        """Send the events of a document; whatever happens, the last response is marked as such."""
        try:
            stream = await self._loop.run_in_executor(self._decoders, self._submit, data, seconds)
            watcher = self._loop.create_task(_cancel_if_left(replies, stream))
            try:
                await _send_all(replies, stream)
            finally:
                watcher.cancel()
        except Exception as error:
            replies.fail(error)
        finally:
            replies.end()

    def _submit(self, data: bytes, seconds: float) -> EventStream:
        request = read_request(data, self._side, self._images, self._limits)
        return self._engine.submit(
            request.document, request.options, max_seconds=min(seconds, self._limits.seconds)
        )

    async def _all_answered(self) -> None:
        await asyncio.gather(*self._answers, return_exceptions=True)


async def _send_all(replies: _Replies, stream: EventStream) -> None:
    """Send events as they come, the last one with the measurements of its document."""
    end: Finished | None = None
    async for event in stream:
        if isinstance(event, Finished):
            end = event
        else:
            replies.send(reply_of(event))
    assert end is not None and stream.stats is not None, "a stream ends with `Finished`"
    reply = reply_of(end)
    replies.send(Reply({**reply.event, "stats": asdict(stream.stats)}), last=True)


async def _cancel_if_left(replies: _Replies, stream: EventStream) -> None:
    """Cancel the document when its client has left or cancelled the request."""
    while not replies.cancelled():
        await asyncio.sleep(CANCELLED_EVERY)
    stream.cancel()


@dataclass(frozen=True)
class Reply:
    """One response. event: JSON. image: a picture, uint8 [height, width, 3]."""

    event: Mapping[str, Any]
    image: Rgb | None = None


def reply_of(event: Event) -> Reply:
    """The response for an event."""
    match event:
        case TextDelta():
            return Reply({"type": "text", "text": event.text, "tokens": event.tokens})
        case ImageStarted():
            about = {"index": event.index, "steps": event.steps}
            return Reply({"type": "image.started", **about})
        case ImageProgress():
            about = {"index": event.index, "step": event.step, "steps": event.of}
            return Reply({"type": "image.progress", **about}, event.preview)
        case ImageDone():
            return Reply({"type": "image.done", "index": event.index}, event.rgb)
        case Finished():
            seconds = {stage: total for stage, (total, _) in event.timings.totals().items()}
            return Reply(
                {
                    "type": "finished",
                    "reason": event.reason,
                    "tokens": event.tokens,
                    "images": event.images,
                    "stages": seconds,
                }
            )


class _Replies:
    """Responses to one request; only one of them is the last."""

    def __init__(self, utils: Any, sender: Any) -> None:
        self._utils = utils
        self._sender = sender  # None after the last one: its end is a message to the server too

    def cancelled(self) -> bool:
        """True if the client has left or cancelled the request."""
        return self._sender is not None and bool(self._sender.is_cancelled())

    def send(self, reply: Reply, last: bool = False) -> None:
        """Send a response."""
        tensors = [self._tensor("event", [json.dumps(reply.event).encode()], object)]
        if reply.image is not None:
            tensors.append(self._tensor("image", reply.image, np.uint8))
        self._send(self._utils.InferenceResponse(output_tensors=tensors), last)

    def fail(self, error: Exception) -> None:
        """Send an error as the last response; what the client cannot fix goes to the log."""
        codes, answer = self._utils.TritonError, api_error_of(error)
        kinds = {400: codes.INVALID_ARG, 413: codes.INVALID_ARG, 429: codes.UNAVAILABLE}
        if answer.status not in kinds:
            line = str(error) if isinstance(error, MmiError) else repr(error)
            self._utils.Logger.log_error(f"mmi: {line}")
        if self._sender is not None:
            failure = codes(answer.message, kinds.get(answer.status, codes.INTERNAL))
            self._send(self._utils.InferenceResponse(error=failure), last=True)

    def end(self) -> None:
        """Mark the end of the responses, unless the last one did: without a mark, the server keeps
        the request for ever."""
        if self._sender is not None:
            self._sender.send(flags=self._utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            self._sender = None

    def _send(self, response: Any, last: bool) -> None:
        final = self._utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        self._sender.send(response, flags=final if last else 0)
        if last:
            self._sender = None

    def _tensor(self, name: str, values: Any, dtype: Any) -> Any:
        return self._utils.Tensor(name, np.ascontiguousarray(values, dtype))
