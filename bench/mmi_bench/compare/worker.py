"""Worker process of one backend, so that its memory and threads are its own.

`python -m mmi_bench.compare.worker BACKEND SETTINGS` reads a JSON line per case from stdin
and answers each with one on stdout; all other output goes to stderr.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from typing import IO, Any

import numpy as np

from mmi_bench.compare.backends import (
    COMPILED,
    BackendName,
    Settings,
    backend_name,
    open_backend,
)
from mmi_bench.compare.cases import Case
from mmi_bench.compare.samples import Output, Sample, take
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.documents.images import Rgb
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import MmiError
from mmi_deploy.system.process_memory import peak_bytes


def answer_of(sample: Sample, output: Output) -> dict[str, Any]:
    """Answer to a case as JSON."""
    return {
        "sample": sample.to_json(),
        "text": output.text,
        "pictures": [packed(rgb) for rgb in output.pictures],
        "peak_bytes": peak_bytes(),
    }


def packed(rgb: Rgb) -> dict[str, Any]:
    """Encode a picture as JSON."""
    return {"shape": rgb.shape, "bytes": base64.b64encode(rgb.tobytes()).decode()}


def unpacked(picture: dict[str, Any]) -> Rgb:
    """Decode a picture of `packed`, uint8 [height, width, 3]."""
    raw = np.frombuffer(base64.b64decode(picture["bytes"]), np.uint8)
    return raw.reshape(picture["shape"])


def serve(backend: BackendName, settings: Settings, questions: IO[str], answers: IO[str]) -> None:
    """Load a backend and run the cases of `questions`, one JSON line each, until they end."""

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        start = time.perf_counter()
        bundle = Bundle.open(settings.bundle, unproved=settings.unproved)
        tokenizer = Tokenizer.open(bundle.tokenizer, bundle.config.tokens)
        generate = open_backend(backend, settings)
        answer({"load_seconds": time.perf_counter() - start})
        for line in questions:
            case = Case(**json.loads(line))
            document = case.document(tokenizer, bundle.config)
            events = generate(document, case.options(settings.schedule))
            answer(answer_of(*take(events, settings.clock)))
    except MmiError as error:
        answer({"error": str(error)})
    except Exception as error:
        if backend != COMPILED:
            raise
        # The exceptions of `torch.compile` and of its C++ compiler share no narrower class.
        answer({"error": f"torch.compile failed: {_first_line(error)}"})


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not mix with the answers
    serve(
        backend_name(sys.argv[1]), Settings.from_json(json.loads(sys.argv[2])), sys.stdin, answers
    )


if __name__ == "__main__":
    main()
