"""The page of the API is what the server says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from mmi_deploy.server.http.api_page import page
from mmi_deploy.server.http.application import routes
from mmi_deploy.server.http.service import Service


def schema() -> dict[str, Any]:
    return routes(cast(Service, None)).openapi()


def test_docs_api_md_is_made_from_the_schema(repository: Path) -> None:
    made = page(routes(cast(Service, None))).rstrip() + "\n"
    assert (repository / "docs" / "api.md").read_text().rstrip() + "\n" == made, (
        "write it again: python -m mmi_deploy.server.http.api_page > docs/api.md"
    )


def test_every_route_says_what_it_takes_and_answers() -> None:
    for path, methods in schema()["paths"].items():
        for method, route in methods.items():
            assert route["summary"], path
            assert {"200", "default"} <= set(route["responses"]), path
            if method == "post":
                body = route["requestBody"]["content"]["application/json"]["schema"]
                assert body["additionalProperties"] is False and body["examples"], path


def test_streams_are_in_the_schema_where_they_exist() -> None:
    paths = schema()["paths"]
    streaming = {
        path
        for path, methods in paths.items()
        for route in methods.values()
        if "text/event-stream" in route["responses"]["200"]["content"]
    }
    assert streaming == {
        "/v1/responses",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/images/generations",
    }
