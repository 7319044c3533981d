"""Byte-level tokenizers of GGUF files: words, ids, streams, and the ids that a model needs."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import tokenizers
from transformers import Qwen2Tokenizer

from mmi_deploy.documents.tokenizer import TextStream, Tokenizer
from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import TokenConfig
from mmi_train.checkpoint_import.from_llama import read_llama
from mmi_train.checkpoint_import.gguf_tokenizer import gguf_tokenizer
from mmi_train.checkpoint_import.new_model import extend_tokenizer
from mmi_train.checkpoint_import.parts import Parts
from train import small_parts as parts
from train.checkpoint_import.test_language_models import KINDS, Fields, write_kind

KNOWN_WORDS = ("gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "tekken")

TEXT = (
    "The caf\u00e9's e\u0301cole, I'LL say 12345 don\u2019t\tHelloWorld iOS  \n\n x/y//\n "
    "\u56fe\u50cf\U0001f3a8\U0001f468\u200d\U0001f469 <|im_end|> the cat"
)


def in_gguf(words: str) -> tokenizers.Tokenizer:
    fields: dict[str, Any] = {
        "model": "gpt2",
        "pre": words,
        "tokens": parts.byte_tokens(),
        "token_type": [3] * len(parts.SPECIAL) + [1] * (parts.KNOWN - len(parts.SPECIAL)),
        "merges": [" ".join(pair) for pair in parts.MERGES],
    }
    return gguf_tokenizer(
        Path("x.gguf"), {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    )


def words_of(tokenizer: tokenizers.Tokenizer, text: str) -> list[str]:
    return [text[a:b] for _, (a, b) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("llama-bpe", ["It", "'s", " iPhoneX", " ", "123", "45", " €/\n", "<y", ">"]),
        ("smaug-bpe", ["It", "'s", " iPhoneX", " ", "123", "45", " €/\n", "<y", ">"]),
        ("qwen2", ["It", "'s", " iPhoneX", " ", *"12345", " €/\n", "<y", ">"]),
        ("tekken", ["It", "'s", " i", "Phone", "X", " ", *"12345", " €/\n", "<y", ">"]),
        ("smollm", ["It", "'s", " iPhoneX", " ", *"12345", " €/", "\n", "<", "y", ">"]),
    ],
)
def test_the_words_that_are_merged_apart(words: str, expected: list[str]) -> None:
    assert words_of(in_gguf(words), "It's iPhoneX 12345 €/\n<y>") == expected


def test_qwens_ids_are_transformers() -> None:
    """Composed accents too: its texts are normalised, which llama.cpp leaves out."""
    vocabulary = {token: index for index, token in enumerate(parts.byte_tokens())}
    theirs = Qwen2Tokenizer(vocab=vocabulary, merges=parts.MERGES)
    ours = in_gguf("qwen2")
    for text in (TEXT.replace("<|im_end|>", ""), "e\u0301", "12 the cat's"):
        wanted = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, add_special_tokens=False).ids == wanted
    assert ours.encode("e\u0301").ids == ours.encode("\u00e9").ids


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.feed(token) for token in ids), stream.rest()]


@pytest.mark.parametrize("words", KNOWN_WORDS)
def test_a_stream_holds_half_characters_back(words: str) -> None:
    """Every character beyond ASCII takes several tokens here, an emoji four; the mark of the end in
    a text is letters."""
    inner = in_gguf(words)
    tokens = TokenConfig(bos=1, eos=2, pad=0, boi=parts.KNOWN, image=parts.KNOWN + 1)
    inner.add_special_tokens(["<|beginofimage|>", "<|image|>"])
    tokenizer = Tokenizer(inner, tokens)
    ids = tokenizer.encode(TEXT)
    assert not {*ids} & {0, 1, 2}
    shown = pieces_of(tokenizer, ids)
    composed = TEXT.replace("e\u0301", "\u00e9") if words == "qwen2" else TEXT
    assert "".join(shown) == tokenizer.decode(ids) == composed
    assert not any("\ufffd" in piece for piece in shown)
    assert max(map(len, shown)) < 12 and shown[-1] == ""
    emoji = tokenizer.encode("\U0001f3a8")
    assert pieces_of(tokenizer, emoji[:2])[:-1] == ["", ""]
    assert pieces_of(tokenizer, emoji)[-2] == "\U0001f3a8"
    random = Random(len(words))
    for _ in range(30):  # whatever a model writes
        ids = random.choices(range(parts.KNOWN), k=25)
        assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("qwen3", {"bos_token_id": None}, "has no bos token"),
        ("qwen3", {"eos_token_id": None}, "has no eos token"),
        ("llama3", {"eos_token_id": [2, 128009]}, "has no eos token; got 128009"),
        # As Qwen's base models: both are <|endoftext|>.
        ("qwen2", {"bos_token_id": 0, "eos_token_id": 0}, "same token; got '<|endoftext|>'"),
    ],
)
def test_a_tokenizer_without_the_ids_that_a_model_needs(
    tmp_path: Path, kind: str, changes: Fields, said: str
) -> None:
    folder, _ = write_kind(tmp_path / "llm", KINDS[kind])
    parts.edit_json(folder / "config.json", **changes)
    (folder / "generation_config.json").unlink()
    with pytest.raises(ConfigError, match=said.replace("|", r"\|")) as refused:
        extend_tokenizer(Parts(read_llama(folder)))
    assert "--bos" in str(refused.value) or "--eos" in str(refused.value)
    tokens, _, _ = extend_tokenizer(Parts(read_llama(folder), bos="<|im_start|>", eos="<|im_end|>"))
    assert (tokens.bos, tokens.ends) == (1, (2,))


def test_an_instruct_model_ends_at_each_of_its_ends(tmp_path: Path) -> None:
    """Qwen2.5 instruct: <|im_end|> and <|endoftext|>, of which the latter also begins and pads."""
    folder, _ = write_kind(tmp_path / "llm", KINDS["qwen2"])
    parts.edit_json(folder / "config.json", bos_token_id=0, eos_token_id=2)
    parts.edit_json(
        folder / "generation_config.json", eos_token_id=[2, 0], bos_token_id=0, pad_token_id=0
    )
    tokens, _, _ = extend_tokenizer(Parts(read_llama(folder)))
    assert (tokens.bos, tokens.ends) == (0, (2, 0))
    assert tokens.pad == parts.KNOWN + 2  # one of its own
