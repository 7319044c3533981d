"""JSON schemas of bodies for /openapi.json."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

# Bounds of a type with a check of its own before, for which pydantic writes its own words.
_BOUNDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
}


def schema_of(kind: type[BaseModel]) -> dict[str, Any]:
    """Schema of a body, whole: a reference could not be resolved inside of another document."""
    schema = kind.model_json_schema()
    found: dict[str, Any] = _whole(schema, schema.pop("$defs", {}))
    return found


def _whole(value: Any, definitions: dict[str, Any]) -> Any:
    """Put definitions in the place of references to them."""
    if isinstance(value, list):
        return [_whole(one, definitions) for one in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[-1]
        rest = {key: one for key, one in value.items() if key != "$ref"}
        return _whole({**definitions[name], **rest}, definitions)
    # A discriminator names references, and says nothing that the choices do not say themselves.
    kept = {key: _whole(one, definitions) for key, one in value.items() if key != "discriminator"}
    if kept.get("type") == "integer":
        return {_BOUNDS.get(key, key): one for key, one in kept.items()}
    return kept
