"""Callers: keys, hosts, origins; none is told anything of another."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.server.requests import CHAT, LEAK, chat, check_error
from deploy.server.scripted_engine import Script
from deploy.server.server_process import (
    PYTHONPATH,
    SCRIPTED_ENGINE,
    ServerProcess,
    request_bytes,
    responses_of,
)
from mmi_deploy.errors import ConfigError
from mmi_deploy.server.http import keys as module
from mmi_deploy.server.http.keys import Keys, read_keys
from mmi_deploy.server.settings import ServerSettings

ONE, TWO = "key-of-the-first-caller", "key-of-the-second-caller"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def locked(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with two keys and one foreign origin."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# two callers\n{ONE}\n\n  {TWO}  \n")
    options = ("--key-file", file, "--allow-origin", "https://app.example")
    with ServerProcess(bundle, *options, engine=SCRIPTED_ENGINE) as started:
        started.authorization = bearer(ONE)
        yield started


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": f"Basic {ONE}"},
        {"authorization": ONE},
        bearer(ONE[:-1]),
        bearer(ONE + "x"),
        bearer(ONE.upper()),
        bearer(f"{ONE} {TWO}"),
        {"x-api-key": ONE},
    ],
    ids=str,
)
def test_without_an_accepted_key_everything_but_health_and_the_page_is_401(
    locked: ServerProcess, headers: dict[str, str]
) -> None:
    with locked.client(headers=headers) as client:
        for path in ("/v1/models", "/v1/models/tiny", "/metrics", "/version", "/openapi.json"):
            check_error(client.get(path), 401)
        for path in (CHAT, "/v1/completions", "/v1/responses", "/tokenize", "/nowhere"):
            assert check_error(client.post(path, json=chat()), 401)["code"] == "invalid_api_key"
        check_error(client.get("/v1/mmi/images/" + "0" * 32), 401)
        assert client.get("/health/live").status_code == 200
        assert client.get("/health/ready").status_code == 200
        assert client.get("/health").status_code == 200
        assert client.get("/").status_code in (200, 404)  # 404 where the page is not built in
        assert client.get(f"/v1/models?api_key={ONE}").status_code == 401


def test_an_accepted_key_opens_everything(locked: ServerProcess) -> None:
    for key in (ONE, TWO):
        for scheme in ("Bearer", "bearer"):
            headers = {"authorization": f"{scheme} {key}"}
            assert locked.get("/v1/models", headers=headers).status_code == 200
            body = chat(seed=Script.ANSWER)
            assert locked.post(CHAT, body, headers=headers).status_code == 200


def test_a_kept_picture_is_its_own_callers(locked: ServerProcess) -> None:
    body = chat(seed=Script.LARGE_PICTURE, mmi={"image_transport": "url"})
    reply = locked.post(CHAT, body, headers=bearer(ONE)).json()
    url = reply["choices"][0]["message"]["images"][0]["image_url"]["url"]
    assert locked.get(url, headers=bearer(ONE)).status_code == 200
    check_error(locked.get(url, headers=bearer(TWO)), 404)
    check_error(locked.get(url), 401)


def test_keys_are_never_written_anywhere(locked: ServerProcess) -> None:
    locked.get("/v1/models", headers=bearer("a-wrong-key-to-look-for"))
    said = "".join(locked.err + locked.out) + locked.get("/metrics", headers=bearer(ONE)).text
    for key in (ONE, TWO, "a-wrong-key-to-look-for"):
        assert key not in said
    command = Path(f"/proc/{locked.process.pid}/cmdline").read_text()
    assert ONE not in command


def test_pages_of_a_named_origin_may_call_and_no_others(locked: ServerProcess) -> None:
    origin = {"origin": "https://app.example"}
    asked = {**origin, "access-control-request-method": "POST"}
    with locked.client() as client:
        preflight = client.options(CHAT, headers=asked)
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-origin"] == "https://app.example"
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        # Without the answer's header the page could not even read why it was refused.
        refused = client.post(CHAT, json=chat(), headers=origin)
        check_error(refused, 401)
        assert refused.headers["access-control-allow-origin"] == "https://app.example"
        assert "origin" in refused.headers["vary"].lower()
        for other in (
            "https://app.example.evil.com",
            "http://app.example",
            "https://app.example:444",
            "null",
            "https://[",
            "",
        ):
            headers = {"origin": other, "access-control-request-method": "POST"}
            answer = client.options(CHAT, headers=headers)
            assert answer.status_code in (403, 401, 405), other
            assert "access-control-allow-origin" not in answer.headers


FOREIGN_HOSTS = (
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "localhost@evil.example",
    "evil.example/localhost",
    "[::1",
    "[1]",
    "[::::]",
    "",
    "169.254.169.254",
    "0.0.0.0",
    "127.0.0.1:80:80",
)


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_a_server_without_keys_answers_to_its_own_names_alone(
    scripted: ServerProcess, host: str
) -> None:
    """Else a page could let its own name resolve to 127.0.0.1."""
    for path in ("/v1/models", "/", "/metrics"):
        data = request_bytes(path, b"", "Connection: close", method="GET", host=host)
        [(status, headers, body)] = responses_of(scripted.exchange(data))
        assert status == 403, host
        assert json.loads(body)["error"]["code"] == "host_not_allowed"
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8000"])
def test_names_of_this_machine_are_its_own(scripted: ServerProcess, host: str) -> None:
    data = request_bytes("/v1/models", b"", "Connection: close", method="GET", host=host)
    assert responses_of(scripted.exchange(data))[0][0] == 200


def test_named_hosts_and_the_name_of_the_model_may_have_any_usual_form(bundle: Path) -> None:
    """Compose gives services names with an underscore; many models are called OWNER/NAME."""
    options = ("--allow-host", "mmi_cpu", "--name", "owner/tiny")
    with ServerProcess(bundle, *options, engine=SCRIPTED_ENGINE) as started:
        path = "/v1/models/owner%2Ftiny"
        data = request_bytes(path, b"", "Connection: close", method="GET", host="mmi_cpu:8000")
        [(status, _, body)] = responses_of(started.exchange(data))
        assert (status, json.loads(body)["id"]) == (200, "owner/tiny")
        assert started.get("/v1/models/owner/tiny").json()["id"] == "owner/tiny"


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:1", "http://[", "file://", "x"]
)
def test_pages_of_other_origins_may_not_call(scripted: ServerProcess, origin: str) -> None:
    answer = scripted.post(CHAT, chat(), headers={"origin": origin})
    assert check_error(answer, 403)["code"] == "origin_not_allowed"
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_its_own_page_may_call(scripted: ServerProcess) -> None:
    headers = {"origin": scripted.address}
    answer = scripted.post(CHAT, chat(seed=Script.ANSWER), headers=headers)
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "given, taken",
    [
        ("abc-DEF_123", True),
        ("a" * 128, True),
        ("a" * 129, False),
        ("", False),
        ("two words", False),
        ("a;b", False),
        ("\u00e9", False),
        ('{"x": 1}', False),
    ],
)
def test_a_request_keeps_its_own_id_if_it_is_one(
    scripted: ServerProcess, given: str, taken: bool
) -> None:
    headers = {b"x-request-id": given.encode("latin-1")}
    for path in ("/health/live", "/nowhere"):
        found = scripted.get(path, headers=headers).headers["x-request-id"]
        assert (found == given) is taken
        if not taken:
            assert found.startswith("req-") and len(found) == 36


def start(*options: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `mmi serve` until it ends by itself."""
    command = [sys.executable, "-m", "mmi_deploy", "serve", *map(str, options)]
    variables = {**os.environ, "PYTHONPATH": PYTHONPATH, "NO_COLOR": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=variables)


def check_refused(run: subprocess.CompletedProcess[str], words: str) -> None:
    assert run.returncode == 2, run.stderr
    assert run.stdout == ""
    lines = [line for line in run.stderr.splitlines() if not line.startswith("Loading")]
    assert words in " ".join(lines), run.stderr
    assert "Traceback" not in run.stderr


def test_a_port_in_use_is_one_line_and_exit_2(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        run = start(bundle, "--port", taken.getsockname()[1])
    check_refused(run, "address already in use")
    assert len(run.stderr.strip().splitlines()) <= 2


def test_an_open_server_needs_a_key_or_a_word(bundle: Path, tmp_path: Path) -> None:
    check_refused(start(bundle, "--host", "0.0.0.0", "--port", 0), "--no-key")
    empty = tmp_path / "empty"
    empty.write_text("\n# nothing\n")
    check_refused(start(bundle, "--key-file", empty), "has no key")
    check_refused(start(bundle, "--key-file", tmp_path / "missing"), "missing")


def test_an_origin_that_no_page_could_have_ends_the_start(bundle: Path) -> None:
    check_refused(start(bundle, "--port", 0, "--allow-origin", "*"), "--allow-origin")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hosts", ""),
        ("hosts", "mmi.example:8000"),
        ("hosts", "https://mmi.example"),
        ("image_hosts", "https://pictures.example"),
        ("image_hosts", "*.example"),
        ("origins", "*"),
        ("origins", "app.example"),
        ("origins", "https://app.example/"),
        ("origins", "https://App.example"),
    ],
)
def test_hosts_and_origins_that_no_request_could_have_are_refused(field: str, value: str) -> None:
    with pytest.raises(ConfigError, match="--allow-") as told:
        ServerSettings(**{field: (value,)})  # type: ignore[arg-type]
    assert repr(value) in str(told.value)


def test_hosts_and_origins_of_all_forms_are_taken() -> None:
    hosts = ("mmi.example", "mmi_cpu", "10.0.0.1", "fd00::1")
    ServerSettings(
        hosts=hosts,
        image_hosts=hosts,
        origins=("http://localhost:3000", "https://app.example", "http://[::1]:1", "null"),
    )


# Keys in files and in the environment.


def test_keys_come_from_a_file_or_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(module.VARIABLE, f" {ONE}, {TWO},,{ONE}")
    assert read_keys(None) == (ONE, TWO)
    file = tmp_path / "keys"
    file.write_text(f"\r\n{TWO}\r\n#x\r\n")
    assert read_keys(file) == (TWO,)
    monkeypatch.delenv(module.VARIABLE)
    assert read_keys(None) == ()


@pytest.mark.parametrize("bad", ["short", "two words here", "caf\u00e9-caf\u00e9", "tab\there-key"])
def test_keys_that_cannot_be_sent_are_refused_without_showing_them(
    tmp_path: Path, bad: str
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{ONE}\n{bad}\n")
    with pytest.raises(ConfigError) as told:
        read_keys(file)
    assert bad not in str(told.value)


def test_keys_are_compared_all_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(module, "compare_digest", compare)
    keys = Keys((ONE, TWO))
    for key in (ONE, TWO, "x", "", "\udc80"):
        compared.clear()
        keys.tenant(key)
        assert len(compared) == 2
        assert all(len(one) == len(other) == 32 for one, other in compared)


def test_a_tenant_is_stable_and_tells_nothing_of_the_key() -> None:
    keys = Keys((ONE, TWO))
    one, two = keys.tenant(ONE), keys.tenant(TWO)
    assert one and two and one != two
    assert Keys((TWO, ONE)).tenant(ONE) == one
    assert ONE not in one and keys.tenant("x") is None
    assert not Keys(()) and keys


def test_answers_to_hosts_hold_no_path(scripted: ServerProcess) -> None:
    for host in FOREIGN_HOSTS:
        data = request_bytes("/", b"", "Connection: close", method="GET", host=host)
        assert not LEAK.search(scripted.exchange(data).decode())


def test_probes_of_health_come_by_any_address(scripted: ServerProcess) -> None:
    """Kubernetes asks the address of the pod."""
    for path in ("/health", "/health/live", "/health/ready"):
        data = request_bytes(path, b"", "Connection: close", method="GET", host="10.1.2.3:8000")
        assert responses_of(scripted.exchange(data))[0][0] == 200
