"""Run studies: every row with every seed, and the tables of what there is so far."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmi_deploy.system.files import write_file
from mmi_deploy.system.output_folder import run_folder
from mmi_deploy.system.progress import Progress, silent
from mmi_train.ablation.report import as_json, as_markdown
from mmi_train.ablation.run import Scale, Start, result_of
from mmi_train.ablation.studies import Study

RUNS, JSON, MARKDOWN = "runs", "results.json", "results.md"


def ablate(
    studies: Sequence[Study],
    seeds: Sequence[int],
    scale: Scale,
    start: Path,
    out: Path,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run `studies` with `seeds` from the model folder `start`; returns the report, which
    `out/results.json` and `out/results.md` get too, after every seed.

    Runs are kept in `out/runs`: the same call does only what is missing, and goes on from the last
    checkpoint of a run that was stopped. Raises `MmiError` where another process works there.
    """
    begun = Start.at(start)
    results: dict[str, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    pictures: dict[str, dict[str, str]] = defaultdict(dict)
    seconds: dict[str, float] = {}
    report: dict[str, Any] = {}
    with run_folder(out, "ablation"):
        runs = out / RUNS
        runs.mkdir(exist_ok=True)
        for done, seed in enumerate(seeds, 1):
            for study in studies:
                for row in study.rows:
                    step = _named(progress, f"{study.name}, {row.name}, seed {seed}")
                    found = result_of(row.training, scale, begun, seed, runs, step)
                    results[study.name][row.name].append(found["measures"])
                    seconds[json.dumps(found["settings"])] = found["seconds"]
                    if "pictures" in found:
                        sheet = f"{RUNS}/{found['pictures']}"
                        pictures[study.name].setdefault(row.name, sheet)
            about = {
                "seeds": list(seeds[:done]),
                "scale": asdict(scale),
                "start": {"folder": str(start), "sha256": begun.sha256},
                "runs": len(seconds),
                "cpu_seconds": round(sum(seconds.values()), 1),
            }
            report = {
                "about": about,
                "studies": {s.name: as_json(s, results[s.name]) for s in studies},
            }
            write_file(out / JSON, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
            tables = [as_markdown(s, results[s.name], pictures[s.name]) for s in studies]
            write_file(out / MARKDOWN, "\n".join([_heading(about), *tables]))
    return report


def _named(progress: Progress, run: str) -> Progress:
    """`progress` with the name of the run before each stage."""

    def report(what: str, done: int = 0, total: int = 0, **more: Any) -> None:
        progress(f"{run}: {what}", done, total, **more)

    return report


def _heading(about: dict[str, Any]) -> str:
    scale = about["scale"]
    words = (
        f"{scale['steps']} steps from {about['start']['folder']}, {scale['questions']} held-out "
        f"questions of each kind, seeds {', '.join(map(str, about['seeds']))}; {about['runs']} "
        f"runs, {about['cpu_seconds'] / 60:.0f} minutes of CPU time. Layers of MMFS are "
        f"{'new in every run' if scale['new_mmfs'] else 'those of the start model'}. Means ± half "
        "of the 95 % interval (Student's t); differences are paired by seed. The paper's models, "
        "data and measures are others: its numbers stand here for their direction alone."
    )
    return f"# Ablations on the drawn world\n\n{words}\n"
