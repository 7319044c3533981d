"""Commands of the small paper: each is run once, timed, and remembered, so that a run resumes."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmi_deploy.cli.app import run
from mmi_deploy.cli.console import remarks
from mmi_deploy.errors import MmiError
from mmi_deploy.system.files import write_file

STAGES = "stages.jsonl"


@dataclass(frozen=True)
class Done:
    """A stage that is done: its command, seconds on the clock and of the processors, and the
    metrics that it printed."""

    stage: str
    command: str
    seconds: float
    processor_seconds: float
    metrics: dict[str, float] = field(default_factory=dict)


class Stages:
    """Stages in the folder `out`, whose file `STAGES` has a line for each that is done."""

    def __init__(self, out: Path) -> None:
        self._path = out / STAGES
        self.done: dict[str, Done] = {}
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                one = Done(**json.loads(line))
                self.done[one.stage] = one

    def mmi(self, stage: str, *arguments: str | Path, prints_json: bool = False) -> Done:
        """Run `mmi` with these arguments, unless it was run before. Raises `MmiError` if it fails,
        or if the stage was done by another command."""
        command = " ".join(["mmi", *map(str, arguments)])
        if (known := self._known(stage, command)) is not None:
            return known
        remarks().print(f"{stage}: {command}")
        clock, processor = time.perf_counter(), time.process_time()
        printed = io.StringIO()
        with redirect_stdout(printed):
            code = run([*map(str, arguments)])
        if code:
            raise MmiError(
                f"{stage} ended with exit code {code}", fix="the same command goes on from there"
            )
        return self._add(
            Done(
                stage,
                command,
                round(time.perf_counter() - clock, 1),
                round(time.process_time() - processor, 1),
                json.loads(printed.getvalue())["metrics"] if prints_json else {},
            )
        )

    def note(self, stage: str, what: str, metrics: dict[str, float]) -> Done:
        """Remember metrics that no command printed."""
        return self._known(stage, what) or self._add(Done(stage, what, 0.0, 0.0, metrics))

    def _known(self, stage: str, command: str) -> Done | None:
        known = self.done.get(stage)
        if known is not None and known.command != command:
            raise MmiError(
                f"{self._path.parent} holds a run with other settings: {stage}",
                expected=known.command,
                got=command,
                fix="choose another folder",
            )
        return known

    def _add(self, one: Done) -> Done:
        self.done[one.stage] = one
        write_file(self._path, "".join(json.dumps(asdict(d)) + "\n" for d in self.done.values()))
        return one


def settings(values: dict[str, Any]) -> Sequence[str]:
    """Options `--set` of `mmi train`."""
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
