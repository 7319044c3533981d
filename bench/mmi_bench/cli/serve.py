"""`mmi bench serve`: benchmark a server over HTTP."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from mmi_deploy.cli.console import MOST_THREADS, print_json, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.hub_folders import local_folder, model_name
from mmi_deploy.cli.target_options import Device, Kernels, TargetName
from mmi_deploy.errors import ConfigError
from mmi_deploy.hub.kinds import BUNDLE
from mmi_deploy.hub.reference import is_reference
from mmi_deploy.spec.backends import AUTO, CPU
from mmi_deploy.system.output_folder import check_replaceable, new_folder
from mmi_deploy.system.progress import shown

if TYPE_CHECKING:
    from mmi_bench.serve.result import Result
    from mmi_bench.serve.wire import Endpoint, Transport

WORKLOAD, LOAD, MEASUREMENT = "Workload", "Load", "Measurement"
CLIENT, SERVER, RESULTS = "Client", "Server (if a bundle is given)", "Results"

KIND = "benchmark"

# Environment variables with the key of the API, the first that is set.
KEYS = ("MMI_API_KEY", "OPENAI_API_KEY")


def serve(
    server: Annotated[
        str,
        typer.Argument(
            metavar="URL|BUNDLE",
            help="Running server, or bundle to serve: a folder, or hf://org/name.",
        ),
    ] = "bundles/tiny",
    workload: Annotated[
        list[str] | None,
        typer.Option(
            "--workload",
            "-w",
            metavar="NAME|FILE.jsonl",
            help="text, caption, question-1, question-4, question-8, text-to-image, "
            "segmentation-to-image, story, conversation, or documents of your own as for "
            "`mmi generate`; repeated: in turn.",
            show_default="story",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, help="Seed of prompts and arrivals.", rich_help_panel=WORKLOAD),
    ] = 0,
    repeat: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Repeat N prompts, so that caches answer.",
            show_default="a new prompt in each request",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    image_side: Annotated[
        int,
        typer.Option(
            min=8, max=4096, help="Side of given pictures.", metavar="PX", rich_help_panel=WORKLOAD
        ),
    ] = 256,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency",
            "-c",
            min=1,
            max=4096,
            help="Closed loop: so many requests in flight.",
            metavar="N",
            show_default="1",
            rich_help_panel=LOAD,
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Open loop: so many requests a second, as a Poisson process.",
            metavar="R",
            show_default=False,
            rich_help_panel=LOAD,
        ),
    ] = None,
    burstiness: Annotated[
        float | None,
        typer.Option(
            help="With --rate: gamma intervals of this shape; below 1 in bursts, above 1 more "
            "even.",
            metavar="B",
            show_default="1, Poisson",
            rich_help_panel=LOAD,
        ),
    ] = None,
    constant: Annotated[
        bool, typer.Option("--constant", help="With --rate: equal intervals.", rich_help_panel=LOAD)
    ] = False,
    offline: Annotated[
        bool,
        typer.Option(
            "--offline", help="All requests at once; see --requests.", rich_help_panel=LOAD
        ),
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Arrival times, a line each: seconds, or an object with time or timestamp (ms).",
            dir_okay=False,
            rich_help_panel=LOAD,
        ),
    ] = None,
    ramp_up: Annotated[
        float,
        typer.Option(
            min=0, help="Seconds in which the load grows.", metavar="S", rich_help_panel=LOAD
        ),
    ] = 0.0,
    requests: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Least requests of the window; with --offline, their number.",
            metavar="N",
            show_default="5 times those in flight; --offline: 100",
            rich_help_panel=MEASUREMENT,
        ),
    ] = None,
    min_seconds: Annotated[
        float,
        typer.Option(
            min=0, help="Least length of the window.", metavar="S", rich_help_panel=MEASUREMENT
        ),
    ] = 30.0,
    max_seconds: Annotated[
        float,
        typer.Option(
            min=0.1, help="Greatest length of it.", metavar="S", rich_help_panel=MEASUREMENT
        ),
    ] = 900.0,
    warm_up: Annotated[
        float,
        typer.Option(
            min=0,
            help="Most seconds of warm-up, which ends when three windows of requests agree.",
            metavar="S",
            rich_help_panel=MEASUREMENT,
        ),
    ] = 60.0,
    runs: Annotated[
        int,
        typer.Option(
            min=1,
            max=100,
            help="Windows; 5 or more for intervals of run means.",
            metavar="N",
            rich_help_panel=MEASUREMENT,
        ),
    ] = 1,
    goodput: Annotated[
        str | None,
        typer.Option(
            help="Limits of a good request.",
            metavar="ttft=200ms,gap_p99=50ms,image=2s,e2e=5s",
            show_default=False,
            rich_help_panel=MEASUREMENT,
        ),
    ] = None,
    check_every: Annotated[
        int,
        typer.Option(
            min=0,
            help="Compare one in N requests with its reference output; 0: none.",
            metavar="N",
            rich_help_panel=MEASUREMENT,
        ),
    ] = 20,
    band: Annotated[
        str,
        typer.Option(
            help="Levels by which a picture may differ from its reference; or a file of "
            "`mmi evaluate --against … -o FILE`, whose share of other texts is allowed, too.",
            metavar="LEVELS|FILE",
            rich_help_panel=MEASUREMENT,
        ),
    ] = "1",
    endpoint: Annotated[
        str, typer.Option(metavar="chat|responses", help="Endpoint.", rich_help_panel=CLIENT)
    ] = "chat",
    transport: Annotated[
        str,
        typer.Option(
            metavar="inline|chunked|url", help="Transport of pictures.", rich_help_panel=CLIENT
        ),
    ] = "inline",
    previews: Annotated[
        int,
        typer.Option(
            min=0, max=3, help="Partial pictures of each.", metavar="N", rich_help_panel=CLIENT
        ),
    ] = 0,
    progress: Annotated[
        bool,
        typer.Option(
            "--progress/--no-progress",
            help="Ask for an event of each denoising step.",
            rich_help_panel=CLIENT,
        ),
    ] = True,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="Send OpenAI's fields alone, for other servers of text.",
            rich_help_panel=CLIENT,
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Model.", show_default="the server's first", rich_help_panel=CLIENT),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the key of the API.",
            show_default="$MMI_API_KEY or $OPENAI_API_KEY",
            dir_okay=False,
            rich_help_panel=CLIENT,
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="tokenizer.json to count the written tokens again.",
            show_default="the bundle's",
            dir_okay=False,
            rich_help_panel=CLIENT,
        ),
    ] = None,
    server_options: Annotated[
        str,
        typer.Option(
            "--server-options",
            help="Options of `mmi serve`, as '--slots 8'.",
            metavar="OPTIONS",
            show_default=False,
            rich_help_panel=SERVER,
        ),
    ] = "",
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_THREADS,
            help="CPU threads of an engine.",
            metavar="N",
            show_default="those of the server",
            rich_help_panel=SERVER,
        ),
    ] = None,
    target: TargetName = CPU,
    device: Device = 0,
    kernels: Kernels = AUTO,
    unproved: Annotated[
        bool,
        typer.Option("--unproved", help="Run graphs that have no receipt.", rich_help_panel=SERVER),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for the result: JSON, every event, CSV, Markdown, HTML with plots.",
            file_okay=False,
            rich_help_panel=RESULTS,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", "-f", help="Replace a folder that mmi wrote.", rich_help_panel=RESULTS
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON.", rich_help_panel=RESULTS)
    ] = False,
) -> None:
    """Benchmark a server: latency, throughput and goodput under load.

    Warm-up is discarded until the latencies are steady; the window ends before requests drain. One
    in 20 outputs is compared with a reference: the bundle in process, or the same request sent
    alone.

    Exit codes: 3 if an output differs (INVALID), 5 if an open loop over-saturates the server.
    """
    if out:
        check_replaceable(out, force, kind=KIND)
    with extras("bench serve"):
        import aiohttp  # noqa: F401

        if out:
            import matplotlib  # noqa: F401
        from mmi_bench.serve.band import parse_band
        from mmi_bench.serve.definitions import EXIT_INVALID, EXIT_OVER_SATURATED
        from mmi_bench.serve.goodput import parse_goodput
        from mmi_bench.serve.load import load_of
        from mmi_bench.serve.report import print_report
        from mmi_bench.serve.run import Plan
        from mmi_bench.serve.session import Server, Session, Settings
        from mmi_bench.serve.wire import Wire
        from mmi_bench.serve.workloads import open_workload
    load = load_of(
        concurrency=concurrency,
        rate=rate,
        burstiness=burstiness,
        constant=constant,
        offline=offline,
        trace=trace,
        ramp_up=ramp_up,
        seed=seed,
    )
    if max_seconds < min_seconds:
        raise ConfigError(
            "--max-seconds is below --min-seconds",
            expected=f"{min_seconds} or more",
            got=max_seconds,
        )
    is_url = server.startswith(("http://", "https://"))
    settings = Settings(
        workload=open_workload(workload or ["story"], seed, image_side, repeat),
        load=load,
        plan=Plan(
            requests=requests or (100 if offline else 1),
            min_seconds=min_seconds,
            max_seconds=max_seconds,
            warm_up=warm_up,
            check_every=check_every,
        ),
        limits=parse_goodput(goodput) if goodput else (),
        runs=runs,
        band=parse_band(band),
        wire=Wire(
            endpoint=cast("Endpoint", endpoint),
            transport=cast("Transport", transport),
            progress=progress,
            plain=plain,
            previews=previews,
        ),
        tokenizer=tokenizer,
    )
    options = shlex.split(server_options)
    if is_reference(server):  # in place of the folder's name in the cache
        options = ["--name", model_name(Path(server)), *options]
    served = Server(
        url=server if is_url else None,
        bundle=None if is_url else local_folder(Path(server), BUNDLE, targets=[target]),
        key=_key(key_file),
        options=options,
        target=target,
        kernels=kernels,
        threads=threads or 0,
        device=device,
        unproved=unproved,
        model=model,
    )
    with shown(remarks(), "starting") as report:
        session = Session(served, settings, report)
        try:
            result = session.run()
        except KeyboardInterrupt:
            if out and session.result and session.result.records:
                _write(session.result, out, force)  # marked as incomplete
            raise
    if out:
        _write(result, out, force)
    if as_json:
        print_json(result.to_json())
    else:
        print_report(results(), result)
        if out:
            remarks().print(f"Read it in {out / 'index.html'}")
    if not result.valid:
        raise typer.Exit(EXIT_INVALID)
    if result.over_saturated:
        raise typer.Exit(EXIT_OVER_SATURATED)


def _write(result: Result, out: Path, force: bool) -> None:
    from mmi_bench.serve.report import write_files

    with new_folder(out, force, kind=KIND) as work:
        write_files(result, work)


def _key(file: Path | None) -> str | None:
    """Key of the API. Raises `ConfigError` for a file that cannot be read."""
    if file is None:
        return next((os.environ[name] for name in KEYS if os.environ.get(name)), None)
    try:
        return file.read_text(encoding="utf-8").split()[0]
    except (OSError, UnicodeDecodeError, IndexError):
        raise ConfigError(f"--key-file {file} holds no key that can be read") from None
