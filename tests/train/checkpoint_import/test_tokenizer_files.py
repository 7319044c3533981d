"""Tokenizers of language models: cut as their own library cuts, known by the runtime."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmi_deploy.documents.tokenizer import TextStream, Tokenizer
from mmi_deploy.errors import WeightsError
from mmi_deploy.spec.config import TokenConfig
from mmi_train.checkpoint_import.sentencepiece_model import (
    Kind,
    Normaliser,
    Piece,
    byte_pair_tokenizer,
)
from mmi_train.checkpoint_import.tokenizer_files import add_marks, read_tokenizer
from train import small_parts as parts

HARD = "  two  spaces\tand \U0001f408\u200d\u2b1b caf\u00e9s \u65e5\u672c\u8a9e\n\nthe end"


@pytest.fixture(scope="module")
def references(repository: Path) -> Path:
    return repository / "tests/oracles"


def test_ids_are_those_of_the_sentencepiece_library(references):
    """Recorded from sentencepiece 0.2: a model like LLaMA's (byte pairs, byte fallback, a space in
    front, nothing normalised), and what its library made of hard texts."""
    tokenizer = read_tokenizer(references / "sentencepiece.model")
    tokenizer.encode_special_tokens = True  # as the runtime reads
    recorded = json.loads((references / "sentencepiece.json").read_text(encoding="utf-8"))
    assert len(recorded) == 8
    for text, ids in recorded.items():
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_best_scored_union_is_joined_first():
    texts = ["<unk>", "a", "b", "c", "ab", "bc"]
    scores = [0.0, -9.0, -9.0, -9.0, -2.0, -1.0]
    pieces = [
        Piece(t, s, Kind.UNKNOWN if i == 0 else Kind.NORMAL)
        for i, (t, s) in enumerate(zip(texts, scores, strict=True))
    ]
    tokenizer = byte_pair_tokenizer(pieces, Normaliser(add_space=False))
    assert tokenizer.encode("abc").tokens == ["a", "bc"]


@pytest.mark.parametrize("cut", [1, 100, 3000, -1])
def test_a_cut_sentencepiece_model_is_refused_or_shorter_by_whole_pieces(references, tmp_path, cut):
    data = (references / "sentencepiece.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(data[:cut])
    with pytest.raises(WeightsError, match="is no SentencePiece model|is no byte-pair model"):
        read_tokenizer(tmp_path)


def runtime_tokenizer(name: str, references: Path, tmp_path: Path) -> Tokenizer:
    source = references / "sentencepiece.model"
    if name == "bytes":
        source = tmp_path / "tokenizer.json"
        parts.byte_tokenizer().save(str(source))
    inner = read_tokenizer(source)
    boi, image = add_marks(inner, ("<|beginofimage|>", "<|image|>"))
    inner.save(str(tmp_path / "extended.json"))
    tokens = TokenConfig(bos=1, eos=2, pad=0, boi=boi, image=image)
    return Tokenizer.open(tmp_path / "extended.json", tokens)


@pytest.mark.parametrize("name", ["bytes", "sentencepiece"])
def test_text_streams_token_by_token_without_half_characters(name, references, tmp_path):
    """A cat of three code points takes ten bytes, each of them a token."""
    tokenizer = runtime_tokenizer(name, references, tmp_path)
    ids = tokenizer.encode(HARD)
    assert tokenizer.decode(ids) == HARD
    stream = TextStream(tokenizer)
    given = [stream.feed(token) for token in ids]
    assert "".join(given) + stream.rest() == HARD
    assert not any("\ufffd" in text for text in given)
    half = len(ids) // 2
    later = TextStream(tokenizer, ids[:half])
    rest = "".join(later.feed(token) for token in ids[half:]) + later.rest()
    assert HARD.endswith(rest.lstrip("\ufffd")) and len(rest) > 5


@pytest.mark.parametrize("name", ["bytes", "sentencepiece"])
def test_marks_in_a_text_are_letters(name, references, tmp_path):
    tokenizer = runtime_tokenizer(name, references, tmp_path)
    text = "a <|image|> <|beginofimage|> </s> <|im_end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not tokenizer._reserved & set(ids)
