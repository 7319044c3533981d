"""Gate: what happens to every request before and after its route.

Request ids, the hosts and origins that may call, keys, the log, the count of answers, and the last
resort for errors.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from time import perf_counter
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmi_deploy.server.api.errors import ApiError
from mmi_deploy.server.http.error_response import error_response
from mmi_deploy.server.http.service import Service

# A request's own id is taken if it looks like this.
REQUEST_ID = re.compile(rb"[A-Za-z0-9_-]{1,128}")

# Characters of a `traceparent` header that are kept.
MOST_TRACE = 64

# Status in logs and metrics of a request whose client left before an answer: nginx's.
LEFT = 499

LOOPBACK = ("localhost", "127.0.0.1", "::1")

# Paths that need no key: the page asks for it, and probes have none.
OPEN = ("/", "/health", "/health/live", "/health/ready")
OPEN_FOLDER = "/page/"

SECURITY = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))

# Endpoint in metrics by the beginning of the path; the labels come from this set.
ENDPOINTS = (
    ("/v1/responses", "responses"),
    ("/v1/chat/completions", "chat"),
    ("/v1/completions", "completions"),
    ("/v1/images/generations", "images"),
    ("/v1/mmi/images/", "pictures"),
    ("/v1/models", "models"),
    ("/tokenize", "tokens"),
    ("/detokenize", "tokens"),
    ("/health", "health"),
    ("/metrics", "metrics"),
    ("/page/", "page"),
)


class Gate:
    """ASGI middleware around all routes."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or refuse it, and log it."""
        if scope["type"] != "http":
            return
        begun, status = perf_counter(), 0
        self._service.requests += 1
        headers = dict(scope["headers"])
        request_id = _request_id(headers)
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, begun=begun, facts={"request_id": request_id})
        trace = headers.get(b"traceparent", b"").decode("latin-1")[:MOST_TRACE]
        span = self._service.tracing.begin(scope["method"], endpoint_of(scope["path"]), trace)
        extra = [(b"x-request-id", request_id.encode()), *SECURITY, *self._cross_origin(headers)]

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        try:
            if not self._preflight(scope, headers):
                self._check_caller(scope["path"], headers)
                state["tenant"] = self._tenant(scope["path"], headers)
                await self._app(scope, receive, answer)
            else:
                await answer({"type": "http.response.start", "status": 204, "headers": []})
                await answer({"type": "http.response.body", "body": b""})
        except ApiError as error:
            await error_response(error)(scope, receive, answer)
        except ConnectionError:
            status = LEFT
        except Exception:
            self._service.log.exception(
                "a request failed", extra={"fields": {"request_id": request_id}}
            )
            if not status:
                failed = ApiError(500, "internal_error", "the server failed; its log says why")
                await error_response(failed)(scope, receive, answer)
        finally:
            self._service.requests -= 1
            status = status or LEFT
            span.end(status, state["facts"])
            self._note(scope, trace, status, perf_counter() - begun)

    def _note(self, scope: Scope, trace: str, status: int, seconds: float) -> None:
        endpoint = endpoint_of(scope["path"])
        self._service.metrics.requests.labels(endpoint, str(status)).inc()
        quiet = endpoint in ("health", "metrics", "page")
        fields = {
            "method": scope["method"],
            "endpoint": endpoint,
            "status": status,
            "seconds": round(seconds, 4),
            **scope["state"]["facts"],
        }
        if trace:
            fields["traceparent"] = trace
        log = self._service.log
        (log.debug if quiet else log.info)("request", extra={"fields": fields})

    def _check_caller(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Refuse pages of other sites, and, without keys, names that are not this machine's: a page
        could have its own name resolve to loopback (DNS rebinding). Probes of health come by any
        address, and learn no contents."""
        settings = self._service.settings
        host = headers.get(b"host", b"").decode("latin-1")
        probe = endpoint_of(path) == "health"
        if not (self._service.keys or probe or _is_named(host, (*LOOPBACK, *settings.hosts))):
            raise ApiError(
                403,
                "host_not_allowed",
                "the server does not answer to this name; start it with --allow-host NAME",
            )
        origin = headers.get(b"origin", b"").decode("latin-1")
        own = origin.partition("://")[2] == host
        if origin and not own and origin not in settings.origins:
            raise ApiError(
                403,
                "origin_not_allowed",
                "pages of this origin may not call the server; start it with --allow-origin",
            )

    def _tenant(self, path: str, headers: dict[bytes, bytes]) -> str:
        """Name of the caller's caches. Raises `ApiError` 401 without an accepted key."""
        keys = self._service.keys
        if not keys or path in OPEN or path.startswith(OPEN_FOLDER):
            return ""
        scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        tenant = keys.tenant(key.strip()) if scheme.lower() == "bearer" else None
        if tenant is None:
            raise ApiError(
                401,
                "invalid_api_key",
                "the API key is missing or not accepted; send Authorization: Bearer KEY",
            )
        return tenant

    # Pages of other origins.

    def _cross_origin(self, headers: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        origin = headers.get(b"origin", b"")
        if not origin or origin.decode("latin-1") not in self._service.settings.origins:
            return []
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-allow-headers", b"authorization, content-type, x-request-id"),
            (b"access-control-expose-headers", b"x-request-id, retry-after"),
            (b"vary", b"origin"),
        ]

    def _preflight(self, scope: Scope, headers: dict[bytes, bytes]) -> bool:
        asks = scope["method"] == "OPTIONS" and b"access-control-request-method" in headers
        return asks and bool(self._cross_origin(headers))


def _request_id(headers: dict[bytes, bytes]) -> str:
    given = headers.get(b"x-request-id", b"")
    return given.decode() if REQUEST_ID.fullmatch(given) else f"req-{uuid4().hex}"


def _is_named(host: str, names: Collection[str]) -> bool:
    """True if the `Host` header names one of `names`, at any port."""
    found = _HOST.fullmatch(host)
    if found is None:
        return False
    return (found["name"] or found["address"]).lower() in {name.lower() for name in names}


_HOST = re.compile(r"(?:(?P<name>[A-Za-z0-9._\-]+)|\[(?P<address>[0-9A-Fa-f:.]+)\])(?::\d+)?")


def endpoint_of(path: str) -> str:
    """Endpoint of a path in metrics and logs."""
    for beginning, endpoint in ENDPOINTS:
        if path.startswith(beginning):
            return endpoint
    return "page" if path == "/" else "other"
