"""OpenAPI descriptions: bodies, replies and errors of the routes."""

from __future__ import annotations

from typing import Any

JSON = "application/json"
STREAM = "text/event-stream"

ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}

OBJECT: dict[str, Any] = {"type": "object"}


def described(
    module: Any, schema: dict[str, Any] | None = None, *, streams: bool = False
) -> dict[str, Any]:
    """Arguments of `add_api_route` for a route whose docstring is that of `module`.

    schema: of its body, if it has one. streams: its reply may be events.
    """
    summary, _, text = (module.__doc__ or "").strip().partition("\n")
    found: dict[str, Any] = {
        "summary": summary,
        "description": text.strip(),
        "responses": answers(streams),
    }
    if schema is not None:
        content = {JSON: {"schema": schema}}
        found["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    return found


def answers(streams: bool = False, content_type: str = JSON) -> dict[int | str, dict[str, Any]]:
    """Answers of a route: its success, and one shape for all errors."""
    content: dict[str, Any] = {content_type: {"schema": OBJECT if content_type == JSON else {}}}
    if streams:
        # Of no type: some tools read it as that of the stream, others as that of an event.
        content[STREAM] = {"schema": {"description": "Server-sent events, whose data is JSON."}}
    return {
        200: {"description": "The answer.", "content": content},
        "default": {"description": "An error.", "content": {JSON: {"schema": ERROR}}},
    }
