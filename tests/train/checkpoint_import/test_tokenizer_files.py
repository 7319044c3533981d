"""Tokenizers of language models: cut as their own library cuts, known by the runtime."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mmi_deploy.cli.app import run
from mmi_deploy.documents.tokenizer import TextStream, Tokenizer
from mmi_deploy.errors import MmiError, WeightsError
from mmi_deploy.spec.config import TokenConfig
from mmi_train.checkpoint_import.sentencepiece_model import (
    Kind,
    Normaliser,
    Piece,
    byte_pair_tokenizer,
)
from mmi_train.checkpoint_import.tokenizer_files import add_special_tokens, read_tokenizer
from mmi_train.weights.model_folder import load_model
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
    with pytest.raises(WeightsError, match="is not a SentencePiece model|is not a byte-pair model"):
        read_tokenizer(tmp_path)


def runtime_tokenizer(name: str, references: Path, tmp_path: Path) -> Tokenizer:
    source = references / "sentencepiece.model"
    if name == "bytes":
        source = tmp_path / "tokenizer.json"
        parts.byte_tokenizer().save(str(source))
    inner = read_tokenizer(source)
    boi, image = add_special_tokens(inner, ("<|beginofimage|>", "<|image|>"))
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


SPECIAL_MARK, PLAIN_MARK = "<|im_end|>", "<|x y|>"
TALK = f"the cat{SPECIAL_MARK}sat {PLAIN_MARK} 42"


@pytest.fixture
def folder(references: Path, tmp_path: Path) -> Path:
    """A folder with a SentencePiece model of 420 pieces."""
    shutil.copy(references / "sentencepiece.model", tmp_path / "tokenizer.model")
    return tmp_path


def write(path: Path, fields: object) -> None:
    path.write_text(json.dumps(fields))


def test_tokens_that_were_added_to_a_sentencepiece_model_are_read(folder):
    """As transformers wrote them until 2023; which are special stands in another file. The ids are
    those that transformers 5 gives with the sentencepiece package (recorded)."""
    plain = read_tokenizer(folder).get_vocab_size()
    write(folder / "added_tokens.json", {PLAIN_MARK: 421, SPECIAL_MARK: 420, "<s>": 1})
    write(folder / "special_tokens_map.json", {"eos_token": {"content": SPECIAL_MARK}})
    tokenizer = read_tokenizer(folder)
    assert plain == 420 and tokenizer.get_vocab_size() == 422
    assert tokenizer.encode(f"a{SPECIAL_MARK}b {PLAIN_MARK}", add_special_tokens=False).ids == [
        *(262, 420, 297, 349, 421)
    ]
    assert read_tokenizer(folder / "tokenizer.model").get_vocab_size() == 422
    tokenizer.encode_special_tokens = True  # as the runtime reads: a control token is letters
    ids = tokenizer.encode(TALK, add_special_tokens=False).ids
    assert 420 not in ids and 421 in ids


def test_tokens_in_tokenizer_config_are_read_as_transformers_reads_them(folder):
    (folder / "tokenizer.model").unlink()
    inner = parts.byte_tokenizer()
    inner.save(str(folder / "tokenizer.json"))
    added = {
        "1": {"content": "<|im_start|>", "special": True},
        str(parts.KNOWN): {"content": PLAIN_MARK, "lstrip": True, "special": False},
        str(parts.KNOWN + 1): {"content": "<|tool|>", "special": True},
    }
    about = {"added_tokens_decoder": added, "tokenizer_class": "PreTrainedTokenizerFast"}
    write(folder / "tokenizer_config.json", about)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = read_tokenizer(folder)
    text = f"{TALK} <|tool|>cat"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == theirs(text, add_special_tokens=False).input_ids
    assert {parts.KNOWN, parts.KNOWN + 1} <= {*ids}
    found = tokenizer.get_added_tokens_decoder()
    assert found[parts.KNOWN + 1].special and not found[parts.KNOWN].special


@pytest.mark.parametrize(
    ("file", "fields", "said"),
    [
        ("added_tokens.json", {SPECIAL_MARK: 421}, "an id that it cannot have; expected id 420"),
        ("added_tokens.json", {SPECIAL_MARK: 300}, "an id that it cannot have; expected id 420"),
        ("added_tokens.json", {"<s>": 420}, "an id that it cannot have; expected id 1; got 420"),
        ("added_tokens.json", {SPECIAL_MARK: "420"}, "cannot be built on"),
        ("added_tokens.json", [SPECIAL_MARK], "is not a JSON object"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"421": {"content": SPECIAL_MARK}}},
            "expected id 420; got 421",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"420": {}}}, "cannot be built on"),
    ],
)
def test_added_tokens_that_do_not_fit_are_refused(folder, file, fields, said):
    write(folder / file, fields)
    with pytest.raises(MmiError, match=said) as caught:
        read_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_added_tokens_that_contradict_each_other_are_refused(folder):
    write(folder / "added_tokens.json", {SPECIAL_MARK: 420})
    write(folder / "tokenizer_config.json", {"added_tokens_decoder": {"420": {"content": "<|x|>"}}})
    with pytest.raises(MmiError, match="contradict each other; expected one token of id 420"):
        read_tokenizer(folder)


def test_a_model_keeps_the_trained_rows_of_added_tokens(folder):
    """Hugging Face's layout before 2023: 420 pieces, 2 added tokens, 422 trained rows."""
    (folder / "llama").mkdir()
    llama = parts.llama(vocab_size=422, bos_token_id=1, eos_token_id=[2, 420])
    parts.write_llama(folder / "llama", llama)
    (folder / "llama" / "tokenizer.json").unlink()
    (folder / "tokenizer.model").rename(folder / "llama" / "tokenizer.model")
    write(folder / "llama" / "added_tokens.json", {SPECIAL_MARK: 420, PLAIN_MARK: 421})
    assert run(["init", "-o", str(folder / "out"), "--llm", str(folder / "llama")]) == 0
    model = load_model(folder / "out")
    assert torch.equal(model.llm.embed_tokens.weight[:422], llama.model.embed_tokens.weight)
    assert torch.equal(model.head.head.weight[:422], llama.lm_head.weight)
    assert model.config.tokens.boi == 422 and model.config.tokens.ends == (2, 420)


def test_a_piece_that_stands_twice_is_refused():
    """As the sentencepiece library does; the rows of the first one would never be used."""
    texts = ["<unk>", "a", "b", "ab", "a"]
    pieces = [Piece(text, -1.0, Kind.NORMAL if i else Kind.UNKNOWN) for i, text in enumerate(texts)]
    with pytest.raises(WeightsError, match="gives 'a' two ids; got 1 and 4"):
        byte_pair_tokenizer(pieces, Normaliser())
