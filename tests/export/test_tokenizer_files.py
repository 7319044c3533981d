"""transformers loads a bundle's tokenizer, with the ids of our own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deploy.documents.test_tokenizer import LETTERS, TOKENS, byte_level, llama, metaspace
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import DocumentError
from mmi_deploy.spec.presets import tiny
from mmi_export.placeholder_model import _tokenizer as numbered
from mmi_export.tokenizer_files import TOKENIZER_CONFIG, write_tokenizer
from mmi_train.data.synthetic.vocabulary import build_tokenizer, words


def placeholder() -> tokenizers.Tokenizer:
    return numbered(tiny())


def with_bos() -> tokenizers.Tokenizer:
    """A tokenizer that adds `<s>` already."""
    inner = byte_level()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", TOKENS.bos)]
    )
    return inner


def texts(count: int) -> list[str]:
    """Random texts: known words, letters of many scripts, spellings of special tokens, spaces."""
    random = Random(0)
    pieces = [*words(), *LETTERS, "<s>", "</s>", "<pad>", "<|image|>", "<|beginofimage|>"]
    pieces += ["w7", " ", "  ", "\n", "\t", "\u00a0", "\u200b", "'s", "e\u0301", "ß", "İ", "12"]
    made = ["", " ", "\n\n", "<s>", " <s> ", "<s></s>", "a<s>b", "<|image|>" * 3, "\ufeff"]
    while len(made) < count:
        joint = random.choice(("", " ", " "))
        made.append(joint.join(random.choices(pieces, k=random.randrange(1, 12))))
    return made


MAKERS = [build_tokenizer, byte_level, metaspace, llama, placeholder, with_bos]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_transformers_gives_the_same_ids(
    make: Callable[[], tokenizers.Tokenizer], tmp_path: Path
) -> None:
    inner = make()
    inner.enable_truncation(3)  # as fine-tuning leaves it
    inner.enable_padding(length=9)
    inner.save(str(tmp_path / "model.json"))
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    write_tokenizer(tmp_path / "model.json", bundle / "tokenizer.json", TOKENS, 77)
    theirs = AutoTokenizer.from_pretrained(bundle)
    assert isinstance(theirs, PreTrainedTokenizerFast) and theirs.model_max_length == 77
    before = Tokenizer.open(tmp_path / "model.json", TOKENS)
    ours = Tokenizer.open(bundle / "tokenizer.json", TOKENS)
    same = 0
    for text in texts(1000):
        # Also of a text that ours refuses, as it holds words that the model does not know.
        wanted = before._inner.encode(text, add_special_tokens=False).ids
        plain = theirs(text, add_special_tokens=False)["input_ids"]
        assert plain == wanted == ours._inner.encode(text, add_special_tokens=False).ids, text
        assert theirs(text)["input_ids"] == [TOKENS.bos, *wanted], text
        assert theirs.decode(wanted, skip_special_tokens=True) == ours.decode(wanted), text
        try:
            assert ours.encode(text) == wanted
            same += 1
        except DocumentError:
            continue
    assert same > 5


def test_the_files_of_a_tokenizer_run_no_code(tmp_path: Path) -> None:
    build_tokenizer().save(str(tmp_path / "model.json"))
    write_tokenizer(tmp_path / "model.json", tmp_path / "tokenizer.json", TOKENS, 512)
    about = json.loads((tmp_path / TOKENIZER_CONFIG).read_text())
    assert about["tokenizer_class"] == "PreTrainedTokenizerFast" and "auto_map" not in about
    assert (about["bos_token"], about["eos_token"], about["pad_token"]) == ("<s>", "</s>", "<pad>")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    special = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert special == (TOKENS.bos, TOKENS.eos, TOKENS.pad)
