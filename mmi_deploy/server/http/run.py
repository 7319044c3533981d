"""Run the server: a socket, the engines, uvicorn, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress

import uvicorn

from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.server.http.application import application
from mmi_deploy.server.http.protocol import Protocol
from mmi_deploy.server.http.service import Service

# Connections that wait to be accepted.
BACKLOG = 1024

# Hosts that only this machine reaches.
LOOPBACK = ("127.0.0.1", "localhost", "::1")

# Seconds for the answers of documents that were cancelled at the end.
LAST_WORDS = 2.0


def bind(host: str, port: int) -> socket.socket:
    """Open the server's socket. Raises `ConfigError` for a port in use or an unknown address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        # asyncio sets TCP_NODELAY on sockets that say that they are TCP's; without it, the second
        # packet of an answer waits 40 ms for the client's acknowledgement of the first.
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot listen at {host}:{port}: {why.lower()}", fix="choose another --port"
        ) from None
    sock.setblocking(False)
    return sock


def address_of(sock: socket.socket) -> str:
    """URL of a socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn without signal handlers: `serve` drains before it stops the server."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals alone."""
        yield


def run(
    make: Callable[[logging.Logger], Service],
    sock: socket.socket,
    log: logging.Logger,
    *,
    on_ready: Callable[[Service], None],
    exit_on_crash: bool,
) -> int:
    """Make the service in an event loop and serve it; see `serve`."""

    async def served() -> int:
        return await serve(make(log), sock, on_ready=on_ready, exit_on_crash=exit_on_crash)

    return asyncio.run(served())


async def serve(
    service: Service,
    sock: socket.socket,
    *,
    on_ready: Callable[[Service], None],
    exit_on_crash: bool,
) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit code.

    The first signal drains: documents that run go on for at most `drain_seconds`, those that wait
    get 503. The second ends everything at once. on_ready: called when the first engine is ready.
    exit_on_crash: return 1 when no engine is left. Raises `EngineError` if none was ever ready.
    """
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    Protocol.header_seconds = service.settings.header_seconds
    Protocol.unread_seconds = service.settings.rules.slow_client
    config = uvicorn.Config(
        application(service),
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
    )
    server = Server(config)
    service.start()
    http = loop.create_task(server.serve(sockets=[sock]))
    watch = loop.create_task(service.watch())
    states = loop.create_task(_states(service, on_ready))
    stop = loop.create_task(signals.get())
    try:
        await asyncio.wait({http, stop, states}, return_when=asyncio.FIRST_COMPLETED)
        failed = states.done()
        if failed and not service.was_ready:  # whoever started it is still there to read why
            raise EngineError(service.engines[0].refusal or "the engine process ends at its start")
        if failed and not exit_on_crash:  # stays up and says not ready
            await asyncio.wait({http, stop}, return_when=asyncio.FIRST_COMPLETED)
        if stop.done():
            await _drain(service, signals)
        return 1 if failed else 0
    finally:
        for task in (watch, states, stop):
            task.cancel()
        await service.close()
        server.should_exit = True
        with suppress(asyncio.CancelledError):
            await http


async def _states(service: Service, on_ready: Callable[[Service], None]) -> None:
    """Follow the engines; returns when none is left that could become ready."""
    told = False
    while service.state != "failed":
        if service.state == "ready" and not told:
            told = True
            on_ready(service)
        await service.changed.wait()
        service.changed.clear()


async def _drain(service: Service, signals: asyncio.Queue[int]) -> None:
    """Let the running documents end, until their time is over or a second signal comes."""
    loop = asyncio.get_running_loop()
    service.log.info("draining", extra={"fields": {"documents": service.documents}})
    service.drain()
    second = loop.create_task(signals.get())
    end = loop.time() + service.settings.drain_seconds
    while service.documents and loop.time() < end and not second.done():
        await asyncio.wait({second}, timeout=0.05)
    second.cancel()
    if service.documents:
        service.log.warning("documents are cut", extra={"fields": {"documents": service.documents}})
        service.cancel_all()
    end = loop.time() + LAST_WORDS
    while service.requests and loop.time() < end:
        await asyncio.sleep(0.02)  # their ends are still on the way to the clients
