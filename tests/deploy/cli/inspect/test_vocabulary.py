"""The words that a model knows: listed where they are few, and named where one is unknown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from mmi_deploy.cli.app import run
from mmi_deploy.documents.tokenizer import LISTED_WORDS, Tokenizer
from mmi_deploy.errors import DocumentError
from mmi_deploy.spec.config import TokenConfig

REPOSITORY = Path(__file__).resolve().parents[4]
SPECIAL = ("<pad>", "<s>", "</s>", "<boi>", "<image>", "<unk>")
TOKENS = TokenConfig(pad=0, bos=1, eos=2, boi=3, image=4)


def tokenizer(folder: Path, words: list[str]) -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<pad>"])
    inner.save(str(folder / "tokenizer.json"))
    return Tokenizer.open(folder / "tokenizer.json", TOKENS)


def test_few_words_are_listed_in_order_and_without_special_tokens(tmp_path: Path) -> None:
    found = tokenizer(tmp_path, ["sky", "blue", "."]).vocabulary
    assert found.words == (".", "blue", "sky") and found.size == 3


@pytest.mark.parametrize("count", [LISTED_WORDS, LISTED_WORDS + 1])
def test_many_words_are_counted(tmp_path: Path, count: int) -> None:
    found = tokenizer(tmp_path, [f"w{index}" for index in range(count)]).vocabulary
    assert found.size == count and len(found.words) == (count if count <= LISTED_WORDS else 0)


def test_an_unknown_word_points_to_the_list_of_its_own_folder(tmp_path: Path) -> None:
    with pytest.raises(DocumentError) as caught:
        tokenizer(tmp_path, ["sky"]).encode("sky elephant")
    assert "'elephant'" in str(caught.value)
    assert f"`mmi inspect {tmp_path}` lists them" in str(caught.value)


def test_inspect_lists_the_words_of_the_shipped_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["inspect", str(REPOSITORY / "assets" / "tiny")]) == 0
    shown = capsys.readouterr().out
    assert run(["inspect", str(REPOSITORY / "assets" / "tiny"), "--json"]) == 0
    vocabulary = json.loads(capsys.readouterr().out)["vocabulary"]
    listed = shown[shown.index("vocabulary:") :].splitlines()
    assert " ".join(listed[1:]).split() == vocabulary["words"]
    assert re.search(r"vocabulary: (\d+)", listed[0])[1] == str(vocabulary["size"])  # type: ignore[index]
    assert {"square", "moves", "."} <= set(vocabulary["words"]) and max(map(len, listed)) <= 80
    assert "<s>" not in vocabulary["words"]
