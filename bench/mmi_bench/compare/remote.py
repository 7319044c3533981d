"""Client of a worker process; see `worker.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mmi_bench.compare.backends import BackendName, Settings
from mmi_bench.compare.cases import Case
from mmi_bench.compare.samples import Output, Sample
from mmi_bench.compare.worker import unpacked
from mmi_deploy.errors import MmiError

# Environment variables that set the threads of numerical libraries.
_THREAD_POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Answer:
    """Result of one case of one backend; `peak_bytes`: its peak memory so far."""

    sample: Sample
    output: Output
    peak_bytes: int


class Remote:
    """Backend in its own process. Use it in a `with` block."""

    def __init__(self, backend: BackendName, settings: Settings) -> None:
        self.backend = backend
        pools = dict.fromkeys(_THREAD_POOLS, str(settings.threads))
        paths = [str(Path(entry).resolve()) for entry in sys.path if entry]
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mmi_bench.compare.worker",
                backend,
                json.dumps(settings.to_json()),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **pools, "PYTHONPATH": os.pathsep.join(paths)},
        )
        self.load_seconds = 0.0

    def __enter__(self) -> Remote:
        try:
            self.load_seconds = float(self._read()["load_seconds"])
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def run(self, case: Case) -> Answer:
        """Run one case; raises `MmiError` if the backend fails."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `_read` says how the process ended
            self._process.stdin.write(json.dumps(case.to_json()) + "\n")
            self._process.stdin.flush()
        answer = self._read()
        pictures = [unpacked(picture) for picture in answer["pictures"]]
        return Answer(
            Sample(**answer["sample"]), Output(answer["text"], pictures), answer["peak_bytes"]
        )

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
            raise MmiError(
                f"the {self.backend} backend of the benchmark {how}",
                fix="see its own message above, if there is one",
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise MmiError(answer["error"])
        return answer

    def _end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
