"""Deployment files in examples/deployment: their relations to each other and to `mmi serve`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command_from_info
from typer.models import CommandInfo

from mmi_deploy.cli.serve import serve
from mmi_deploy.cli.triton import triton

REPOSITORY = Path(__file__).resolve().parents[3]
FILES = REPOSITORY / "examples" / "deployment"
KUBERNETES = FILES / "kubernetes"
USER = 10001


def manifest(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((KUBERNETES / name).read_text())
    return found


DEPLOYMENT = manifest("deployment.yaml")
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
DOCKERFILE = (FILES / "Dockerfile").read_text().replace("\\\n", " ")
COMPOSE = yaml.safe_load((FILES / "compose.yaml").read_text())


def options_of(command: Any) -> dict[str, Any]:
    """Options of a command and their defaults."""
    info = CommandInfo(callback=command)
    parsed = get_command_from_info(info, pretty_exceptions_short=True, rich_markup_mode=None)
    return {name: option.default for option in parsed.params for name in option.opts}


SERVE = options_of(serve)


def given(words: list[str]) -> dict[str, str]:
    """Options on a command line of `mmi serve`; each takes a value, or is a flag."""
    found, rest = {}, list(words)
    while rest:
        word = rest.pop(0)
        assert word.startswith("--"), word
        name, separator, value = word.partition("=")
        if not separator and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        found[name] = value
    return found


def instructions(stage: str) -> list[list[str]]:
    """Instructions of a stage of the Dockerfile, with those of the stages that it begins from."""
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.M)[1:]
    named = {re.match(r"\S+ AS (\S+)", text)[1]: text for text in stages}  # type: ignore[index]
    before = named[stage].split()[0]
    lines = [line.split(" ", 1) for line in named[stage].splitlines()[1:] if line[:1].isupper()]
    return (instructions(before) if before in named else []) + lines


def last(stage: str, instruction: str) -> str:
    return [rest for word, rest in instructions(stage) if word == instruction][-1].strip()


def command_lines() -> dict[str, list[str]]:
    """Every command line of `mmi serve` in the files, behind its bundle."""
    found = {"kubernetes": CONTAINER["args"]}
    for stage in ("cpu", "gpu"):
        program, command, bundle, *words = yaml.safe_load(last(stage, "ENTRYPOINT"))
        assert (program, command, bundle) == ("mmi", "serve", "/bundle")
        found[f"entry point {stage}"] = words
        found[f"image {stage}"] = yaml.safe_load(last(stage, "CMD"))
        found[f"compose {stage}"] = COMPOSE["services"][stage]["command"]
    return found


@pytest.mark.parametrize("where", command_lines())
def test_command_lines_have_options_that_mmi_serve_has(where: str) -> None:
    options = given(command_lines()[where])
    assert options and set(options) <= set(SERVE)


@pytest.mark.parametrize("where", ["kubernetes", "image cpu", "image gpu", "compose cpu"])
def test_no_server_that_others_reach_is_without_keys(where: str) -> None:
    options = given(command_lines()[where])
    assert options["--key-file"].startswith("/run/secrets/") and "--no-key" not in options


def test_the_grace_period_is_longer_than_sleep_and_drain() -> None:
    words = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    drain = float(given(CONTAINER["args"])["--drain-seconds"])
    assert words[0] == "sleep"
    assert POD["terminationGracePeriodSeconds"] >= float(words[1]) + drain + 5
    for service in COMPOSE["services"].values():
        assert float(service["stop_grace_period"].removesuffix("s")) > SERVE["--drain-seconds"]


def test_probes_ask_the_paths_and_the_port_of_the_server() -> None:
    from mmi_deploy.server.http import application

    source = Path(application.__file__).read_text()
    probes = {
        "startupProbe": "/health/ready",
        "livenessProbe": "/health/live",
        "readinessProbe": "/health/ready",
    }
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    for probe, path in probes.items():
        asked = CONTAINER[probe]["httpGet"]
        assert asked["path"] == path and f'"{path}"' in source
        assert ports[asked["port"]] == SERVE["--port"]
    started = CONTAINER["startupProbe"]
    assert started["periodSeconds"] * started["failureThreshold"] >= 300
    annotations = DEPLOYMENT["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(SERVE["--port"])
    assert f'"{annotations["prometheus.io/path"]}"' in source


@pytest.mark.parametrize("stage", ["cpu", "gpu", "cpu-with-bundle", "gpu-with-bundle"])
def test_images_have_the_port_the_user_and_a_health_check(stage: str) -> None:
    options = given(yaml.safe_load(last(stage, "ENTRYPOINT"))[3:])
    assert last(stage, "EXPOSE") == options["--port"] == str(SERVE["--port"])
    assert last(stage, "USER") == f"{USER}:{USER}"
    assert f"http://127.0.0.1:{SERVE['--port']}/health/live" in last(stage, "HEALTHCHECK")
    assert last(stage, "STOPSIGNAL") == "SIGTERM"
    assert f"--uid {USER}" in " ".join(rest for word, rest in instructions(stage) if word == "RUN")


def test_images_install_extras_that_exist() -> None:
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"^ARG EXTRAS=(\S+)", DOCKERFILE, re.M)
    assert len(extras) == 2
    for names in extras:
        assert set(names.split(",")) <= set(project["optional-dependencies"])


def test_nothing_runs_as_root_or_writes_to_its_image() -> None:
    context = POD["securityContext"]
    assert context["runAsNonRoot"] and context["runAsUser"] == USER
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    own = CONTAINER["securityContext"]
    assert own["readOnlyRootFilesystem"] and own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    for service in COMPOSE["services"].values():
        assert service["read_only"] and service["user"] == f"{USER}:{USER}"
        assert service["cap_drop"] == ["ALL"]
        assert all(volume.endswith(":ro") for volume in service["volumes"])


def test_every_mount_has_its_volume_and_every_path_its_mount() -> None:
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in CONTAINER["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == set(volumes)
    assert mounts["/bundle"]["readOnly"] and not mounts["/tmp"].get("readOnly")
    assert volumes["tmp"]["emptyDir"]["medium"] == "Memory"
    assert Path(given(CONTAINER["args"])["--key-file"]).parent.as_posix() in mounts
    for service in COMPOSE["services"].values():
        (secret,) = service["secrets"]
        assert secret in COMPOSE["secrets"]
        assert given(service["command"])["--key-file"] == f"/run/secrets/{secret}"


def test_manifests_select_the_pods_of_the_deployment() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels
    service, budget = manifest("service.yaml"), manifest("disruption-budget.yaml")
    assert service["spec"]["selector"] == budget["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["ports"][0]["targetPort"] in {p["name"] for p in CONTAINER["ports"]}
    assert budget["spec"]["minAvailable"] < DEPLOYMENT["spec"]["replicas"]
    target = manifest("autoscaler.yaml")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", DEPLOYMENT["metadata"]["name"])


def test_the_autoscaler_asks_a_metric_that_the_server_has() -> None:
    from mmi_deploy.server.http import metrics

    (metric,) = manifest("autoscaler.yaml")["spec"]["metrics"]
    assert f'"{metric["pods"]["metric"]["name"]}"' in Path(metrics.__file__).read_text()


def test_the_proxy_passes_events_on_and_waits_longer_than_a_request_lasts() -> None:
    text = (FILES / "nginx" / "mmi.conf").read_text()
    values = {
        words[0]: words[1:]
        for line in text.splitlines()
        if (words := shlex.split(line.strip().rstrip(";"), comments=True))
    }
    assert values["proxy_buffering"] == ["off"] and values["proxy_http_version"] == ["1.1"]
    assert float(values["proxy_read_timeout"][0].removesuffix("s")) > SERVE["--max-seconds"]
    assert values["client_max_body_size"] == [f"{SERVE['--body-mb']:g}m"]
    assert values["proxy_ignore_client_abort"] == ["off"]
    assert f"127.0.0.1:{SERVE['--port']}" in text


def test_mmi_triton_has_the_options_of_the_docs() -> None:
    assert {"--name", "--target", "--slots", "--server-bundle"} <= set(options_of(triton))
