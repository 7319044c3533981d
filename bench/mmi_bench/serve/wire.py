"""Wire formats: a prompt as the JSON body of an endpoint, and the events of its stream."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image as PillowImage

from mmi_bench.serve.records import RequestEvent, RequestRecord
from mmi_deploy.documents.document import Document, Draw, Image, Part, Text
from mmi_deploy.documents.images import Rgb
from mmi_deploy.errors import ConfigError, MmiError
from mmi_deploy.runtime.options import DEFAULTS, GenerationOptions

Endpoint = Literal["chat", "responses"]
Transport = Literal["inline", "chunked", "url"]

PATHS: Mapping[Endpoint, str] = {"chat": "/v1/chat/completions", "responses": "/v1/responses"}

_DONE = b"[DONE]"


@dataclass(frozen=True)
class Wire:
    """Requests of a run. progress: ask for an event of each denoising step. plain: send no field
    that other servers do not know, and no pictures are drawn. previews: partial pictures."""

    model: str = ""
    endpoint: Endpoint = "chat"
    transport: Transport = "inline"
    progress: bool = True
    plain: bool = False
    previews: int = 0

    def __post_init__(self) -> None:
        """Raise `ConfigError` for an unknown word."""
        for name, words in (("endpoint", Endpoint), ("transport", Transport)):
            if getattr(self, name) not in get_args(words):
                raise ConfigError(
                    f"--{name} is unknown",
                    expected=", ".join(get_args(words)),
                    got=getattr(self, name),
                )

    def body(self, document: Document, options: GenerationOptions) -> bytes:
        """JSON body of a request. Raises `ConfigError` if it draws and the wire is plain."""
        draws = bool(options.max_images) or any(isinstance(p, Draw) for p in document.parts)
        if self.plain and draws:
            raise ConfigError("--plain requests cannot draw", fix="choose a workload of text alone")
        build = _chat if self.endpoint == "chat" else _responses
        return json.dumps(build(self, document, options, draws)).encode()


def _chat(wire: Wire, document: Document, options: GenerationOptions, draws: bool) -> Any:
    body: dict[str, Any] = {
        "model": wire.model,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "messages": [{"role": "user", "content": [_chat_part(part) for part in document.parts]}],
        "max_completion_tokens": options.max_tokens,
        "seed": options.seed,
        **_sampling(options),
    }
    if draws:
        body["modalities"] = ["text", "image"]
    if wire.plain:
        return {**body, "min_tokens": options.min_tokens} if options.min_tokens else body
    return {**body, "mmi": {**_extensions(wire, options), "progress": wire.progress}}


def _responses(wire: Wire, document: Document, options: GenerationOptions, draws: bool) -> Any:
    content = [_responses_part(part) for part in document.parts]
    body: dict[str, Any] = {
        "model": wire.model,
        "stream": True,
        "store": False,
        "input": [{"role": "user", "content": content}],
        "max_output_tokens": options.max_tokens,
        **_sampling(options),
    }
    if draws:
        tool: dict[str, Any] = {"type": "image_generation", "output_format": "png"}
        if wire.previews:
            tool["partial_images"] = wire.previews
        body["tools"] = [tool]
    if wire.plain:
        return body
    return {**body, "mmi": {**_extensions(wire, options), "seed": options.seed}}


def _sampling(options: GenerationOptions) -> dict[str, Any]:
    """Fields of text sampling; those that have their default are left out, temperature and top_p
    aside, whose defaults differ between servers."""
    found: dict[str, Any] = {"temperature": options.temperature, "top_p": options.top_p}
    for name in (
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ):
        if getattr(options, name) != getattr(DEFAULTS, name):
            found[name] = getattr(options, name)
    if options.stop:
        found["stop"] = list(options.stop)
    if options.logit_bias:
        found["logit_bias"] = {str(token): bias for token, bias in dict(options.logit_bias).items()}
    return found


def _extensions(wire: Wire, options: GenerationOptions) -> dict[str, Any]:
    found: dict[str, Any] = {"max_images": options.max_images, "image_transport": wire.transport}
    for name in (
        "min_tokens",
        "draw_first",
        "turn_tokens",
        "schedule",
        "guidance",
        "full_every",
    ):
        if getattr(options, name) != getattr(DEFAULTS, name):
            found[name] = getattr(options, name)
    if wire.previews and wire.endpoint == "chat":
        found["partial_images"] = wire.previews
    return found


def _chat_part(part: Part) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    if isinstance(part, Image):
        return {"type": "image_url", "image_url": {"url": _data_url(part)}}
    return {"type": "mmi.draw"}


def _responses_part(part: Part) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "input_text", "text": part.text}
    if isinstance(part, Image):
        return {"type": "input_image", "image_url": _data_url(part), "detail": "auto"}
    return {"type": "mmi.draw"}


def _data_url(image: Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(quick_png(image.rgb)).decode()}"


def quick_png(rgb: Rgb) -> bytes:
    """Encode as a PNG with little compression: the client shares the machine with the server."""
    buffer = io.BytesIO()
    PillowImage.fromarray(rgb).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def decoded(file: bytes) -> Rgb:
    """Decode the file of a picture, uint8 [height, width, 3]. Raises `MmiError`."""
    try:
        with PillowImage.open(io.BytesIO(file), formats=("PNG", "JPEG", "WEBP")) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise MmiError(f"the server sent a picture that cannot be decoded ({error})") from None


class StreamReader:
    """Turns the data of a stream's events into those of a record.

    fetch: called with the URL of a picture that the stream names instead of carrying it, and with
    its index; it calls `add_picture` later. `finished`: the stream has said that it is complete.
    """

    def __init__(
        self,
        record: RequestRecord,
        endpoint: Endpoint,
        keep: bool,
        fetch: Callable[[str, int, int], None],
    ) -> None:
        """keep: hold the files of pictures in the record's reply."""
        self.record, self.finished = record, False
        self._keep, self._fetch = keep, fetch
        self._read = self._chat if endpoint == "chat" else self._responses
        self._cumulative = 0  # text tokens so far, if the stream counts them
        self._pieces: dict[int, list[str]] = {}  # base64 of each picture, by index
        self._indices: dict[str, int] = {}  # picture of each output item
        self._text = hashlib.sha256()

    def feed(self, data: bytes, now: float) -> None:
        """Read one event. Raises `ValueError` for data that is not an event of the endpoint."""
        if data == _DONE:
            self.finished = True
            return
        value = json.loads(data)
        if not isinstance(value, dict):
            raise ValueError("an event is not a JSON object")
        if value.get("error"):
            self._fail(value["error"])
            return
        self._read(value, now)

    def close(self) -> None:
        """Complete the record after the last event."""
        for index in list(self._pieces):
            self._whole(index)
        record = self.record
        record.text_hash = self._text.hexdigest()
        details = _details(record.usage)
        counted = sum(event.tokens for event in record.events)
        record.tokens = details.get("text_tokens", self._cumulative or counted)

    def add_picture(self, place: int, data: bytes) -> None:
        """Set the file of the picture at a place of the reply."""
        self.record.picture_hashes[place] = hashlib.sha256(data).hexdigest()
        if self._keep:
            seats = [n for n, part in enumerate(self.record.reply.parts) if not _is_text(part)]
            self.record.reply.parts[seats[place]] = data

    def _fail(self, error: Any) -> None:
        found = error if isinstance(error, dict) else {"message": error}
        code = f"{found['code']}: " if found.get("code") else ""
        self.record.error = f"{code}{found.get('message')}"

    def _event(self, now: float, kind: Any, index: int = 0, tokens: int = 0, size: int = 0) -> None:
        self.record.events.append(RequestEvent(now, kind, index, tokens, size))

    def _add_text(self, text: str, now: float, tokens: int) -> None:
        self._event(now, "text", tokens=tokens, size=len(text))
        self._text.update(text.encode(errors="surrogatepass"))
        self.record.reply.add_text(text)

    def _chat(self, value: Mapping[str, Any], now: float) -> None:
        tokens = 1
        if value.get("usage"):
            self.record.usage = value["usage"]
            written = _details(value["usage"]).get("text_tokens")
            if written is not None:
                tokens, self._cumulative = max(0, written - self._cumulative), written
        for choice in value.get("choices") or ():
            delta = choice.get("delta") or {}
            if delta.get("content"):
                self._add_text(delta["content"], now, tokens)
            for image in delta.get("images") or ():
                self._piece(image["index"], image["image_url"]["url"], now)
            if choice.get("finish_reason"):
                self.record.reason = choice["finish_reason"]
        self._extension(value.get("mmi") or {}, now)

    def _extension(self, mmi: Mapping[str, Any], now: float) -> None:
        """Read the `mmi` field of a chunk: progress, or facts about the request."""
        kind, index = mmi.get("type"), mmi.get("index", 0)
        if kind == "image.started":
            self._event(now, "image_start", index)
        elif kind == "image.progress":
            self._event(now, "preview" if _has_picture(mmi) else "progress", index)
        elif kind == "image.preview":
            self._event(now, "preview", index)
        elif kind is None and mmi:
            self.record.server = {**(self.record.server or {}), **mmi}
            self.record.reason = mmi.get("reason", self.record.reason)

    def _piece(self, index: int, url: str, now: float) -> None:
        """Add a picture, or a piece of one; the last piece makes it whole."""
        record = self.record
        if index in self._pieces:
            self._pieces[index].append(url)
            place = max(n for n, e in enumerate(record.events) if e.kind == "image")
            before = record.events.pop(place)
            self._event(now, "image", index, size=before.size + len(url))
            return
        for other in list(self._pieces):
            self._whole(other)
        self._event(now, "image", index, size=len(url))
        record.reply.parts.append(None)
        record.picture_hashes.append("")
        if url.startswith("data:"):
            self._pieces[index] = [url.partition(",")[2]]
        else:
            record.events.pop()  # the picture is whole when it is here
            self._fetch(url, index, len(record.picture_hashes) - 1)

    def _whole(self, index: int) -> None:
        """Decode a picture whose pieces are complete."""
        data = base64.b64decode("".join(self._pieces.pop(index)))
        place = next(n for n, known in enumerate(self.record.picture_hashes) if not known)
        self.add_picture(place, data)

    def _responses(self, value: Mapping[str, Any], now: float) -> None:
        kind = str(value.get("type", "")).removeprefix("response.")
        index = self._index(value)
        if kind == "output_text.delta":
            if value["delta"]:
                self._add_text(value["delta"], now, (value.get("mmi") or {}).get("tokens", 1))
        elif kind == "image_generation_call.in_progress":
            self._event(now, "image_start", index)
        elif kind == "image_generation_call.generating":
            self._event(now, "progress", index)
        elif kind == "image_generation_call.partial_image":
            self._event(now, "preview", index)
        elif kind == "output_item.done":
            item = value["item"]
            if item.get("type") == "image_generation_call":
                url = (item.get("mmi") or {}).get("url")
                self._piece(index, url or f"data:,{item['result']}", now)
        elif kind in ("completed", "incomplete", "failed"):
            self._end_of_response(value["response"], kind)

    def _index(self, value: Mapping[str, Any]) -> int:
        """Number of the picture that an event is about."""
        item = value.get("item_id") or (value.get("item") or {}).get("id")
        if item is None or "image" not in f"{value.get('type')}{value.get('item', {})}":
            return 0
        return self._indices.setdefault(item, len(self._indices))

    def _end_of_response(self, response: Mapping[str, Any], kind: str) -> None:
        self.record.usage = response.get("usage")
        self.record.server = response.get("mmi")
        details = response.get("incomplete_details") or {}
        self.record.reason = (response.get("mmi") or {}).get("reason", details.get("reason", kind))
        if kind == "failed":
            self._fail(response.get("error") or "the response failed")
        else:
            self.finished = True


def _details(usage: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Details of the written tokens, in either endpoint's words."""
    for name in ("completion_tokens_details", "output_tokens_details"):
        if usage and isinstance(usage.get(name), dict):
            return dict(usage[name])
    return {}


def _has_picture(mmi: Mapping[str, Any]) -> bool:
    return any(mmi.get(name) for name in ("b64_json", "partial_image_b64", "image_url", "url"))


def _is_text(part: object) -> bool:
    return isinstance(part, str)
