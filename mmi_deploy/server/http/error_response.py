"""Errors as responses."""

from __future__ import annotations

from starlette.responses import JSONResponse

from mmi_deploy.server.api.errors import ApiError

# The rest of the request's body may still be on its way.
CLOSING = (408, 413)


def error_response(error: ApiError) -> JSONResponse:
    """Response in OpenAI's shape, with the headers for retries."""
    headers = error.headers()
    if error.status in CLOSING:
        headers["connection"] = "close"
    return JSONResponse(error.body(), error.status, headers)
