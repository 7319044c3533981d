"""Text comes out of a token stream complete, exact and as early as it can."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmi_deploy.documents.tokenizer import TextStream, Tokenizer, read_tokenizer_file
from mmi_deploy.errors import BundleError, DocumentError
from mmi_deploy.spec import presets
from mmi_train.checkpoint_import.sentencepiece_model import read_sentencepiece
from mmi_train.checkpoint_import.tokenizer_files import read_tokenizer
from mmi_train.data.synthetic.vocabulary import build_tokenizer

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


def llama() -> tokenizers.Tokenizer:
    """A LLaMA's tokenizer.model: byte pairs that fall back to bytes."""
    return read_sentencepiece(Path(__file__).parents[2] / "oracles/sentencepiece.model")


@pytest.fixture(params=[byte_level, metaspace, llama, build_tokenizer], ids=lambda f: f.__name__)
def any_tokenizer(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    inner: tokenizers.Tokenizer = request.param()
    inner.add_special_tokens(["<|reserved|>"])
    inner.add_tokens(["<added>"])
    return inner


LETTERS = "日本語です 図🎨🎨 ünï  a the red. \n\t\ufffd<>é️한 "


def streamed(stream: TextStream, ids: list[int]) -> str:
    return "".join(stream.feed(token) for token in ids) + stream.rest()


def test_a_stream_gives_what_decoding_all_at_once_gives(
    any_tokenizer: tokenizers.Tokenizer,
) -> None:
    """Tokens at random, as a model may write them: half characters, broken runs of bytes, special
    tokens, and ids that have no word."""
    ours, random = Tokenizer(any_tokenizer, TOKENS), Random(1)
    vocabulary = any_tokenizer.get_vocab()
    bytes_ = [vocabulary.get(f"<0x{value:02X}>", 5) for value in (0xE6, 0x97, 0xA5, 0x41, 0xF0)]
    silent = [vocabulary["<|reserved|>"], max(vocabulary.values()) + 7]
    for _ in range(1500):
        kinds = (bytes_, silent, range(5, len(vocabulary)), ours_or_none(ours, random))
        ids = [random.choice(random.choice(kinds)) for _ in range(random.randrange(1, 12))]
        stream, given = TextStream(ours), ""
        whole = any_tokenizer.decode(ids)
        for token in ids:
            given += stream.feed(token)
            assert whole.startswith(given)
        assert given + stream.rest() == whole


def ours_or_none(tokenizer: Tokenizer, random: Random) -> list[int]:
    """The tokens of a text, or one token where there is no text that the tokenizer knows."""
    try:
        return tokenizer.encode("".join(random.choices(LETTERS, k=3))) or [5]
    except DocumentError:
        return [5]


def test_a_text_goes_on_after_any_text(any_tokenizer: tokenizers.Tokenizer) -> None:
    """The text before ends with whole characters, as a document's does."""
    ours, random, tried = Tokenizer(any_tokenizer, TOKENS), Random(2), 0
    for _ in range(3000):
        text = "".join(random.choices(LETTERS + "the red circle", k=random.randrange(1, 16)))
        try:
            ids = ours.encode(text)
        except DocumentError:
            continue
        split = random.randrange(len(ids) + 1)
        before, whole = any_tokenizer.decode(ids[:split]), any_tokenizer.decode(ids)
        if not whole.startswith(before):
            continue  # the split is inside a character
        tried += 1
        assert before + streamed(TextStream(ours, ids[:split]), ids[split:]) == whole
    assert tried > 50


@pytest.mark.parametrize("length", range(1, 30))
def test_byte_fallback_characters_go_on_as_they_are(length: int) -> None:
    tokenizer = Tokenizer(llama(), TOKENS)
    before = tokenizer.encode("語" * length)
    after = tokenizer.encode("語" * length + "です。")[len(before) :]
    assert streamed(TextStream(tokenizer, before), after) == "です。"


def test_a_character_that_the_text_before_breaks_off_is_completed() -> None:
    tokenizer = Tokenizer(llama(), TOKENS)
    ids = tokenizer.encode("a日b")
    cut = next(index for index, token in enumerate(ids) if tokenizer.is_byte(token)) + 1
    assert streamed(TextStream(tokenizer, ids[:cut]), ids[cut:]) == "日b"


def left_by_training() -> tokenizers.Tokenizer:
    """A tokenizer.json after fine-tuning: short rows, padded, and byte pairs dropped at random."""
    inner = byte_level()
    inner.enable_truncation(4)
    inner.enable_padding(length=12, pad_id=0, pad_token="<pad>")
    inner.model.dropout = 0.9
    return inner


@pytest.mark.parametrize("text", ["the red circle moves down.", "the"])
def test_what_training_leaves_in_a_tokenizer_changes_no_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokenizer.json"
    left_by_training().save(str(path))
    expected = byte_level().encode(text, add_special_tokens=False).ids
    assert Tokenizer.open(path, TOKENS).encode(text) == expected
    assert Tokenizer(left_by_training(), TOKENS).encode(text) == expected
    for read in (read_tokenizer_file, read_tokenizer):
        inner = read(path)
        assert inner.encode(text, add_special_tokens=False).ids == expected
        written = json.loads(inner.to_str())
        assert written["truncation"] is written["padding"] is written["model"]["dropout"] is None


def test_tokenizers_are_opened_in_one_way() -> None:
    """`exact` is where a tokenizer.json becomes a tokenizer."""
    root = Path(__file__).parents[2]
    found = [
        f"{path.name}: {line.strip()}"
        for folder in ("mmi_deploy", "export", "train", "bench", "plugins")
        for path in (root / folder).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"Tokenizer\.from_(file|str|buffer)\(", line) and "exact(" not in line
    ]
    assert found == ["init_model.py: " + COPY]


COPY = "llm, tokenizer = parts.llm, Tokenizer.from_str(parts.llm.tokenizer.to_str())"
