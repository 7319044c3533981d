"""A whole benchmark: server, runs, references, result."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmi_bench.machine import describe as describe_machine
from mmi_bench.serve.band import EXACT, Band
from mmi_bench.serve.client import Client
from mmi_bench.serve.goodput import GoodputLimit
from mmi_bench.serve.load import Load
from mmi_bench.serve.reference import Check, in_process, judge, sequential
from mmi_bench.serve.result import Result
from mmi_bench.serve.run import Kept, Measurement, Plan
from mmi_bench.serve.server_process import served
from mmi_bench.serve.wire import Wire
from mmi_bench.serve.workloads import Workload
from mmi_bench.serve.workloads import describe as describe_workload
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.documents.tokenizer import Tokenizer, read_tokenizer_file
from mmi_deploy.errors import MmiError
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.system.progress import Progress, silent

# Environment variables that are part of the provenance: those that change speed.
_ENVIRONMENT = ("OMP_", "MMI_", "ORT_", "CUDA_", "TOKENIZERS_", "MKL_", "OPENBLAS_")

# Parts of a variable's name whose contents are nobody's business.
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")


@dataclass(frozen=True)
class Server:
    """Server of a benchmark: a URL, or a bundle that is served for it.

    key: of the API. options: of `mmi serve`. target, kernels, threads, device: of both the server
    and the references.
    """

    url: str | None = None
    bundle: Path | None = None
    key: str | None = None
    options: Sequence[str] = ()
    target: str = "cpu"
    kernels: str = "auto"
    threads: int = 0
    device: int = 0
    unproved: bool = False
    model: str | None = None


@dataclass(frozen=True)
class Settings:
    """Everything else of a benchmark. runs: number of windows. band: of outputs
    around their references. wire: its model is the server's unless `Server.model` names one."""

    workload: Workload
    load: Load
    plan: Plan
    limits: Sequence[GoodputLimit] = ()
    runs: int = 1
    band: Band = EXACT
    wire: Wire = field(default_factory=Wire)
    tokenizer: Path | None = None


class Session:
    """Runs a benchmark; `result` holds what was measured, also if it is stopped."""

    def __init__(self, server: Server, settings: Settings, progress: Progress = silent) -> None:
        """Raises `MmiError` for a bundle that cannot be opened."""
        self.server, self.settings, self._progress = server, settings, progress
        self._bundle = None
        if server.bundle is not None:
            self._bundle = Bundle.open(server.bundle, unproved=server.unproved)
        self.result: Result | None = None
        self._kept: list[Kept] = []

    def run(self) -> Result:
        """Measure. Raises `MmiError`."""
        about = self._about()
        with ExitStack() as stack:
            url = self.server.url
            if self._bundle is not None:
                options = self._server_options()
                url = stack.enter_context(served(self._bundle.folder, options, self._progress))
            assert url is not None, "a server has a URL or a bundle"
            check = asyncio.run(self._measure(url, about))
        result = self.result
        assert result is not None, "set once the server has answered"
        if self._bundle is not None and self.settings.plan.check_every:
            check = self._check_in_process()
        self._recompute(result)
        result.check = check
        result.complete = all(one.run.complete for one in result.runs)
        return result

    async def _measure(self, url: str, about: dict[str, Any]) -> Check | None:
        """All runs; the comparison with references of the same server, unless a bundle is here."""
        settings = self.settings
        async with Client(url, self.server.key) as client:
            model = await client.models()
            wire = replace(settings.wire, model=self.server.model or str(model["id"]))
            about["server"] = await self._describe_server(client, model, url)
            self.result = Result(about, settings.plan, settings.limits)
            for number in range(settings.runs):
                measurement = Measurement(
                    client,
                    settings.workload,
                    settings.load,
                    settings.plan,
                    wire,
                    number,
                    self._progress,
                )
                try:
                    await measurement.measure()
                finally:
                    self.result.add(measurement.run)
                self._kept += measurement.run.kept
                if measurement.run.over_saturated:
                    break
            if self._bundle is not None or not settings.plan.check_every:
                return None
            found = await sequential(client, wire, self._kept, self._progress)
        return judge(
            self._kept,
            found,
            "the same requests sent one at a time",
            settings.band,
            settings.plan.check_every,
        )

    def _check_in_process(self) -> Check:
        server, settings = self.server, self.settings
        assert self._bundle is not None, "references in process are those of a bundle"
        runtime = Runtime.open(
            self._bundle,
            target=server.target,
            kernels=server.kernels,
            threads=server.threads,
            device=server.device,
            unproved=server.unproved,
        )
        try:
            found = in_process(runtime, self._kept, self._progress)
        finally:
            runtime.close()
        name, every = "outputs of the bundle in process", settings.plan.check_every
        return judge(self._kept, found, name, settings.band, every)

    def _server_options(self) -> list[str]:
        server = self.server
        options = ["--target", server.target, "--kernels", server.kernels]
        if server.threads:
            options += ["--threads", str(server.threads)]
        if server.device:
            options += ["--device", str(server.device)]
        if server.unproved:
            options.append("--unproved")
        return [*options, *server.options]

    def _about(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "argv": sys.argv,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "clocks_mhz": clocks(),
            "environment": environment(os.environ),
            "workload": describe_workload(settings.workload),
            "load": settings.load.describe(),
            "client": {k: v for k, v in asdict(settings.wire).items() if k != "model"},
        }

    async def _describe_server(
        self, client: Client, model: Mapping[str, Any], url: str
    ) -> dict[str, Any]:
        """Facts about the server; `target` is None where it does not say."""
        bundle, said = self._bundle, model.get("mmi") or {}
        return {
            "url": url,
            "model": self.server.model or model["id"],
            "models_entry": dict(model),
            "version": await client.get_json("/version"),
            "target": self.server.target if bundle else said.get("target"),
            "options": list(self.server.options),
            "bundle": str(bundle.folder) if bundle else None,
            "bundle_sha256": bundle.identity if bundle else None,
        }

    def _recompute(self, result: Result) -> None:
        """Count the tokens of each text again, where a tokenizer is at hand."""
        count = self._counter()
        if count is None:
            return
        for record in result.records:
            if record.outcome == "done":
                record.recomputed = sum(count(text) for text in record.reply.texts)

    def _counter(self) -> Any:
        """Number of tokens of a text, as a function; None without a tokenizer."""
        if self.settings.tokenizer is not None:
            inner = read_tokenizer_file(self.settings.tokenizer)
            return lambda text: len(inner.encode(text, add_special_tokens=False).ids)
        if self._bundle is None:
            return None
        tokenizer = Tokenizer.open(self._bundle.tokenizer, self._bundle.config.tokens)

        def count(text: str) -> int:
            try:
                return len(tokenizer.encode(text))
            except MmiError:  # a word that the tokenizer does not encode
                return 0

        return count


def clocks() -> list[float]:
    """Clock of each core in MHz; none where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Variables that change speed, without secrets."""
    return {
        name: value
        for name, value in sorted(variables.items())
        if name.startswith(_ENVIRONMENT) and not any(word in name for word in _SECRET)
    }
