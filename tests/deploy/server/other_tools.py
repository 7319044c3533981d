"""AIPerf and GuideLLM, unmodified, against `mmi serve`.

`python -m deploy.server.other_tools BUNDLE`, in tests/, runs both and prints their reports.
Both are installed into environments of their own in `--environments` at the first run (GuideLLM
brings torch). The bundle's tokenizer must know the words of the prompts; the tiny model's does. Of
each run the tool's own count of errors must be 0; exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from deploy.server.requests import data_url
from deploy.server.server_process import ServerProcess

PROMPTS = ("the red square moves down.", "a blue circle is on the left.")
REQUESTS = 8


def environment(folder: Path, *packages: str) -> Path:
    """Folder of the programs of a virtual environment with `packages`, made if it is not there."""
    if not (folder / "made").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "pip"), "install", "-q", "--disable-pip-version-check"]
        for package in packages:
            subprocess.run([*pip, package], check=True)
        (folder / "made").touch()
    return folder / "bin"


def run(command: list[str], folder: Path) -> None:
    print("$", " ".join(command), flush=True)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, cwd=folder, env=variables, check=True, timeout=600)


def lines(path: Path, entries: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def aiperf(programs: Path, server: ServerProcess, bundle: Path, work: Path) -> int:
    """Chat, chat with a picture, Responses and Images, all streamed; returns failed requests."""
    texts = [PROMPTS[number % 2] for number in range(REQUESTS)]
    plain = lines(work / "texts.jsonl", [{"text": text} for text in texts])
    rgb = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    shown = [{"text": text, "image": data_url(rgb)} for text in texts]
    pictures = lines(work / "pictures.jsonl", shown)
    failed = 0
    for number, (endpoint, prompts) in enumerate(
        (("chat", plain), ("chat", pictures), ("responses", plain), ("image_generation", plain))
    ):
        out = work / f"aiperf-{number}"
        command = [str(programs / "aiperf"), "profile", "-m", "tiny", "-u", server.address]
        command += ["--endpoint-type", endpoint, "--streaming", "--tokenizer", str(bundle)]
        command += ["--concurrency", "2", "--request-count", str(REQUESTS), "--ui", "simple"]
        command += ["--input-file", str(prompts), "--custom-dataset-type", "single_turn"]
        command += ["--artifact-dir", str(out), "--use-server-token-count"]
        if endpoint != "image_generation":
            command += ["--osl", "16", "--extra-inputs", "ignore_eos:true"]
        run(command, work)
        records = (out / "profile_export.jsonl").read_text().splitlines()
        errors = [one for one in map(json.loads, records) if one.get("error")]
        assert len(records) == REQUESTS, endpoint
        failed += len(errors)
    return failed


def guidellm(programs: Path, server: ServerProcess, bundle: Path, work: Path) -> int:
    """Chat at two streams; returns failed requests."""
    prompts = [
        {"prompt": PROMPTS[number % 2], "output_tokens_count": 16} for number in range(REQUESTS)
    ]
    path = lines(work / "prompts.jsonl", prompts)
    out = work / "guidellm.json"
    command = [str(programs / "guidellm"), "run", "--disable-console-interactive"]
    command += ["--backend", f"kind=openai_http,target={server.address},model=tiny"]
    command += ["--profile", "kind=concurrent,streams=2"]
    command += ["--constraint", f"kind=max_requests,count={REQUESTS}"]
    command += ["--tokenizer", f"kind=hf_auto,model={bundle}"]
    command += ["--data", f"kind=json_file,path={path}"]
    command += ["--output", "kind=console", "--output", f"kind=json,path={out}"]
    run(command, work)
    (benchmark,) = json.loads(out.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] == REQUESTS, totals
    return int(totals["errored"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--environments", type=Path, default=Path("/tmp/mmi-other-tools"))
    given = parser.parse_args()
    bundle = given.bundle.absolute()
    given.environments.mkdir(parents=True, exist_ok=True)
    first = environment(given.environments / "aiperf", "aiperf")
    # The CPU build of torch first, or pip takes gigabytes of CUDA.
    second = environment(given.environments / "guidellm", "torch==2.13.0", "guidellm")
    with TemporaryDirectory() as work, ServerProcess(bundle) as server:
        failed = aiperf(first, server, bundle, Path(work))
        failed += guidellm(second, server, bundle, Path(work))
    print(f"failed requests: {failed}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
