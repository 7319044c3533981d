"""The top of the parity ladder: whole documents, a bundle in ONNX Runtime against plain PyTorch.

Both implementations get the same document, options and seed. They share no code but the rules of
sampling and the keyed draws: the runtime has engines, caches, pools and a table of coefficients;
PyTorch reads everything again at every turn and draws with diffusers' own solver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest

from exports import Exported
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.documents.document import Document, Draw, Image, Text, document_of
from mmi_deploy.documents.images import Rgb
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.runtime import generation as fast
from mmi_deploy.runtime.backend import HostBackend
from mmi_deploy.runtime.events import Event, Finished, ImageDone, TextDelta
from mmi_deploy.runtime.onnxruntime.engine import OnnxOptions, OnnxRuntimeEngine
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.session import Session
from mmi_export.schedules import scheduler_of
from mmi_train.baseline import generation as slow
from mmi_train.data.synthetic.vocabulary import build_tokenizer
from mmi_train.model.mm_interleaved import MMInterleaved


def image(seed: int) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (50, 70, 3), np.uint8))


DOCUMENTS = {
    "text alone": document_of(Text("draw a large red circle")),
    "an image": document_of(Text("what colour is the"), image(1), Text("the circle is")),
    "several images": document_of(image(1), Text("a blue square"), image(2), image(3), Text("a")),
    "a picture to draw": document_of(Text("a small square"), image(4), Text("draw"), Draw()),
    "nothing but a picture to draw": document_of(Draw()),
}
# A drawn picture may differ by one level, and what is sampled after it looks at it: the seeds are
# such that no draw lies on the border between two tokens.
WAYS = {
    "greedy": GenerationOptions(max_tokens=9, max_images=1, temperature=0.0),
    "sampled": GenerationOptions(
        max_tokens=9, max_images=1, temperature=0.9, top_k=30, repetition_penalty=1.3, seed=7
    ),
    "drawing at once": GenerationOptions(
        max_tokens=4, max_images=2, draw_first=True, temperature=0.0, seed=8
    ),
    "turns": GenerationOptions(
        turn_tokens=3, max_images=2, max_tokens=6, temperature=1.0, top_p=0.8, seed=11
    ),
}


@dataclass
class Run:
    """Result of a document: its tokens, pictures and text, and the reason of its end."""

    token_ids: list[int]
    pictures: list[Rgb]
    text: str
    last: Finished


def taken(events: Iterator[Event], token_ids: Callable[[], list[int]]) -> Run:
    seen = list(events)
    assert isinstance(seen[-1], Finished)
    return Run(
        token_ids(),
        [event.rgb for event in seen if isinstance(event, ImageDone)],
        "".join(event.text for event in seen if isinstance(event, TextDelta)),
        seen[-1],
    )


@dataclass
class Implementations:
    """One model in the runtime and in PyTorch."""

    model: MMInterleaved
    bundle: Bundle
    tokenizer: Tokenizer
    runtime: Runtime

    @classmethod
    def of(cls, model: MMInterleaved, bundle: Bundle) -> Implementations:
        tokenizer = Tokenizer(build_tokenizer(), bundle.config.tokens)
        backend = HostBackend(
            bundle.graphs,
            bundle.limits,
            lambda graph: OnnxRuntimeEngine(bundle.graph_file(graph.name), graph, OnnxOptions(2)),
        )
        runtime = Runtime(bundle.config, tokenizer, backend, bundle.schedule, bundle.schedules)
        return cls(model, bundle, tokenizer, runtime)

    def fast(
        self, document: Document, options: GenerationOptions, patch: pytest.MonkeyPatch
    ) -> Run:
        sessions: list[Session] = []

        def kept(runtime: Runtime, rows: int) -> Session:
            sessions.append(Session(runtime, rows))
            return sessions[-1]

        patch.setattr(fast, "Session", kept)
        events = fast.generate(self.runtime, document, options)
        return taken(events, lambda: sessions[0].token_ids)

    def slow(
        self, document: Document, options: GenerationOptions, patch: pytest.MonkeyPatch
    ) -> Run:
        row = slow.Row(self.model, self.bundle.limits)
        patch.setattr(slow, "Row", lambda *_: row)
        key = self.bundle.schedule(options.schedule).key
        scheduler = scheduler_of(key, self.model.config.image_decoder)
        eta = float(key.startswith("ddpm"))
        events = slow.generate(self.model, self.tokenizer, document, options, scheduler, eta=eta)
        return taken(events, lambda: row.sequence.token_ids)


def assert_same(
    implementations: Implementations, document: Document, options: GenerationOptions
) -> Run:
    """Assert equal tokens, text and reason; pictures of 8 bits within one level of each other: fp32
    in another order moves a value across a rounding boundary now and then."""
    with pytest.MonkeyPatch.context() as patch:
        expected = implementations.slow(document, options, patch)
        got = implementations.fast(document, options, patch)
    assert got.token_ids == expected.token_ids
    assert got.text == expected.text
    assert got.last.reason == expected.last.reason
    assert (got.last.tokens, got.last.images) == (expected.last.tokens, expected.last.images)
    assert len(got.pictures) == len(expected.pictures) == got.last.images
    for ours, theirs in zip(got.pictures, expected.pictures, strict=True):
        assert np.abs(ours.astype(int) - theirs).max() <= 1
        assert theirs.std() > 5  # no blank picture that anything would match
    return got


@pytest.fixture(scope="module")
def small(exported: Exported) -> Implementations:
    """A small random model of either reading."""
    return Implementations.of(exported.model, exported.bundle)


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.parametrize("way", WAYS)
def test_a_bundle_writes_and_draws_what_the_model_does(
    small: Implementations, document: str, way: str
) -> None:
    got = assert_same(small, DOCUMENTS[document], WAYS[way])
    assert got.last.tokens + got.last.images > 0


def test_so_it_does_with_the_ancestral_sampler_whose_noise_is_drawn(small: Implementations) -> None:
    options = replace(WAYS["turns"], schedule="ddpm:3", guidance=1.7)
    assert assert_same(small, DOCUMENTS["an image"], options).last.images == 2


def test_so_it_does_up_to_the_end_of_its_context(small: Implementations) -> None:
    options = GenerationOptions(max_tokens=999, min_tokens=999, temperature=0.0)
    got = assert_same(small, DOCUMENTS["several images"], options)
    assert got.last.reason == "context"
    assert len(got.token_ids) == small.bundle.limits.context
