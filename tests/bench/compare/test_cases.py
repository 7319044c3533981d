"""The benchmark's documents have the lengths that they say, so that only what is meant differs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mmi_bench.compare.cases import DOCUMENT, TEXT, Case, one_token_word, picture, plan, text_after
from mmi_deploy.documents.document import encode_document
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.presets import tiny
from mmi_train.data.synthetic.vocabulary import build_tokenizer

CONFIG = tiny()
TOKENIZER = Tokenizer(build_tokenizer(), CONFIG.tokens)
CASES = {case.name: case for case in plan(CONFIG, CONFIG.llama.context, 7, quick=False).cases}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_document_has_the_tokens_and_images_of_its_case(case: Case) -> None:
    encoded = encode_document(case.document(TOKENIZER, CONFIG), TOKENIZER, CONFIG)
    assert len(encoded.token_ids) == case.context_tokens(CONFIG)
    assert len(encoded.images) == case.images
    ids = encoded.token_ids
    text = np.count_nonzero((ids != CONFIG.tokens.image) & (ids != CONFIG.tokens.boi)) - 1
    assert text == case.text_tokens


def test_the_documents_by_number_of_images_are_equally_long() -> None:
    lengths = {CASES[text_after(n)].context_tokens(CONFIG) for n in (0, 1, 2, 4, 8)}
    assert len(lengths) == 1
    assert {CASES[text_after(n)].tokens for n in (0, 1, 2, 4, 8)} == {32}


def test_with_and_without_drawing_differ_in_the_drawing_alone() -> None:
    drawn, written = CASES[DOCUMENT], CASES[TEXT]
    assert (drawn.images, drawn.turns) == (4, 3)
    assert drawn.context_tokens(CONFIG) == written.context_tokens(CONFIG)
    ours, theirs = drawn.options("ddim:20"), written.options("ddim:20")
    assert ours.max_tokens == theirs.max_tokens == theirs.min_tokens
    assert ours.turn_tokens is not None and ours.turn_tokens * 3 == ours.max_tokens
    assert (ours.max_images, theirs.max_images) == (3, 0)
    assert ours.guidance is None  # the model's own


def test_a_bundle_with_too_little_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="--context"):
        plan(CONFIG, 150, 7, quick=False)


def test_fillers_are_words_that_the_tokenizer_knows_as_one_token() -> None:
    word = one_token_word(TOKENIZER)
    assert len(set(TOKENIZER.encode(f"{word} {word} {word}"))) == 1


@pytest.mark.parametrize("side", [64, 30])
def test_pictures_have_the_side_asked_for_and_differ(side: int) -> None:
    assert picture(0, side).shape == (side, side, 3)
    assert not np.array_equal(picture(0, side), picture(1, side))


def test_a_plan_of_one_turn_draws_one_picture() -> None:
    """For models whose picture takes PyTorch minutes; tokens are measured as for the others."""
    one = plan(CONFIG, CONFIG.llama.context, 7, quick=False, one_turn=True)
    assert one.drawing == replace(CASES[DOCUMENT], turns=1)
    assert [case.tokens for case in one.cases] == [16, 16, 32, 32, 32]
    assert [case.images for case in one.cases] == [4, 4, 0, 4, 8]
    assert one.cases[3].context_tokens(CONFIG) == CASES[text_after(4)].context_tokens(CONFIG)


def test_a_quick_plan_asks_for_less() -> None:
    quick = plan(CONFIG, CONFIG.llama.context, 2, quick=True).cases
    assert sum(replace(case).length(CONFIG) for case in quick) < sum(
        case.length(CONFIG) for case in CASES.values()
    )
