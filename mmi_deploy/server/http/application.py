"""Application: the routes, each a few lines between the wire formats and the service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from mmi_deploy.server.api import (
    chat,
    completions,
    image_generations,
    models,
    responses,
    tokens,
)
from mmi_deploy.server.api.api_request import ApiRequest
from mmi_deploy.server.api.errors import ApiError, api_error_of
from mmi_deploy.server.api.reply_context import ReplyContext
from mmi_deploy.server.http.body import read_json
from mmi_deploy.server.http.error_response import error_response
from mmi_deploy.server.http.gate import Gate
from mmi_deploy.server.http.generation_response import GenerationResponse
from mmi_deploy.server.http.observed_events import ObservedEvents
from mmi_deploy.server.http.openapi import answers, described
from mmi_deploy.server.http.page_files import INDEX, PageFiles
from mmi_deploy.server.http.picture_store import PATH
from mmi_deploy.server.http.service import Service

# Bytes of a body below which it is read without a thread, unless it has pictures: some hundred
# bytes may be millions of pixels.
INLINE = 4096

# Keys of pictures in bodies.
PICTURES = ("image_url", "result")


@dataclass(frozen=True)
class Endpoint:
    """Endpoint that generates: its module of wire formats, and whether one request may be several
    documents, so that `reply` and `stream` take a list of events."""

    path: str
    formats: Any
    several: bool = False


ENDPOINTS = (
    Endpoint("/v1/responses", responses),
    Endpoint("/v1/chat/completions", chat),
    Endpoint("/v1/completions", completions),
    Endpoint("/v1/images/generations", image_generations, several=True),
)


def application(service: Service) -> ASGIApp:
    """The routes over a service, behind the gate."""
    return Gate(routes(service), service)


def routes(service: Service) -> FastAPI:
    """The routes over a service."""
    app = FastAPI(
        title="mmi serve",
        version=version("mmi_deploy"),
        description="Interleaved text and pictures, in the order in which the model made them.",
        docs_url=None,  # both load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(Exception, _unexpected)
    for endpoint in ENDPOINTS:
        handler, formats = _generation(service, endpoint), endpoint.formats
        documented = described(formats, formats.REQUEST_SCHEMA, streams=True)
        app.add_api_route(endpoint.path, handler, methods=["POST"], **documented)
    _add_models(app, service)
    _add_tokens(app, service)
    _add_health(app, service)
    _add_page(app)
    return app


# Generations.

Handler = Callable[[Request], Awaitable[Response]]
Result = TypeVar("Result")


def _generation(service: Service, endpoint: Endpoint) -> Handler:
    """Handler of an endpoint that generates."""

    async def handle(request: Request) -> Response:
        service.check_ready()  # before a large body is read
        state = request.scope["state"]
        body, limits = await _body(service, request), service.settings.limits
        fetch = _fetch(service, request)
        reading = partial(endpoint.formats.read, body, service.model, limits, fetch)
        read: ApiRequest = await _in_thread(service, request, body, reading)
        documents = service.submit(read.requests, state["tenant"], state["begun"])
        return _response(service, endpoint, read, documents, request)

    return handle


async def _body(service: Service, request: Request) -> dict[str, Any]:
    """JSON of a request. Raises `ApiError`."""
    settings = service.settings
    return await read_json(
        request.scope, request.receive, settings.limits.body_bytes, settings.body_seconds
    )


def _fetch(service: Service, request: Request) -> Callable[[str], bytes]:
    """Reader of pictures that are no data URLs, in the name of the request's tenant."""
    tenant = request.scope["state"]["tenant"]
    return lambda url: service.fetch(url, tenant)


async def _in_thread(
    service: Service, request: Request, body: dict[str, Any], read: Callable[[], Result]
) -> Result:
    """Read a body, in a thread if it has pictures, which take long to decode or to fetch."""
    if int(request.headers.get("content-length", INLINE)) < INLINE and not _has_pictures(body):
        return read()
    return await asyncio.get_running_loop().run_in_executor(service.readers, read)


def _has_pictures(value: object) -> bool:
    if isinstance(value, dict):
        return any(key in PICTURES or _has_pictures(one) for key, one in value.items())
    return isinstance(value, list) and any(map(_has_pictures, value))


def _response(
    service: Service,
    endpoint: Endpoint,
    read: ApiRequest,
    documents: list[ObservedEvents],
    request: Request,
) -> Response:
    state, formats = request.scope["state"], endpoint.formats
    context = ReplyContext(
        model=service.model,
        rules=service.settings.rules,
        request_id=state["request_id"],
        created=int(time.time()),
        encode=service.encode,
        store=lambda data, mime: service.pictures.put(data, mime, state["tenant"]),
        stats=lambda: documents[0].stats,
    )
    events = documents if endpoint.several else documents[0]
    return GenerationResponse(
        documents,
        reply=lambda: formats.reply(read, events, context),
        stream=(lambda: formats.stream(read, events, context)) if read.stream else None,
        failure=lambda error: formats.failure(read, error, context),
        keep_alive=formats.KEEP_ALIVE(read, context),
        rules=service.settings.rules,
    )


# Models, tokens, pictures.


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", summary="The model that is served", responses=answers())
    async def list_models() -> JSONResponse:
        return JSONResponse(
            models.list_models(
                service.model,
                service.settings.limits,
                service.settings.rules,
                exactness=service.exactness,
            )
        )

    @app.get("/v1/models/{name:path}", summary="One model", responses=answers())
    async def get_model(name: str) -> JSONResponse:
        return JSONResponse(
            models.get_model(
                name,
                service.model,
                service.settings.limits,
                service.settings.rules,
                exactness=service.exactness,
            )
        )

    @app.get(
        PATH + "{name}",
        summary="A picture of an earlier reply",
        response_class=Response,
        responses=answers(content_type="image/*"),
    )
    async def get_picture(name: str, request: Request) -> Response:
        picture = service.pictures.get(name, request.scope["state"]["tenant"])
        if picture is None:
            raise ApiError(404, "image_not_found", "the picture is not kept, or not any more")
        headers = {"cache-control": "private, max-age=3600, immutable"}
        return Response(picture.data, media_type=picture.mime, headers=headers)

    @app.get("/version", summary="Version and fingerprint", responses=answers())
    async def get_version() -> JSONResponse:
        model = service.model
        return JSONResponse(
            {
                "version": version("mmi_deploy"),
                "target": model.target,
                "fingerprint": model.fingerprint,
            }
        )


def _add_tokens(app: FastAPI, service: Service) -> None:
    async def tokenize(request: Request) -> JSONResponse:
        body, limits = await _body(service, request), service.settings.limits
        fetch = _fetch(service, request)
        read = partial(tokens.tokenize, body, service.model, limits, fetch)
        return JSONResponse(await _in_thread(service, request, body, read))

    async def detokenize(request: Request) -> JSONResponse:
        body, limits = await _body(service, request), service.settings.limits
        read = partial(tokens.detokenize, body, service.model, limits)
        return JSONResponse(await _in_thread(service, request, body, read))

    for path, handler, schema in (
        ("/tokenize", tokenize, tokens.TOKENIZE_SCHEMA),
        ("/detokenize", detokenize, tokens.DETOKENIZE_SCHEMA),
    ):
        app.add_api_route(path, handler, methods=["POST"], **described(tokens, schema))


# Health and metrics.


def _add_health(app: FastAPI, service: Service) -> None:
    async def live() -> JSONResponse:
        return JSONResponse({"status": "live"})

    async def ready() -> JSONResponse:
        service.check_ready()
        return JSONResponse({"status": "ready", "documents": service.documents})

    for path, handler, summary in (
        ("/health/live", live, "200 while the server answers"),
        ("/health/ready", ready, "200 if documents are taken"),
        ("/health", ready, "As /health/ready"),
    ):
        app.add_api_route(path, handler, methods=["GET"], summary=summary, responses=answers())
        app.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)

    @app.get(
        "/metrics",
        summary="Prometheus metrics",
        response_class=Response,
        responses=answers(content_type="text/plain"),
    )
    async def get_metrics() -> Response:
        text = await service.collect()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI) -> None:
    page = PageFiles()

    async def index(request: Request) -> Response:
        return page.response(request, INDEX)

    async def file(request: Request, name: str) -> Response:
        return page.response(request, name)

    both = ["GET", "HEAD"]
    app.add_api_route("/", index, methods=both, include_in_schema=False)
    app.add_api_route("/page/{name}", file, methods=both, include_in_schema=False)


# Errors, and the description of bodies.


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: ("not_found", "there is no such path"), 405: ("method", "use another method")}
    code, message = words.get(error.status_code, ("http", "the request cannot be answered"))
    response = error_response(ApiError(error.status_code, code, message))
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _invalid(_: Request, error: Exception) -> Response:
    return error_response(ApiError(400, "invalid_value", "the request cannot be read"))


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _unexpected(_: Request, error: Exception) -> Response:
    return error_response(api_error_of(error))  # the gate logs it
