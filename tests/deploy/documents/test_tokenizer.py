"""Text comes out of a token stream complete, exact and as early as it can."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmi_deploy.documents.tokenizer import TextStream, Tokenizer
from mmi_deploy.errors import BundleError
from mmi_deploy.spec import presets

TOKENS = presets.tiny().tokens
SPECIALS = ["<pad>", "<s>", "</s>", "<|beginofimage|>", "<|image|>"]
SENTENCES = ["the red circle moves down.", "ünïcödé 図 and 🎨🎨 in one", "a  b", "don't, you?"]


def byte_level() -> tokenizers.Tokenizer:
    """Every byte has a token, so one character may take up to four."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["the red circle moves down. the red"], trainer)
    return inner


def metaspace() -> tokenizers.Tokenizer:
    """As LLaMA's: a word's first piece carries its space; unknown characters fall back to bytes."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz.,'?", "▁the", "▁red", "▁circle"]
    names = dict.fromkeys([*SPECIALS, "<unk>", *bytes_, *pieces])
    vocabulary = [(name, -1.0 if len(name) > 1 else -3.0) for name in names]
    inner = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=5, byte_fallback=True))
    inner.add_special_tokens(SPECIALS)
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return inner


@pytest.fixture(params=[byte_level, metaspace], ids=["byte_level", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(request.param(), TOKENS)


@pytest.mark.parametrize("text", SENTENCES)
def test_a_stream_gives_the_whole_text_and_never_half_a_character(
    tokenizer: Tokenizer, text: str
) -> None:
    stream = TextStream(tokenizer)
    pieces = [stream.feed(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text)) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.rest() == ""


def test_a_stream_does_not_wait_longer_than_it_must(tokenizer: Tokenizer) -> None:
    """All characters are one byte here: every token's text comes at once."""
    stream = TextStream(tokenizer)
    given = ""
    ids = tokenizer.encode("the red circle moves down.")
    for count, token in enumerate(ids, start=1):
        given += stream.feed(token)
        assert given == tokenizer.decode(ids[:count])


@pytest.mark.parametrize("split", range(1, 8))
def test_a_stream_goes_on_from_the_text_before_it(tokenizer: Tokenizer, split: int) -> None:
    ids = tokenizer.encode("the red circle moves down.")
    stream = TextStream(tokenizer, ids[:split])
    given = "".join(stream.feed(token) for token in ids[split:])
    assert tokenizer.decode(ids[:split]) + given == "the red circle moves down."


def test_the_rest_shows_an_incomplete_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🎨")
    stream = TextStream(tokenizer)
    assert "".join(stream.feed(token) for token in ids[:-1]).strip() == "a"
    assert "\ufffd" in stream.rest()
    assert stream.rest() == ""


def test_decoding_leaves_special_tokens_out(tokenizer: Tokenizer) -> None:
    ids = [TOKENS.bos, *tokenizer.encode("the red"), TOKENS.eos]
    assert tokenizer.decode(ids) == "the red"


def test_a_file_is_read_and_a_damaged_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    byte_level().save(str(path))
    assert Tokenizer.open(path, TOKENS).decode(Tokenizer.open(path, TOKENS).encode("the red")) == (
        "the red"
    )
    path.write_text(path.read_text()[:100])
    with pytest.raises(BundleError, match="cannot read the tokenizer"):
        Tokenizer.open(path, TOKENS)
    with pytest.raises(BundleError, match="cannot read the tokenizer"):
        Tokenizer.open(tmp_path / "missing.json", TOKENS)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(BundleError, match="lacks special tokens"):
        Tokenizer(tokenizers.Tokenizer(models.BPE({"a": 0}, [])), TOKENS)
