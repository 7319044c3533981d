"""Errors of the API, in OpenAI's shape."""

from __future__ import annotations

import re
from typing import Any

from mmi_deploy.errors import BusyError, ConfigError, DocumentError, MmiError

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


# Seconds after which a client whose document found the queue full may try again, unless known.
RETRY_AFTER = 1

# Longest message; what goes beyond can only be a part of the request.
MOST_CHARACTERS = 500

# Paths of files and addresses in memory: nothing that a client should see. A slash inside a word,
# as in "and/or", begins no path, nor does that of a mark, as in "</s>".
_HIDDEN = re.compile(
    r"(?<![\w.<])(?:~|\.{1,2})?/[^\s`'\",:;)>]+|\b[A-Za-z]:[\\/][^\s`'\",;)]+|0x[0-9a-fA-F]{6,}"
)


def public(message: str) -> str:
    """A message without paths and memory addresses, and not longer than one should be."""
    message = _HIDDEN.sub("…", message)
    if len(message) > MOST_CHARACTERS:
        return message[: MOST_CHARACTERS - 1] + "…"
    return message


def api_error_of(
    error: Exception, *, param: str | None = None, retry_after: int = RETRY_AFTER
) -> ApiError:
    """The answer for an error of reading a request or of generating its document.

    Documents and options are the client's fault, everything else is the server's, and then the
    message says nothing of its insides: the log has them. retry_after: of a full queue, seconds.
    """
    match error:
        case ApiError():
            return error
        case DocumentError():
            return ApiError(400, "invalid_document", public(str(error)), param=param)
        case ConfigError():
            return ApiError(400, "invalid_value", public(str(error)), param=param)
        case BusyError():
            return ApiError(429, "queue_full", public(str(error)), retry_after=retry_after)
        case MmiError():
            return ApiError(500, "engine_failed", "the engine could not complete the request")
    return ApiError(500, "internal_error", "the server failed; its log says why")
