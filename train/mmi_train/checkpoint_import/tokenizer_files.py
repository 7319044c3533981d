"""The tokenizers of language models, with the marks for pictures that ours needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from mmi_deploy.documents.tokenizer import FILE_NAME, exact
from mmi_deploy.errors import ConfigError, WeightsError
from mmi_deploy.spec.config import TokenConfig
from mmi_train.checkpoint_import.sentencepiece_model import read_sentencepiece

SENTENCEPIECE = "tokenizer.model"
BEGIN_OF_IMAGE = "<|beginofimage|>"
IMAGE = "<|image|>"
"""As the published code spells them."""

PAD = "<|pad|>"


def read_tokenizer(source: Path) -> Tokenizer:
    """A tokenizer.json or a SentencePiece model, or the folder of one; raises `WeightsError`."""
    path = source
    if source.is_dir():
        known = [source / name for name in (FILE_NAME, SENTENCEPIECE)]
        path = next((path for path in known if path.is_file()), source / FILE_NAME)
    if not path.is_file():
        raise WeightsError(
            f"{source} holds no tokenizer",
            expected=f"{FILE_NAME} or {SENTENCEPIECE}",
            fix="give --tokenizer the folder of the language model that it was trained with",
        )
    if path.suffix == ".model":
        return read_sentencepiece(path)
    try:
        return exact(Tokenizer.from_str(path.read_text(encoding="utf-8")))
    except Exception as error:  # `tokenizers` raises plain Exception
        raise WeightsError(
            f"cannot read the tokenizer {path} ({error})", fix="download it again"
        ) from None


def add_marks(tokenizer: Tokenizer, marks: Sequence[str]) -> list[int]:
    """Let `tokenizer` know `marks` as special tokens, new ones after all it knew; their ids."""
    tokenizer.add_special_tokens(
        [AddedToken(mark, special=True, normalized=False) for mark in marks]
    )
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return [vocabulary[mark] for mark in marks]


def published_tokenizer(source: Path, tokens: TokenConfig) -> Tokenizer:
    """The tokenizer at `source` with the two marks that the published code adds; raises
    `ConfigError` when its ids are not `tokens`."""
    tokenizer = read_tokenizer(source)
    boi, image = add_marks(tokenizer, (BEGIN_OF_IMAGE, IMAGE))
    found = {
        "bos": tokenizer.token_to_id("<s>"),
        "eos": tokenizer.token_to_id("</s>"),
        "pad": tokens.pad if tokenizer.id_to_token(tokens.pad) is not None else None,
        "boi": boi,
        "image": image,
    }
    wanted = {name: getattr(tokens, name) for name in found}
    if found != wanted:
        raise ConfigError(
            f"the tokenizer of {source} is not the one of this model",
            expected=", ".join(f"{name} {wanted[name]}" for name in found),
            got=", ".join(f"{name} {found[name]}" for name in found),
            fix="give --tokenizer the folder of the language model that it was trained with",
        )
    return tokenizer
