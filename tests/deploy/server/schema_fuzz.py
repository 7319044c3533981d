"""Schemathesis against the whole server: `python -m deploy.server.schema_fuzz BUNDLE`.

Requests are made from the server's own OpenAPI description, right ones and wrong ones, and sent
over HTTP to a server whose engine answers at once. No answer may be a 5xx, hold a stack trace, a
path of a file or an address of memory, or deny its description. Exit code: that of Schemathesis.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import schemathesis

from deploy.server.server_process import PYTHONPATH, SCRIPTED_ENGINE, ServerProcess

INTERNAL = re.compile(
    r"Traceback|File \"|0x[0-9a-f]{6,}|/(?:usr|home|root|tmp|var|lib|proc)/|site-packages|\.py\b"
)

CHECKS = (
    "not_a_server_error,content_type_conformance,response_schema_conformance,shows_no_internals"
)


@schemathesis.check
def shows_no_internals(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """Fail for an answer with a stack trace, a path or an address that the request did not hold."""
    for found in INTERNAL.findall(response.text if response.content else ""):
        assert found in str(case.as_curl_command()), f"the answer shows {found}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Run Schemathesis against mmi serve.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--examples", type=int, default=200, help="most cases of an endpoint")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    options = ["--slots", "4", "--queue", "64"]
    engine = {"engine": SCRIPTED_ENGINE, "environment": {"MMI_SCRIPT": "answer"}}
    with (
        ServerProcess(arguments.bundle, *options, **engine) as server,
        tempfile.TemporaryDirectory() as folder,  # it leaves its finds in the current one
    ):
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.address}/openapi.json"),
            *("--max-examples", str(arguments.examples), "--seed", str(arguments.seed)),
            *("--checks", CHECKS, "--phases", "examples,coverage,fuzzing"),
            *("--continue-on-failure", "--no-shrink", "--suppress-health-check", "all"),
        ]
        # Its hooks are a module of this name on the path.
        variables = {"SCHEMATHESIS_HOOKS": __spec__.name, "PYTHONPATH": PYTHONPATH}
        return subprocess.run(command, cwd=folder, env={**os.environ, **variables}).returncode


if __name__ == "__main__":
    sys.exit(main())
