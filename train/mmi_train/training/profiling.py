"""Traces of a run's operators, for chrome://tracing or Perfetto."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from mmi_deploy.system.files import temporary_name


@contextmanager
def profiled(
    folder: Path, steps: int, rank: int, device: torch.device
) -> Iterator[Callable[[], None]]:
    """Write the operators of `steps` steps, after a first one, to `folder/rank-R.json` in the
    trace format of Chrome. The block calls what it gets after each step; 0: nothing is traced."""
    if not steps:
        yield lambda: None
        return
    folder.mkdir(parents=True, exist_ok=True)

    def write(seen: profile) -> None:
        target = folder / f"rank-{rank}.json"
        scratch = temporary_name(target)
        seen.export_chrome_trace(str(scratch))
        scratch.replace(target)

    kinds = [ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    plan = schedule(wait=0, warmup=1, active=steps, repeat=1)
    with profile(activities=kinds, schedule=plan, on_trace_ready=write) as seen:
        yield seen.step
