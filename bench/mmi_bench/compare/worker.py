"""One side in a process of its own: its memory and its threads are its own.

`python -m mmi_bench.compare.worker SIDE SETTINGS` reads a JSON line per case from stdin
and answers each with one on stdout; everything else that it prints goes to stderr.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from typing import IO, Any

import numpy as np

from mmi_bench.compare.backends import BackendName, Settings, open_backend
from mmi_bench.compare.cases import Case
from mmi_bench.compare.samples import Output, Sample, take
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.documents.images import Rgb
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import MmiError
from mmi_deploy.system.process_memory import peak_bytes


def answer_of(sample: Sample, output: Output) -> dict[str, Any]:
    """What a case is answered with."""
    return {
        "sample": sample.to_json(),
        "text": output.text,
        "pictures": [packed(rgb) for rgb in output.pictures],
        "peak_bytes": peak_bytes(),
    }


def packed(rgb: Rgb) -> dict[str, Any]:
    """A picture as JSON."""
    return {"shape": rgb.shape, "bytes": base64.b64encode(rgb.tobytes()).decode()}


def unpacked(picture: dict[str, Any]) -> Rgb:
    """The picture again, uint8 [h, w, 3]."""
    raw = np.frombuffer(base64.b64decode(picture["bytes"]), np.uint8)
    return raw.reshape(picture["shape"])


def serve(side: BackendName, settings: Settings, questions: IO[str], answers: IO[str]) -> None:
    """Answer until the questions end."""

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        start = time.perf_counter()
        bundle = Bundle.open(settings.bundle, unproved=settings.unproved)
        tokenizer = Tokenizer.open(bundle.tokenizer, bundle.config.tokens)
        generate = open_backend(side, settings)
        answer({"load_seconds": time.perf_counter() - start})
        for line in questions:
            case = Case(**json.loads(line))
            document = case.document(tokenizer, bundle.config)
            answer(answer_of(*take(generate(document, case.options(settings.schedule)))))
    except MmiError as error:
        answer({"error": str(error)})


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    side: BackendName = "runtime" if sys.argv[1] == "runtime" else "pytorch"
    serve(side, Settings.from_json(json.loads(sys.argv[2])), sys.stdin, answers)


if __name__ == "__main__":
    main()
