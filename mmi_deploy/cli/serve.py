"""`mmi serve`: an HTTP server with OpenAI's APIs and a page to write with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmi_deploy.cli.console import MOST_THREADS, counted, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.generate import BUNDLE
from mmi_deploy.cli.hub_folders import local_folder, model_name, spelled
from mmi_deploy.cli.target_options import (
    MACHINE,
    Kernels,
    Resident,
    TargetName,
    check_engines,
    resident_groups,
)
from mmi_deploy.errors import ConfigError
from mmi_deploy.hub.kinds import BUNDLE as BUNDLE_KIND
from mmi_deploy.spec.backends import AUTO, CPU, backend_of

if TYPE_CHECKING:
    from mmi_deploy.bundle.bundle import Bundle
    from mmi_deploy.server.engine.client import EngineClient
    from mmi_deploy.server.engine.open_options import OpenOptions
    from mmi_deploy.server.http.service import Service

REPLICAS = "Engines"
SAFETY, LIMITS, QUEUE, STREAMS = "Who may call", "Limits of a request", "Queue", "Streams"


def serve(
    bundle: Annotated[
        Path, typer.Argument(help="Bundle of `mmi export`, or hf://org/name.", show_default=True)
    ] = BUNDLE,
    host: Annotated[str, typer.Option(help="Address to listen at.", metavar="HOST")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.", metavar="N")
    ] = 8000,
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the model in requests and replies.",
            metavar="NAME",
            show_default="that of the bundle's folder or repository",
        ),
    ] = None,
    target: TargetName = CPU,
    devices: Annotated[
        list[int] | None,
        typer.Option(
            "--device",
            min=0,
            metavar="N",
            help="GPU index; repeat it for an engine process on each.",
            show_default="0",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Documents at once, per engine.",
            show_default="what the memory holds",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    threads: Annotated[
        int,
        typer.Option(
            min=0,
            max=MOST_THREADS,
            metavar="N",
            help="CPU threads of an engine; 0: all cores.",
            rich_help_panel=MACHINE,
        ),
    ] = 0,
    kernels: Kernels = AUTO,
    resident: Resident = None,
    unproved: Annotated[
        bool,
        typer.Option(
            "--unproved", help="Run graphs without a receipt too.", rich_help_panel=MACHINE
        ),
    ] = False,
    engine: Annotated[
        str,
        typer.Option(
            metavar="process|ray",
            help="Engines: a process for each device, or replicas on Ray.",
            rich_help_panel=REPLICAS,
        ),
    ] = "process",
    replicas: Annotated[
        str,
        typer.Option(
            metavar="N|LEAST:MOST",
            help="Number of replicas on Ray; between two numbers, by documents at once.",
            rich_help_panel=REPLICAS,
        ),
    ] = "1",
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Ray cluster, or auto; its replicas stay when this server ends.",
            show_default="a Ray of its own on this machine",
            rich_help_panel=REPLICAS,
        ),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the accepted API keys, one per line; else $MMI_API_KEYS.",
            metavar="FILE",
            show_default=False,
            rich_help_panel=SAFETY,
        ),
    ] = None,
    no_key: Annotated[
        bool,
        typer.Option(
            "--no-key",
            help="Serve whoever reaches HOST, though it is not loopback.",
            rich_help_panel=SAFETY,
        ),
    ] = False,
    hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            help="Name that a server without keys answers to, besides localhost.",
            metavar="NAME",
            show_default=False,
            rich_help_panel=SAFETY,
        ),
    ] = None,
    origins: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin",
            help="Origin of another site whose pages may call the API.",
            metavar="URL",
            show_default=False,
            rich_help_panel=SAFETY,
        ),
    ] = None,
    image_hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-image-host",
            help="Host from which pictures may be fetched, by https; else data URLs alone.",
            metavar="NAME",
            show_default=False,
            rich_help_panel=SAFETY,
        ),
    ] = None,
    share_cache: Annotated[
        bool,
        typer.Option(
            "--share-cache",
            help="Documents of different keys share caches; latency tells what was sent before.",
            rich_help_panel=SAFETY,
        ),
    ] = False,
    body_mb: Annotated[
        float,
        typer.Option("--body-mb", min=0.001, help="Body.", metavar="MB", rich_help_panel=LIMITS),
    ] = 64.0,
    image_mb: Annotated[
        float,
        typer.Option(
            "--image-mb",
            min=0.001,
            help="File of a picture.",
            metavar="MB",
            rich_help_panel=LIMITS,
        ),
    ] = 20.0,
    image_mpx: Annotated[
        float,
        typer.Option(
            "--image-megapixels",
            min=0.001,
            help="Pixels of a picture.",
            metavar="N",
            rich_help_panel=LIMITS,
        ),
    ] = 64.0,
    all_mpx: Annotated[
        float,
        typer.Option(
            "--all-megapixels",
            min=0.001,
            help="Pixels of all pictures of a request.",
            metavar="N",
            rich_help_panel=LIMITS,
        ),
    ] = 256.0,
    parts: Annotated[
        int,
        typer.Option(
            "--parts", min=1, help="Texts and pictures.", metavar="N", rich_help_panel=LIMITS
        ),
    ] = 1024,
    images: Annotated[
        int | None,
        typer.Option(
            "--images",
            min=1,
            help="Pictures, given and drawn.",
            metavar="N",
            show_default="the model's",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            min=1,
            help="Text tokens to write.",
            metavar="N",
            show_default="the model's",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    max_seconds: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="Seconds until a request is ended.",
            metavar="S",
            rich_help_panel=LIMITS,
        ),
    ] = 600.0,
    queue: Annotated[
        int,
        typer.Option(
            min=0,
            help="Documents that may wait for a slot, per engine; beyond: 429.",
            metavar="N",
            rich_help_panel=QUEUE,
        ),
    ] = 64,
    queue_seconds: Annotated[
        float,
        typer.Option(
            min=0.1, help="Time that one may wait; then 503.", metavar="S", rich_help_panel=QUEUE
        ),
    ] = 600.0,
    text_gap: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Milliseconds that a run may take while a text is being written.",
            metavar="MS",
            show_default="twice a denoising step",
            rich_help_panel=QUEUE,
        ),
    ] = None,
    picture_share: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=0.99,
            help="Share of the time that pictures get while prompts wait as well.",
            metavar="X",
            rich_help_panel=QUEUE,
        ),
    ] = 1 / 3,
    drain_seconds: Annotated[
        float,
        typer.Option(
            min=0,
            help="After SIGTERM or Ctrl-C: time for the documents that run.",
            metavar="S",
            rich_help_panel=QUEUE,
        ),
    ] = 30.0,
    keep_alive: Annotated[
        float,
        typer.Option(
            min=0,
            help="Silence after which a stream sends something; 0: never.",
            metavar="S",
            rich_help_panel=STREAMS,
        ),
    ] = 15.0,
    event_bytes: Annotated[
        int,
        typer.Option(
            min=1024,
            help="Longest line of a stream whose pictures come in pieces or by URL.",
            metavar="N",
            rich_help_panel=STREAMS,
        ),
    ] = 65_536,
    slow_client: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="A client that does not read for so long is dropped.",
            metavar="S",
            rich_help_panel=STREAMS,
        ),
    ] = 30.0,
    image_minutes: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="Time that a picture is kept under its URL.",
            metavar="MIN",
            rich_help_panel=STREAMS,
        ),
    ] = 60.0,
    probe: Annotated[
        float,
        typer.Option(
            min=0,
            help="Generate a token on an idle engine every S seconds, to see that it works; 0: "
            "never.",
            metavar="S",
        ),
    ] = 0.0,
    exit_on_crash: Annotated[
        bool,
        typer.Option("--exit-on-crash", help="Exit with 1 when no engine can be started any more."),
    ] = False,
    otel: Annotated[
        bool,
        typer.Option(
            "--otel",
            help="Send a span of each request to $OTEL_EXPORTER_OTLP_ENDPOINT.",
        ),
    ] = False,
    log_level: Annotated[
        str, typer.Option(help="debug, info, warning or error.", metavar="LEVEL")
    ] = "info",
) -> int:
    """Serve a bundle over HTTP: OpenAI's APIs, with text and pictures in the order in which the
    model makes them, and a page to write with at /.

    Ctrl-C or SIGTERM lets running documents end (`--drain-seconds`); a second one ends at once.
    The log is JSON lines on stderr, without contents of requests.
    """
    with extras("serve", "serve"):
        from mmi_deploy.server.engine.client import EngineClient
        from mmi_deploy.server.http.keys import VARIABLE, read_keys
        from mmi_deploy.server.http.logs import LEVELS, configure
        from mmi_deploy.server.http.run import LOOPBACK, address_of, bind, run
        from mmi_deploy.server.http.service import Service
    tracing = None
    if otel:
        with extras("serve", "otel"):
            from mmi_deploy.server.http.tracing import OpenTelemetryTracing

            tracing = OpenTelemetryTracing()
    if engine not in ("process", "ray"):
        raise ConfigError("--engine is unknown", expected="process or ray", got=engine)
    with extras("serve", "cpu"):
        check_engines(target)
    from mmi_deploy.bundle.bundle import Bundle
    from mmi_deploy.runtime.backend import check_target
    from mmi_deploy.server.served_model import ServedModel
    from mmi_deploy.server.settings import RequestLimits, ServerSettings, StreamRules

    if log_level not in LEVELS:
        raise ConfigError("--log-level is unknown", expected=", ".join(LEVELS), got=log_level)
    keys = read_keys(key_file)
    if host not in LOOPBACK and not keys and not no_key:
        raise ConfigError(
            f"whoever reaches {host} could use the server",
            fix=f"give keys by --key-file or ${VARIABLE}, or say --no-key",
        )
    folder = local_folder(bundle, BUNDLE_KIND, targets=[target])
    opened = Bundle.open(folder, unproved=unproved)
    opened.check_runnable()
    check_target(opened, target)
    settings = ServerSettings(
        limits=RequestLimits(
            body_bytes=_whole("--body-mb", body_mb * 2**20),
            parts=parts,
            image_bytes=_whole("--image-mb", image_mb * 2**20),
            image_pixels=_whole("--image-megapixels", image_mpx * 1e6),
            all_pixels=_whole("--all-megapixels", all_mpx * 1e6),
            images=images,
            tokens=tokens,
            seconds=max_seconds,
        ),
        rules=StreamRules(keep_alive=keep_alive, event_bytes=event_bytes, slow_client=slow_client),
        keys=keys,
        hosts=tuple(hosts or ()),
        origins=tuple(origins or ()),
        image_hosts=tuple(image_hosts or ()),
        queue=queue,
        queue_seconds=queue_seconds,
        drain_seconds=drain_seconds,
        picture_seconds=60 * image_minutes,
        share_cache=share_cache,
        probe_seconds=probe,
    )
    policy = {
        "text_gap": None if text_gap is None else text_gap / 1000,
        "picture_share": picture_share,
        "queue": queue,
        "queue_seconds": queue_seconds,
    }
    engines = _engines(
        opened, target, devices or [0], kernels, threads, slots, resident, unproved, policy
    )
    client: Callable[..., EngineClient] = EngineClient
    if engine == "ray":
        client = _on_ray(opened, engines, replicas, ray_address)
    elif replicas != "1" or ray_address is not None:
        raise ConfigError("--replicas and --ray-address go with --engine ray", fix="leave them out")
    sock = bind(host, port)
    model = ServedModel.of(opened, name or model_name(bundle), target, "mmi-starting")

    def start(service: Service) -> None:
        line = f"Serving {model.name} at {address_of(sock)}"
        results().print(line)
        slots = sum(engine.ready.slots for engine in service.engines if engine.ready)
        bound = max((e.ready.text_gap_bound or 0) for e in service.engines if e.ready)
        remarks().print(
            f"  {counted(slots, 'document')} at once, {queue} may wait; a running text waits at "
            f"most {1000 * bound:.0f} ms for its next token\n  page {address_of(sock)}/   "
            f"API {address_of(sock)}/v1   {'keys: on' if keys else 'no keys'}; Ctrl-C ends"
        )

    remarks().print(f"Loading {spelled(bundle)} for {target}")
    return run(
        lambda log: Service(model, engines, settings, log, tracing, client),
        sock,
        configure(log_level),
        on_ready=start,
        exit_on_crash=exit_on_crash,
    )


def _on_ray(
    bundle: Bundle, engines: list[OpenOptions], replicas: str, address: str | None
) -> Callable[..., EngineClient]:
    """Maker of the client of replicas on Ray."""
    with extras("serve", "ray"):
        import ray.serve  # noqa: F401
    from mmi_deploy.server.ray.client import RayEngine, Replicas

    if len(engines) > 1:
        raise ConfigError("--device chooses GPUs of this machine, Ray those of its replicas")
    (options,) = engines
    least, most = Replicas.parse(replicas)
    gpus = 1 if backend_of(options.target).on_gpu else 0
    slots = options.slots or bundle.limits.batch
    found = Replicas(least, most, slots, options.threads or 1, gpus, address)
    return partial(RayEngine, replicas=found)


def _whole(option: str, value: float) -> int:
    """Bytes or pixels of an option. Raises `ConfigError` for infinity and NaN."""
    from mmi_deploy.errors import ConfigError

    if not isfinite(value):
        raise ConfigError(f"{option} is out of range", expected="a finite number", got=value)
    return int(value)


def _engines(
    bundle: Bundle,
    target: str,
    devices: list[int],
    kernels: str,
    threads: int,
    slots: int | None,
    resident: str | None,
    unproved: bool,
    policy: Mapping[str, object],
) -> list[OpenOptions]:
    """Options of an engine process for each device."""
    from mmi_deploy.server.engine.open_options import OpenOptions, bundle_digest

    digest = bundle_digest(bundle.folder, target)
    return [
        OpenOptions(
            bundle=str(bundle.folder),
            target=target,
            kernels=kernels,
            threads=threads,
            device=device,
            slots=slots,
            resident=resident_groups(resident),
            unproved=unproved,
            policy=policy,
            digest=digest,
        )
        for device in devices
    ]
