"""The slow path: it does what the published code does over and over, and nothing more.

Its results are held by tests/test_parity.py, and the model underneath by the golden tests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from export.small_models import random_model, released_reading
from mmi_deploy.documents.document import Document, Draw, Image, Text, document_of
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import DocumentError
from mmi_deploy.runtime.events import Event, Finished, ImageDone, ImageStarted, TextDelta
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.graphs import Limits
from mmi_deploy.spec.presets import tiny
from mmi_train.baseline.generation import generate
from mmi_train.baseline.published_mmfs import PublishedMmfs, as_published
from mmi_train.data.synthetic.vocabulary import build_tokenizer
from mmi_train.model.diffusion import ddim
from mmi_train.model.generation import generate_texts
from mmi_train.model.mm_interleaved import MMInterleaved

CONFIG = tiny()
TOKENIZER = Tokenizer(build_tokenizer(), CONFIG.tokens)
STEPS = 3
Generate = Callable[..., Iterator[Event]]


@pytest.fixture(scope="module")
def model() -> MMInterleaved:
    torch.set_num_threads(1)
    return random_model(CONFIG)


@pytest.fixture
def run(model: MMInterleaved) -> Generate:
    def run(document: Document, options: GenerationOptions, **more: Any) -> Iterator[Event]:
        scheduler = ddim(CONFIG.image_decoder.diffusion)
        scheduler.set_timesteps(STEPS)
        return generate(model, TOKENIZER, document, options, scheduler, **more)

    return run


def image(seed: int) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8))


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


STORY = document_of(Text("a red circle"), image(0), Text("a blue square"), image(1))
TURNS = GenerationOptions(turn_tokens=3, max_images=2, max_tokens=6, temperature=0.0)


def test_every_turn_and_every_token_starts_anew(
    model: MMInterleaved, run: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the published loop: images and prefix per turn, MMFS values per token and step.

    What the runtime does instead: docs/architecture.md, "The life of a request".
    """
    counts: Counter[str] = Counter()
    encoded: list[int] = []
    read: list[int] = []

    def spy(owner: Any, name: str, note: Callable[..., None]) -> None:
        inner = getattr(owner, name)

        def noted(*arguments: Any, **named: Any) -> Any:
            note(*arguments)
            return inner(*arguments, **named)

        monkeypatch.setattr(owner, name, noted)

    spy(model, "encode_images", lambda pixels: encoded.append(len(pixels)))
    spy(model.llm, "image_values", lambda _: counts.update(["llm values"]))
    spy(model.llm, "forward", lambda x, *_: read.append(x.shape[1]))
    spy(model.image_decoder.unet, "image_values", lambda f: counts.update({"unet values": len(f)}))
    list(run(STORY, TURNS))
    taken = 1 + CONFIG.visual_tokens
    start = 1 + 3 + taken + 3 + taken
    # Text, picture, text, picture; a turn of three tokens is a prefill and two single tokens.
    assert encoded == [2, 2, 3, 3]
    second = start + 3 + taken
    assert read == [start, 1, 1, start + 4, second, 1, 1, second + 4]
    assert counts["llm values"] == len(read)
    assert counts["unet values"] == STEPS * (2 * 2 + 2 * 3)  # both branches, two images then three


def test_without_a_cache_the_whole_row_is_read_for_each_token_and_says_the_same(
    run: Generate,
) -> None:
    cached, anew = list(run(STORY, TURNS)), list(run(STORY, TURNS, kv_cache=False))
    assert text_of(cached) == text_of(anew) != ""
    for ours, theirs in zip(cached, anew, strict=True):
        assert type(ours) is type(theirs)
        if isinstance(ours, ImageDone):
            assert np.abs(ours.rgb.astype(int) - theirs.rgb).max() <= 1
    timings = anew[-1].timings  # type: ignore[union-attr]
    assert not timings.seconds("decode") and len(timings.seconds("prefill")) == 8


def test_a_picture_of_the_document_is_drawn_in_its_place(run: Generate) -> None:
    document = document_of(Text("a red circle"), Draw(), Text("a blue square"), image(1))
    events = list(run(document, GenerationOptions(max_tokens=0)))
    assert [type(event) for event in events[:1]] == [ImageStarted]
    drawn = [event for event in events if isinstance(event, ImageDone)]
    assert [event.index for event in drawn] == [0]
    assert drawn[0].rgb.shape == (64, 64, 3)
    assert drawn[0].rgb.std() > 0
    last = events[-1]
    assert isinstance(last, Finished)
    assert (last.reason, last.tokens, last.images) == ("max_tokens", 0, 1)


def test_the_noise_of_the_ancestral_sampler_follows_the_seed(run: Generate) -> None:
    document = document_of(Text("a red circle"), Draw())
    pictures = []
    for seed, eta in ((1, 0.0), (1, 1.0), (1, 1.0), (2, 1.0)):
        options = GenerationOptions(max_tokens=0, seed=seed)
        events = run(document, options, eta=eta)
        pictures += [event.rgb for event in events if isinstance(event, ImageDone)]
    plain, noisy, again, other = pictures
    assert np.array_equal(noisy, again)
    assert not np.array_equal(plain, noisy) and not np.array_equal(noisy, other)


@pytest.mark.parametrize(
    ("limits", "reason", "tokens"),
    [(Limits(context=43), "context", 2), (Limits(context=512, images=2), "max_images", 3)],
    ids=["context", "images"],
)
def test_the_limits_of_a_bundle_end_it(
    run: Generate, limits: Limits, reason: str, tokens: int
) -> None:
    last = list(run(STORY, TURNS, limits=limits))[-1]
    assert isinstance(last, Finished)
    assert (last.reason, last.tokens) == (reason, tokens)


def test_more_images_than_a_bundle_takes_are_refused(run: Generate) -> None:
    """As the runtime does, with which it is compared."""
    with pytest.raises(DocumentError, match="too many pictures .* at most 1; got 2"):
        list(run(STORY, TURNS, limits=Limits(context=512, images=1)))


@pytest.mark.parametrize("config", [tiny(), released_reading()], ids=lambda config: config.name)
@pytest.mark.parametrize("place", ["llm", "unet"])
def test_mmfs_in_the_published_order_gives_the_same(config: ModelConfig, place: str) -> None:
    """Both readings, images in any order of the pool, queries that see some, all or none. Errors
    of 3e-6 were seen at values up to 3: the projections are summed in another order."""
    torch.manual_seed(1)
    model = random_model(config)
    own = (
        model.llm.mmfs_layers[0].mmfs
        if place == "llm"
        else model.image_decoder.unet.look_back[-1].mmfs
    )
    reference = (
        torch.full((1, 2), 0.5)
        if place == "llm"
        else model.image_decoder.unet.look_back[-1].reference
    )
    queries = max(len(reference), 7)
    cells = sum(side * side for side in own.level_sides)
    query = torch.randn(2, queries, own.query_proj.in_features)
    value = torch.randn(5, cells, own.config.heads, own.config.head_width)
    slot = torch.tensor([[0, 3, 1], [4, 2, 0]])
    position = torch.randint(0, 4, (2, queries, 3))
    position[0, 0], position[1, -1] = 0, torch.tensor([3, 2, 1])
    arguments = query, value, slot, position, reference
    with torch.no_grad():
        expected, got = own(*arguments), PublishedMmfs(own)(*arguments)
    assert torch.allclose(got, expected, atol=2e-5, rtol=0)
    assert expected.std() > 0.1


def test_a_model_as_published_says_and_draws_the_same(
    model: MMInterleaved, run: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(run(STORY, TURNS))
    changed = (*model.llm.mmfs_layers, *model.image_decoder.unet.look_back)
    for look_back in changed:
        monkeypatch.setitem(look_back._modules, "mmfs", look_back.mmfs)  # put back afterwards
    as_published(as_published(model))
    assert all(isinstance(look_back.mmfs, PublishedMmfs) for look_back in changed)
    got = list(run(STORY, TURNS))
    assert text_of(got) == text_of(expected)
    for ours, theirs in zip(got, expected, strict=True):
        if isinstance(ours, ImageDone):
            assert np.abs(ours.rgb.astype(int) - theirs.rgb).max() <= 1


class _Wants:
    """Stands in for a head: logits that want `choices`, one at each call, the last for ever."""

    def __init__(self, *choices: int) -> None:
        self.choices = list(choices)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        wanted = self.choices.pop(0) if len(self.choices) > 1 else self.choices[0]
        logits = -torch.arange(CONFIG.llama.vocab, dtype=torch.float32)
        logits[wanted] = 10
        return logits.expand(*hidden.shape[:-1], -1)


@pytest.mark.parametrize("end", [CONFIG.tokens.eos, 40, CONFIG.tokens.bos])
def test_every_end_token_ends_a_text(
    model: MMInterleaved, run: Generate, monkeypatch: pytest.MonkeyPatch, end: int
) -> None:
    """As the runtime does; LLaMA-3 instruct has three."""
    tokens = replace(CONFIG.tokens, other_eos=(40, CONFIG.tokens.bos))
    monkeypatch.setattr(model, "config", replace(CONFIG, tokens=tokens))

    def ended(*choices: int, **options: Any) -> tuple[str, int]:
        monkeypatch.setitem(model._modules, "head", _Wants(*choices))
        chosen = GenerationOptions(temperature=0.0, max_tokens=5, **options)
        last = list(run(document_of(Text("a red circle")), chosen))[-1]
        assert isinstance(last, Finished)
        return last.reason, last.tokens

    assert ended(50, end, 51) == ("end", 1)
    assert ended(end, min_tokens=2) == ("end", 2)
    monkeypatch.setitem(model._modules, "head", _Wants(50, end, 51))
    prompt = torch.tensor([[tokens.bos, 60, 61]])
    slot = torch.full((1, 1), -1)
    texts = generate_texts(model, prompt, None, slot, torch.ones_like(prompt), max_new_tokens=4)
    assert texts.tolist() == [[tokens.bos, 50, end]]
