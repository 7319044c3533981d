"""Page of the API in Markdown, from its OpenAPI schema.

`python -m mmi_deploy.server.http.api_page > docs/api.md` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

from fastapi import FastAPI

from mmi_deploy.server.http.application import routes
from mmi_deploy.server.http.service import Service

NO_EFFECT = "Accepted, without an effect."

HEAD = """# API of `mmi serve`

Made from the server's `/openapi.json` by `python -m mmi_deploy.server.http.api_page`, and held to
it by a test. What the endpoints have in common, and which clients can take what, is in
[server.md](server.md).

Errors have OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.
"""


def page(app: FastAPI) -> str:
    """The page of an application."""
    schema = app.openapi()
    return "\n".join([HEAD, *_lines(schema["paths"])])


def _lines(paths: Mapping[str, Any]) -> Iterator[str]:
    for path, methods in paths.items():
        for method, route in methods.items():
            yield f"## `{method.upper()} {path}`\n"
            yield route["summary"] + "\n"
            if text := route.get("description", ""):
                yield text + "\n"
            body = route.get("requestBody")
            if body:
                yield from _body(path, body["content"]["application/json"]["schema"])


def _body(path: str, schema: Mapping[str, Any]) -> Iterator[str]:
    required = schema.get("required", [])
    neutral = []
    yield "| field | type | |\n|---|---|---|"
    for name, field in schema["properties"].items():
        if field.get("description") == NO_EFFECT:
            neutral.append(f"| `{name}` | {_type(field)} |")
            continue
        text = field.get("description", "")
        text = f"**Required.** {text}" if name in required else text
        yield f"| `{name}` | {_type(field)} | {text.replace('|', chr(92) + '|')} |"
        for inner, own in _fields(field):
            yield f"| `{name}.{inner}` | {_type(own)} | {own.get('description', '')} |"
    yield ""
    if neutral:
        yield f"{NO_EFFECT} Other values are refused:\n\n| field | values |\n|---|---|"
        yield "\n".join(neutral) + "\n"
    for example in schema.get("examples", ()):
        text = json.dumps(example, ensure_ascii=False)
        yield f"```\ncurl http://127.0.0.1:8000{path} -H 'content-type: application/json' -d \\"
        yield f"  '{text}'\n```\n"


def _fields(field: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Fields of an object of options; others, as messages, are described in words."""
    for one in (field, *field.get("anyOf", ())):
        if one.get("type") == "object" and "properties" in one:
            return list(one["properties"].items())
    return []


def _type(field: Mapping[str, Any]) -> str:
    """Type of a field, with its bounds."""
    if "anyOf" in field or "oneOf" in field:
        kinds = [_type(one) for one in field.get("anyOf", field.get("oneOf", ()))]
        return " or ".join(dict.fromkeys(kind for kind in kinds if kind != "null"))
    if "enum" in field:
        return ", ".join(dict.fromkeys(f"`{json.dumps(value)}`" for value in field["enum"]))
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    kind = str(field.get("type", "any"))
    low = field.get("minimum", field.get("exclusiveMinimum"))
    high = field.get("maximum", field.get("exclusiveMaximum"))
    if kind == "array":
        return f"list of {_type(field.get('items', {}))}"
    if low is None or high is None or high > 2**50:
        return kind
    return f"{kind}, {low:g} to {high:g}"


if __name__ == "__main__":
    print(page(routes(cast(Service, None))))  # no request is answered
