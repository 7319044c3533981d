"""The tokenizer: fixed special ids, one token a word, and an exact round trip."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer

from mmi_train.data.synthetic.tasks import MAKERS, TaskText
from mmi_train.data.synthetic.vocabulary import (
    BEGIN,
    BEGIN_OF_IMAGE,
    END,
    IMAGE,
    PAD,
    UNKNOWN,
    build_tokenizer,
)
from mmi_train.data.synthetic.world import WorldConfig, easy, hard, medium

SETTINGS = [easy(), medium(), hard()]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer()


def test_special_tokens_have_their_fixed_ids(tokenizer: Tokenizer) -> None:
    names = ["<pad>", "<s>", "</s>", "<|beginofimage|>", "<|image|>", "<unk>"]
    assert [tokenizer.token_to_id(name) for name in names] == [0, 1, 2, 3, 4, 5]
    assert [PAD, BEGIN, END, BEGIN_OF_IMAGE, IMAGE, UNKNOWN] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("config", SETTINGS, ids=lambda config: config.name)
def test_every_text_of_every_task_survives_the_round_trip(
    tokenizer: Tokenizer, config: WorldConfig
) -> None:
    rng = np.random.default_rng(15)
    for maker in MAKERS.values():
        for _ in range(40):
            for part in maker(rng, config, "train").parts:
                if isinstance(part, TaskText):
                    ids = tokenizer.encode(part.text).ids
                    assert UNKNOWN not in ids, part.text
                    assert tokenizer.decode(ids) == part.text


def test_one_token_a_word_mark_and_box_edge(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("Find the RED cross.").tokens == ["find", "the", "red", "cross", "."]
    assert tokenizer.encode("<1> <32>.").tokens == ["<1>", "<32>", "."]
    assert tokenizer.encode("caption: 3").tokens == ["caption", ":", "3"]


def test_unknown_words_are_marked_and_special_tokens_are_left_out_of_text(
    tokenizer: Tokenizer,
) -> None:
    assert tokenizer.encode("a red zebra").ids[-1] == UNKNOWN
    ids = tokenizer.encode("a red cross").ids
    assert BEGIN not in ids and END not in ids
    assert tokenizer.decode([BEGIN, *ids, END, PAD]) == "a red cross"
    assert tokenizer.encode("<s><|beginofimage|><|image|>").ids == [BEGIN, BEGIN_OF_IMAGE, IMAGE]


def test_the_vocabulary_is_the_same_every_time(tokenizer: Tokenizer) -> None:
    assert build_tokenizer().to_str() == tokenizer.to_str()
    assert Tokenizer.from_str(tokenizer.to_str()).get_vocab() == tokenizer.get_vocab()
