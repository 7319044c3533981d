"""Errors of the API, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

# Type of an error by its HTTP status, as OpenAI names them.
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    411: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is not 200: `{"error": {"message", "type", "param", "code"}}`.

    status: HTTP status. code: word for programs. param: field of the request that is at fault.
    retry_after: seconds after which the same request may succeed; None if it never will, or must
    not be repeated by the client on its own.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.param, self.retry_after = param, retry_after

    def body(self) -> dict[str, Any]:
        """JSON of the answer, also the data of an error event in a stream."""
        kind = TYPES.get(self.status, "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Headers that tell clients whether to try again (`openai` reads both)."""
        if self.retry_after is None:
            return {"x-should-retry": "false"}
        return {"x-should-retry": "true", "retry-after": str(self.retry_after)}
