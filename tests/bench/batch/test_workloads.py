"""Workloads of the batch benchmark: documents of the lengths that they say."""

from __future__ import annotations

import pytest

from mmi_bench.batch.workloads import DOCUMENTS, PICTURES, TEXT, WORKLOADS, Item, workload
from mmi_deploy.documents.document import encode_document
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.presets import tiny
from mmi_train.data.synthetic.vocabulary import build_tokenizer

CONFIG = tiny()
TOKENIZER = Tokenizer(build_tokenizer(), CONFIG.tokens)
SCHEDULES = ("unipc:20", "ddim:20", "ddpm:20")


def items(name: str, count: int = 8, context: int = CONFIG.llama.context) -> list[Item]:
    return workload(name, count, CONFIG, context, TOKENIZER, SCHEDULES)


def content(item: Item) -> tuple:
    """All that the document's output depends on."""
    encoded = encode_document(item.document, TOKENIZER, CONFIG)
    images = tuple(image.rgb.tobytes() for image in item.document.images)
    return tuple(encoded.token_ids.tolist()), images, item.options


@pytest.mark.parametrize("name", WORKLOADS)
def test_documents_are_unlike_each_other_and_the_same_every_time(name: str) -> None:
    chosen = [content(item) for item in items(name)]
    assert chosen == [content(item) for item in items(name)]
    # A row of the table adds documents to those of the last.
    assert [content(item) for item in items(name, 3)] == chosen[:3]
    assert len({*chosen}) == 8


def test_a_text_has_an_image_and_draws_nothing() -> None:
    for item in items(TEXT):
        assert len(item.document.images) == 1
        assert item.options.max_images == 0
        assert item.options.min_tokens == item.options.max_tokens == 128


def test_pictures_are_drawn_without_a_token_of_text() -> None:
    for item in items(PICTURES):
        assert item.options.draw_first and item.options.turn_tokens == 0
        assert (item.options.max_tokens, item.options.max_images) == (0, 1)


def test_whole_documents_differ_in_length_images_samplers_and_guidance() -> None:
    chosen = items(DOCUMENTS)
    encoded = [encode_document(item.document, TOKENIZER, CONFIG) for item in chosen]
    assert len({len(one.token_ids) for one in encoded}) == 8
    assert {len(one.images) for one in encoded} == {0, 1, 2, 3, 4}
    assert {item.options.schedule for item in chosen} == {*SCHEDULES}
    assert len({item.options.guidance for item in chosen}) == 4
    assert not any(item.options.draw_first for item in chosen)  # the first event is a token


def test_unknown_workloads_and_small_bundles_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown workload 'video'; expected text, pictures"):
        items("video")
    with pytest.raises(ConfigError, match="--context"):
        items(DOCUMENTS, context=128)
