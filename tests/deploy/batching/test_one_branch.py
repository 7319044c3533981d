"""Documents of a distilled model at once: each as alone, whatever runs beside it."""

from __future__ import annotations

import pytest

from deploy.batching.exact_model import exact_runtime
from deploy.batching.harness import told
from mmi_deploy.batching.batch_engine import BatchEngine
from mmi_deploy.documents.document import Draw, Text, document_of
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.generation import generate
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.spec.config import DistillationConfig

DISTILLED = DistillationConfig("guidance", 2.5)


def test_pictures_at_once_are_those_alone() -> None:
    """Three documents with a picture each, of which two add keyed noise between their steps."""
    documents = [document_of(Text(f"w{9 + index} w7"), Draw()) for index in range(3)]
    options = [
        GenerationOptions(seed=index, max_tokens=2, max_images=0, schedule=key)
        for index, key in enumerate(("ancestral:4", "plain:4", "ancestral:4"))
    ]
    runtime, _ = exact_runtime(distilled=DISTILLED)
    alone = [
        [told(event) for event in generate(runtime, document, option)]
        for document, option in zip(documents, options, strict=True)
    ]
    pictures = {told for events in alone for told in events if told[0] == "done"}
    assert len(pictures) == 3
    runtime, hooks = exact_runtime(distilled=DISTILLED)
    rows: set[int] = set()
    hooks.before = lambda name, x: rows.add(len(x.get("latents", ()))) if "step" in x else None
    with BatchEngine(runtime) as engine:
        streams = [
            engine.submit(document, option)
            for document, option in zip(documents, options, strict=True)
        ]
        together = [[told(event) for event in stream] for stream in streams]
    assert together == alone
    assert max(rows) > 1  # runs were shared


def test_another_guidance_is_refused_in_one_line() -> None:
    runtime, _ = exact_runtime(distilled=DISTILLED)
    document = document_of(Text("w9"), Draw())
    with pytest.raises(ConfigError, match=r"guidance 2\.5 alone.*guidance 3\.5") as error:
        next(generate(runtime, document, GenerationOptions(guidance=3.5)))
    assert "\n" not in str(error.value)
    list(generate(runtime, document, GenerationOptions(guidance=2.5, max_tokens=0, max_images=0)))
