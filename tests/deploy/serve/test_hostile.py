"""Attempts to make a document's answer depend on its neighbours, or to lose what the service holds.

On exact engines and a fake clock: see `exact_model`, `harness`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from math import inf

import numpy as np
import pytest

from deploy.runtime.fake_model import picture
from deploy.serve.exact_model import Hooks, Inputs, Outputs, exact_runtime
from deploy.serve.harness import Alone, Sent, Service, told
from mmi_deploy.documents.document import Draw, Image, Part, Text, document_of
from mmi_deploy.errors import BusyError, DocumentError, EngineError
from mmi_deploy.runtime.buffers import HOST
from mmi_deploy.runtime.events import ImageDone
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.serve.image_rows import ImageRows, image_key
from mmi_deploy.serve.kv_slots import common_prefix
from mmi_deploy.serve.scheduler import Policy
from mmi_deploy.spec.graphs import Limits, Tensor

World = tuple[Runtime, Hooks]


class Refused(Exception):
    """Raised by an engine on purpose."""


@pytest.fixture
def world() -> World:
    return exact_runtime()


def words(*numbers: int) -> Text:
    return Text(" ".join(f"w{number}" for number in numbers))


LONG = words(*range(5, 29))  # two pieces of a prompt, and longer than the shortest prefix
DRAWING = (words(5, 6), Image(picture(1)), Draw(), words(7))


def alone(world: World, *parts: Part, **options: object) -> Alone:
    options = {"max_tokens": 4, "max_images": 1, **options}
    return Alone(world[0], document_of(*parts), GenerationOptions(**options))  # type: ignore[arg-type]


def neighbours(world: World, *seeds: int) -> list[Alone]:
    """Documents of each kind: text, given pictures, drawn ones."""
    return [
        each
        for seed in seeds
        for each in (
            alone(world, words(8, 9), seed=seed, max_images=0),
            alone(world, LONG, Image(picture(seed)), seed=seed),
            alone(world, words(6), Draw(), seed=seed, schedule="ancestral:4", full_every=2),
        )
    ]


def in_llm_row(token: int, inputs: Inputs) -> np.ndarray:
    """Rows [b] of a run of the LLM with `token` among their tokens."""
    return (inputs["token_ids"] == token).any(axis=1)


# Pictures.


def test_padding_of_a_run_leaves_other_pictures_alone(world: World) -> None:
    """Three pictures in a run of four rows, and a fourth picture that waits for a run of the other
    graph; then the other way round."""
    service = Service(*world, slots=4, images=8, row_counts=(1, 2, 4))
    for rhythms in ((2, 2, 2, 1), (1, 1, 1, 4)):
        service.run(
            *(
                alone(world, words(5 + row), Draw(), seed=row, full_every=rhythm, max_images=0)
                for row, rhythm in enumerate(rhythms)
            )
        )
    assert service.scheduler.runs.counts.runs["shallow"] == 2 + 3
    service.check()


def test_a_document_that_waits_for_a_picture_row_holds_no_image_of_the_unet() -> None:
    """One picture at a time: of three documents, the last shares its images with the first."""
    world = exact_runtime(Limits(context=48, images=6, batch=1, pool=24))
    service = Service(*world, slots=3, images=20)
    assert service.executor.pictures.rows == 1
    shared, others = [Image(picture(1)), Image(picture(2))], [Image(picture(3)), Image(picture(4))]
    first, second = alone(world, *shared, Draw()), alone(world, *others, Draw())
    third = alone(world, *shared, words(9), Draw())
    for document in (first, second):
        service.submit(document)
    while service.sent[0].job.stage != "denoise":
        service.turn()
    service.run(third)
    service.check()
    assert [sent.error for sent in service.sent] == [None] * 3


@pytest.mark.parametrize("gap", [0.0, inf])
def test_unlike_options_share_runs(world: World, gap: float) -> None:
    """Samplers, guidance and rhythms of full steps, each picture beside those of the others."""
    service = Service(*world, slots=8, images=23, policy=Policy(text_gap=gap))
    service.run(
        *(
            alone(
                world,
                Image(picture(seed % 3)),
                Draw(),
                seed=seed // 2,
                schedule=("plain:4", "ancestral:4")[seed % 2],
                guidance=(1.0, 3.5, 7.0)[seed % 3],
                full_every=1 + seed % 4,
                max_images=0,
            )
            for seed in range(8)
        )
    )
    service.check()
