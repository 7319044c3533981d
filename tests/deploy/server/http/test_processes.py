"""Starts, ends and deaths of the processes."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.server.requests import CHAT, RESPONSES, chat, check_error, events_of, many_pictures
from deploy.server.scripted_engine import Script
from deploy.server.server_process import (
    SCRIPTED_ENGINE,
    ServerProcess,
    is_alive,
    read_all,
    request_bytes,
    responses_of,
    wait_until,
)
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.errors import EngineError
from mmi_deploy.server.engine import client as engine_client
from mmi_deploy.server.engine.open_options import OpenOptions, bundle_digest
from mmi_deploy.server.http import run as running
from mmi_deploy.server.http.service import Service
from mmi_deploy.server.served_model import ServedModel
from mmi_deploy.server.settings import ServerSettings

pytestmark = pytest.mark.timing

BACK_OFF = "mmi_deploy.server.engine.client.BACK_OFF"


def documents(server: ServerProcess) -> int:
    return int(server.get("/health").json()["documents"])


def test_it_is_live_at_once_and_ready_after_the_engine(bundle: Path) -> None:
    with ServerProcess(bundle, wait=False) as started:
        # The port is known when it is printed, so wait for that; then all at once is ready.
        started.wait_ready()
        assert started.get("/health/ready").json()["status"] == "ready"
        assert started.get("/v1/models").json()["data"][0]["id"] == "tiny"
        assert started.out == [f"Serving tiny at {started.address}\n"]
        started.terminate()
        assert started.wait(10) == 0


@pytest.mark.slow
def test_a_killed_engine_ends_its_documents_and_comes_back(bundle: Path) -> None:
    """Every client has an error event within a second, and the server is ready soon again."""
    with ServerProcess(bundle, "--slots", 3) as started:
        [pid] = started.engines
        body = many_pictures(stream=True)
        response_body = {
            "model": "tiny",
            "input": "the red square",
            "stream": True,
            "tools": [{"type": "image_generation"}],
            "mmi": {"max_images": 40, "turn_tokens": 1},
        }
        ends: list[float] = []
        last: list[dict[str, Any]] = []

        def read(path: str, body: dict[str, Any]) -> None:
            with started.client() as client:
                with client.stream("POST", path, json=body) as response:
                    events = list(events_of(response.iter_lines()))
            ends.append(time.monotonic())
            last.append(events[-1])

        with ThreadPoolExecutor(3) as threads:
            for path, one in ((CHAT, body), (CHAT, body), (RESPONSES, response_body)):
                threads.submit(read, path, one)
            wait_until(lambda: documents(started) == 3)
            time.sleep(0.5)
            os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
            wait_until(lambda: started.get("/health/ready").status_code == 503, 1)
            assert check_error(started.post(CHAT, chat()), 503)["code"] == "engine_died"
            assert started.get("/health/live").status_code == 200
        assert len(last) == 3
        assert max(ends) - killed < 1.5
        assert sorted("error" in event for event in last) == [False, True, True]
        [failed] = [event for event in last if "error" not in event]
        assert failed["type"] == "response.failed"
        wait_until(lambda: started.get("/health/ready").status_code == 200, 30)
        assert started.post(CHAT, chat()).status_code == 200
        assert started.engines != [pid]
        metrics = started.metrics()
        assert metrics["mmi_worker_restarts_total"] == 1
        assert metrics['mmi_finished_total{reason="error"}'] == 3
        lines = [one["message"] for one in started.log if one["level"] == "warning"]
        assert lines == ["the engine process ended unexpectedly (signal 9)"]


def test_a_probe_leaves_an_engine_that_works_alone_and_starts_a_stopped_one_again(
    bundle: Path,
) -> None:
    with ServerProcess(
        bundle,
        "--probe",
        0.2,
        settings={"stall_seconds": 1.0},
        constants={"mmi_deploy.server.http.service.WATCH": 0.1, BACK_OFF: (0.01,)},
    ) as started:
        name = 'mmi_stage_runs_total{engine="0",stage="prefill"}'
        before = started.metrics()[name]
        wait_until(lambda: started.metrics()[name] >= before + 3)  # of probes alone
        assert started.metrics()["mmi_worker_restarts_total"] == 0
        [pid] = started.engines
        os.kill(pid, signal.SIGSTOP)  # alive, and computes nothing
        wait_until(lambda: started.metrics()["mmi_worker_restarts_total"] == 1, 90)
        wait_until(lambda: started.get("/health/ready").status_code == 200, 90)
        assert started.post(CHAT, chat()).status_code == 200
        assert not is_alive(pid)
        errors = [one["message"] for one in started.log if one["level"] == "error"]
        assert errors == ["an idle engine did not generate a token; it is started again"]


def test_a_log_that_nobody_reads_stops_nothing(bundle: Path) -> None:
    """Its pipe is full after some hundred requests; then lines are dropped, and told later."""
    constants = {"mmi_deploy.server.http.logs.MOST_LINES": 50}
    with ServerProcess(bundle, engine=SCRIPTED_ENGINE, constants=constants, read_log=False) as one:
        with one.client() as client:
            for number in range(600):
                assert client.get(f"/no-such-path-{number}").status_code == 404
            assert client.get("/health/live").elapsed.total_seconds() < 1
            one.read_log()
            assert client.get("/no-such-path").status_code == 404
            wait_until(lambda: any("were dropped" in line["message"] for line in one.log))
        one.terminate()
        assert one.wait(10) == 0


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def test_a_killed_front_leaves_nothing(bundle: Path) -> None:
    before = shared_memory()
    with ServerProcess(bundle, "--slots", 2) as started:
        engines = started.engines
        with started.client() as client:
            with client.stream("POST", CHAT, json=many_pictures(stream=True)) as response:
                lines = response.iter_lines()  # it closes the stream when it is dropped
                next(lines)
                started.process.kill()
                wait_until(lambda: not any(map(is_alive, engines)), 2)
    assert len(engines) == 1
    assert shared_memory() <= before


def test_a_front_that_is_killed_while_the_engine_loads_leaves_nothing(bundle: Path) -> None:
    with ServerProcess(bundle, wait=False) as started:
        engines = wait_until(lambda: started.engines)
        started.process.kill()
        wait_until(lambda: not any(map(is_alive, engines)), 2)


def send(server: ServerProcess, body: dict[str, Any]) -> socket.socket:
    sock = server.connect()
    sock.settimeout(60)
    sock.sendall(request_bytes(CHAT, json.dumps(body).encode(), "Connection: close"))
    return sock


def test_sigterm_lets_running_documents_end_and_refuses_those_that_wait(bundle: Path) -> None:
    with ServerProcess(bundle, "--slots", 2, "--drain-seconds", 40) as started:
        # Half of them stream.
        bodies = [
            chat(tokens=400, images=3, seed=seed, stream=seed % 2 == 0, mmi={"turn_tokens": 1})
            for seed in range(2)
        ]
        running_ = [send(started, body) for body in bodies]
        wait_until(lambda: started.metrics()['mmi_running{engine="0"}'] == 2)
        waiting = [send(started, {**body, "seed": 9}) for body in bodies]
        wait_until(lambda: documents(started) == 4)
        idle = started.connect()
        started.terminate()
        for sock in waiting:
            [(status, headers, body)] = responses_of(read_all(sock))
            assert status == 503
            assert json.loads(body)["error"]["code"] == "draining"
            assert headers["x-should-retry"] == "true" and int(headers["retry-after"]) >= 1
        refused = started.post(CHAT, chat())
        assert check_error(refused, 503)["code"] == "draining"
        assert check_error(started.get("/health/ready"), 503)["code"] == "draining"
        assert started.get("/health/live").status_code == 200
        for sock, body in zip(running_, bodies, strict=True):
            [(status, _, answer)] = responses_of(read_all(sock))
            assert status == 200
            if body["stream"]:
                assert answer.endswith(b"data: [DONE]\n\n")
            else:
                assert len(json.loads(answer)["choices"][0]["message"]["images"]) == 3
        assert started.wait(10) == 0
        idle.close()
        said = "".join(started.err)
        assert "CancelledError" not in said and "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_everything_at_once(bundle: Path, number: int) -> None:
    with ServerProcess(bundle, engine=SCRIPTED_ENGINE) as started:
        streamed = send(started, chat(seed=Script.PICTURE_THEN_HANG, stream=True))
        whole = send(started, chat(seed=Script.HANG))
        assert streamed.recv(20).startswith(b"HTTP/1.1 200")
        wait_until(lambda: documents(started) == 2)
        started.process.send_signal(number)
        time.sleep(0.3)
        assert started.process.poll() is None
        begun = time.monotonic()
        started.process.send_signal(number)
        assert started.wait(6) == 0
        assert time.monotonic() - begun < 5
        rest = read_all(streamed)
        assert b'"error"' in rest or b"[DONE]" in rest
        assert responses_of(read_all(whole))[0][0] in (500, 503)
        said = "".join(started.err)
        assert "CancelledError" not in said and "Traceback" not in said


def test_the_time_to_drain_is_kept(bundle: Path) -> None:
    options = ("--drain-seconds", 0.5)
    with ServerProcess(bundle, *options, engine=SCRIPTED_ENGINE) as started:
        hanging = send(started, chat(seed=Script.HANG))
        wait_until(lambda: documents(started) == 1)
        begun = time.monotonic()
        started.terminate()
        assert started.wait(8) == 0
        assert 0.5 <= time.monotonic() - begun < 6
        hanging.close()


def test_sigterm_while_it_loads_ends_it(bundle: Path) -> None:
    with ServerProcess(bundle, wait=False) as started:
        wait_until(lambda: started.engines)
        time.sleep(0.3)
        started.terminate()
        assert started.wait(8) == 0


@pytest.mark.slow
def test_a_bundle_that_changes_on_disk_is_noticed_and_not_opened_again(
    bundle: Path, tmp_path: Path
) -> None:
    """The opened one is served, until the engine would have to open another one."""
    mine = shutil.copytree(bundle, tmp_path / "bundle")
    constants = {BACK_OFF: [0.05]}
    with ServerProcess(mine, "--exit-on-crash", constants=constants) as started:
        assert started.metrics()["mmi_bundle_changed"] == 0
        manifest = json.loads((mine / "bundle.json").read_text())
        (mine / "bundle.json").write_text(json.dumps(manifest))
        wait_until(lambda: started.metrics()["mmi_bundle_changed"] == 1, 10)
        assert started.post(CHAT, chat()).status_code == 200
        os.kill(started.engines[0], signal.SIGKILL)
        assert started.wait(30) == 1
        said = "".join(started.err)
        assert "has changed since the server was started" in said
        assert "Traceback" not in said


# The service in this process, with engines that only die.


def service(bundle: Path, monkeypatch: pytest.MonkeyPatch, *command: str) -> Service:
    popen = subprocess.Popen
    monkeypatch.setattr(engine_client, "BACK_OFF", (0.01,))
    monkeypatch.setattr(
        engine_client.subprocess, "Popen", lambda given, **options: popen(command, **options)
    )
    opened = Bundle.open(bundle)
    model = ServedModel.of(opened, "tiny", "cpu", "mmi-0")
    options = OpenOptions(str(bundle), digest=bundle_digest(bundle, "cpu"))
    return Service(model, [options], ServerSettings(), logging.getLogger("test"))


@pytest.mark.parametrize("exit_on_crash", [True, False])
def test_an_engine_that_dies_too_often_is_given_up(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, exit_on_crash: bool
) -> None:
    async def steps() -> int:
        served = service(bundle, monkeypatch, "false")
        served.was_ready = True  # before it began to die
        sock = running.bind("127.0.0.1", 0)
        task = asyncio.create_task(
            running.serve(served, sock, on_ready=lambda _: None, exit_on_crash=exit_on_crash)
        )
        if not exit_on_crash:
            async with httpx.AsyncClient(base_url=running.address_of(sock)) as client:
                while served.state != "failed":
                    await asyncio.sleep(0.01)
                ready = await client.get("/health/ready")
                error = check_error(ready, 503)
                assert error["code"] == "engine_died"
                assert int(ready.headers["retry-after"]) == 60
                assert (await client.get("/health/live")).status_code == 200
                check_error(await client.post(CHAT, json=chat()), 503)
            os.kill(os.getpid(), signal.SIGTERM)
        return await asyncio.wait_for(task, 20)

    assert asyncio.run(steps()) == 1


def test_an_engine_that_never_was_ready_ends_the_server(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def steps() -> int:
        served = service(bundle, monkeypatch, "false")
        sock = running.bind("127.0.0.1", 0)
        return await running.serve(served, sock, on_ready=lambda _: None, exit_on_crash=False)

    with pytest.raises(EngineError, match="ends at its start"):
        asyncio.run(steps())


def test_silence_of_a_busy_engine_makes_it_not_ready_and_that_of_an_idle_one_does_not(
    bundle: Path,
) -> None:
    settings = {"stall_seconds": 0.7}
    with ServerProcess(bundle, settings=settings, engine=SCRIPTED_ENGINE) as started:
        time.sleep(1)
        assert started.get("/health/ready").status_code == 200
        hanging = send(started, chat(seed=Script.HANG))
        wait_until(lambda: documents(started) == 1)
        # Its silence counts from the moment when it got something to do.
        assert started.post(CHAT, chat(seed=Script.ANSWER)).status_code == 200
        wait_until(lambda: started.get("/health/ready").status_code == 503, 3)
        assert check_error(started.post(CHAT, chat()), 503)["code"] == "stalled"
        hanging.close()
