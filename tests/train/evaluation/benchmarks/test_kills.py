"""An evaluation that is killed at random moments and begun again gives the same report."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exports import SHIPPED, Exported
from train.evaluation.benchmarks.test_answers import write_questions

QUESTIONS = 60


def started(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """`mmi` in a process of its own."""
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "mmi_deploy", *words],
            stdout=out,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )


def report(words: list[str], log: Path) -> dict[str, Any]:
    process = started(words, log)
    assert process.wait() == 0
    return dict(json.loads(log.read_text()))


def answers(path: Path) -> dict[int, str]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({one["id"] for one in found}) == len(found), "a question was answered twice"
    return {one["id"]: one["text"] for one in found}


def has_answers(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(50, marks=pytest.mark.exhaustive),
    ],
)
def test_a_killed_evaluation_gives_the_same_report(
    kills: int, exported_once: Callable[[str], Exported], tmp_path: Path
) -> None:
    """Each attempt is killed between the moments at which it has begun to answer and has ended, or
    while it loads; when all questions are answered, the run begins anew."""
    bundle = str(exported_once(SHIPPED).bundle.folder)
    data = write_questions(tmp_path / "data", QUESTIONS, np.random.default_rng(5))
    words = ["evaluate", bundle, "--benchmark", "vqav2", "--data", str(data), "--prompt", "chat"]
    words += ["--beams", "1", "--threads", "1", "--slots", "2", "--json", "-o"]
    log, whole = tmp_path / "log", tmp_path / "whole.jsonl"
    begun = time.perf_counter()
    expected = report([*words, str(whole)], log)
    took = time.perf_counter() - begun
    draw, killed, within, number = random.Random(3), 0, 0, 0
    while killed < kills:
        number += 1
        out = tmp_path / f"answers{number}.jsonl"
        while killed < kills:
            begun, process = time.perf_counter(), started([*words, str(out)], log)
            end = begun + draw.uniform(0.2, 1.0) * took
            # The first kill comes right after the first answer, the others at any time.
            while process.poll() is None and (
                time.perf_counter() < end if killed else not has_answers(out)
            ):
                time.sleep(0.002)
            before = process.poll()
            process.send_signal(signal.SIGKILL)
            process.wait()
            if before is not None:
                assert before == 0
                took = min(took, time.perf_counter() - begun)  # the machine was busier before
                break
            killed += 1
            size = out.stat().st_size if out.exists() else 0
            within += 0 < size < whole.stat().st_size
        assert report([*words, str(out)], log) == expected
        assert answers(out) == answers(whole)
    assert within, "no kill came between the first answer and the last"
