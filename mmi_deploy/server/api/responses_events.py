"""Events of a document to output items and stream events of `/v1/responses`."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

from mmi_deploy.documents.images import Rgb
from mmi_deploy.runtime.events import (
    Event,
    Finished,
    ImageDone,
    ImageProgress,
    ImageStarted,
    TextDelta,
)
from mmi_deploy.server.api.api_request import ApiRequest
from mmi_deploy.server.api.drawn_images import base64_room, preview_of, size_of
from mmi_deploy.server.api.endings import details, ended_early, finish_reason, usage_of
from mmi_deploy.server.api.errors import ApiError
from mmi_deploy.server.api.picture_urls import chunked, encoded, picture_url
from mmi_deploy.server.api.reply_context import ReplyContext
from mmi_deploy.server.api.usage import Usage, picture_tokens

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ResponsesRequest(ApiRequest):
    """A request of `/v1/responses`.

    places: number of the `mmi.draw` part of the input for each picture of the document that one
    asks for, by the picture's index. echo: fields that the response repeats.
    """

    places: dict[int, int] = field(default_factory=dict)
    echo: Json = field(default_factory=dict)


# Fields of a request that may hold long texts of the client's own; a response may lack them.
_OWN_TEXTS = ("instructions", "metadata", "prompt_cache_key", "safety_identifier", "user")


class ResponseWriter:
    """A response that grows with the events of its document. output: its items so far."""

    def __init__(self, request: ResponsesRequest, context: ReplyContext) -> None:
        self.request, self.context = request, context
        self.output: list[Json] = []
        self._text: str | None = None  # of the message that is being written
        self._picture: ImageStarted | None = None  # that is being drawn
        self._previews = 0  # of this picture
        self._tokens = self._images = 0  # written and drawn so far
        self._sequence = 0
        self._echo = self._short_echo() if request.transport != "inline" else request.echo
        self._finished: Finished | None = None

    # Responses as a whole

    async def take(self, event: Event) -> list[Json]:
        """Events of the API for one event of the document. Raises `ApiError` if it was ended
        early."""
        begun = self._begin()
        match event:
            case TextDelta():
                self._tokens = max(self._tokens, event.tokens)
                return [*begun, *self._write(event.text)]
            case ImageStarted():
                return [*begun, *self._end_message("completed"), *self._start_picture(event)]
            case ImageProgress():
                return [*begun, *await self._progress(event)]
            case ImageDone():
                return [*begun, *await self._end_picture(event)]
            case Finished():
                finish_reason(event.reason, self.request)
                self._finished = event
                return begun

    def _begin(self) -> list[Json]:
        """Events before all others, at the first call."""
        if self._sequence:
            return []
        begun = self._response("in_progress")
        return [self._event(kind, response=begun) for kind in ("created", "in_progress")]

    def end(self) -> list[Json]:
        """The last events, of which the last has the response, after all events of the document.

        Raises `ApiError` if `Finished` was not among them.
        """
        finished = self._finished
        if finished is None:
            raise ended_early()
        incomplete = finish_reason(finished.reason, self.request) == "length"
        status = "incomplete" if incomplete else "completed"
        ended = self._end_message(status)
        stats = self.context.stats()
        usage = usage_of(self.request, finished, stats, self.context.model.config)
        response = self._response(
            status,
            incomplete_details={"reason": "max_output_tokens"} if incomplete else None,
            completed_at=None if incomplete else int(time.time()),
            usage=usage.responses(),
            mmi=details(self.request, finished, stats),
        )
        return [*ended, self._event(status, response=response)]

    def fail(self, error: ApiError) -> list[Json]:
        """The last events after a failure: the response as far as it came."""
        ended = [*self._begin(), *self._end_message("incomplete")]
        if self._picture is not None:
            ended.append(self._end_call("failed", None, {}))
        body = error.body()["error"]
        # Clients check `code` against OpenAI's list; ours is in `mmi`.
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        failure = {**body, "code": code, "mmi": {"code": body["code"]}}
        return [*ended, self._event("failed", response=self._response("failed", error=failure))]

    def _short_echo(self) -> Json:
        """Repeat the request without the client's own texts, if those fill a line."""
        echo = self.request.echo
        if len(json.dumps(echo)) <= self.context.rules.event_bytes // 4:
            return echo
        return {name: value for name, value in echo.items() if name not in _OWN_TEXTS}

    def _response(self, status: str, **fields: Any) -> Json:
        """The response so far."""
        return {
            "id": f"resp_{self.context.request_id}",
            "object": "response",
            "created_at": self.context.created,
            "model": self.context.model.name,
            "system_fingerprint": self.context.model.fingerprint,
            "status": status,
            "background": False,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "output": [*self.output],
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "text": {"format": {"type": "text"}},
            "top_logprobs": 0,
            "truncation": "disabled",
            "usage": None,
            "mmi": {"seed": self.request.options.seed},
            **self._echo,
            **fields,
        }

    # Text

    def _write(self, text: str) -> list[Json]:
        if not text:
            return []
        begun = []
        if self._text is None:
            self._text = ""
            item = self._message("in_progress", [])
            begun = [
                self._event("output_item.added", output_index=self._index, item=item),
                self._in_part("content_part.added", part=_text_part("")),
            ]
        self._text += text
        return [*begun, self._in_part("output_text.delta", delta=text, logprobs=[])]

    def _end_message(self, status: str) -> list[Json]:
        if self._text is None:
            return []
        text, index = self._text, self._index
        part = _text_part(text)
        item = self._message(status, [part])
        events = [
            self._in_part("output_text.done", text=text, logprobs=[]),
            self._in_part("content_part.done", part=part),
            self._event("output_item.done", output_index=index, item=item),
        ]
        self._text = None
        self.output.append(item)
        return events

    def _message(self, status: str, content: list[Json]) -> Json:
        return {
            "id": self._item_id("msg"),
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _in_part(self, kind: str, **fields: Any) -> Json:
        place = {"item_id": self._item_id("msg"), "output_index": self._index, "content_index": 0}
        return self._event(kind, **place, **fields)

    # Pictures

    def _start_picture(self, started: ImageStarted) -> list[Json]:
        self._picture, self._previews = started, 0
        return [
            self._event(
                "output_item.added",
                output_index=self._index,
                item=self._call("in_progress", None, {}),
            ),
            self._in_call("in_progress"),
        ]

    async def _progress(self, progress: ImageProgress) -> list[Json]:
        steps = {"step": progress.step, "steps": progress.of}
        events = [self._in_call("generating", mmi=steps)]
        if progress.preview is not None:
            events.append(await self._partial(progress.preview))
        return events

    async def _partial(self, preview: Rgb) -> Json:
        text, size = await preview_of(preview, self.request, self.context)
        number, self._previews = self._previews, self._previews + 1
        return self._in_call(
            "partial_image",
            partial_image_index=number,
            partial_image_b64=text,
            **{**self._look, "size": size},
        )

    async def _end_picture(self, done: ImageDone) -> list[Json]:
        self._images += 1
        rgb, request, context = done.rgb, self.request, self.context
        if request.transport == "url":
            return self._completed("", {"url": await picture_url(rgb, request, context)})
        result = await encoded(rgb, request, context)
        if request.transport == "inline":
            return self._completed(result, {})
        pieces, offset = [], 0
        for piece in chunked(result, base64_room(context)):
            pieces.append(self._in_call("generating", mmi={"result": piece, "offset": offset}))
            offset += len(piece)
        return [*pieces, *self._completed("", {"result_length": len(result)})]

    def _completed(self, result: str, more: Json) -> list[Json]:
        return [self._in_call("completed"), self._end_call("completed", result, more)]

    def _end_call(self, status: str, result: str | None, more: Json) -> Json:
        item = self._call(status, result, more)
        ended = self._event("output_item.done", output_index=self._index, item=item)
        self._picture = None
        self.output.append(item)
        return ended

    def _call(self, status: str, result: str | None, more: Json) -> Json:
        """Item of the picture that is being drawn."""
        assert self._picture is not None
        place = self.request.places.get(self._picture.index)
        return {
            "id": self._item_id("ig"),
            "type": "image_generation_call",
            "status": status,
            "result": result,
            **self._look,
            "size": size_of(self.context.model),
            "action": "generate",
            "mmi": {
                "seed": self.request.options.seed,
                "steps": self._picture.steps,
                **({} if place is None else {"place": place}),
                **more,
            },
        }

    def _in_call(self, kind: str, **fields: Any) -> Json:
        place = {"item_id": self._item_id("ig"), "output_index": self._index}
        return self._event(f"image_generation_call.{kind}", **place, **fields)

    @property
    def _look(self) -> Json:
        form = self.request.output_format
        return {"output_format": form, "quality": "auto", "background": "opaque"}

    # Shared

    @property
    def _index(self) -> int:
        """Index of the item that is being made."""
        return len(self.output)

    def _item_id(self, kind: str) -> str:
        return f"{kind}_{self.context.request_id}_{self._index}"

    def _event(self, kind: str, **fields: Any) -> Json:
        number, self._sequence = self._sequence, self._sequence + 1
        if self.request.continuous_usage:
            fields["mmi"] = {**fields.get("mmi", {}), "usage": self._usage().responses()}
        return {"type": f"response.{kind}", "sequence_number": number, **fields}

    def _usage(self) -> Usage:
        """Usage so far."""
        each = picture_tokens(self.context.model.config)
        return Usage(self.request.prompt_usage, self._tokens, self._images * each)


def _text_part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
