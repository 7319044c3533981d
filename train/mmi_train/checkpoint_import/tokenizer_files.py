"""Tokenizer files of language models, and the special tokens for images that are added to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from mmi_deploy.documents.tokenizer import FILE_NAME, exact
from mmi_deploy.errors import ConfigError, WeightsError
from mmi_deploy.spec.config import TokenConfig
from mmi_train.checkpoint_import.config_fields import Fields, read_json, readable_errors
from mmi_train.checkpoint_import.sentencepiece_model import read_sentencepiece

SENTENCEPIECE = "tokenizer.model"

# Special tokens for images, as the published code spells them.
BEGIN_OF_IMAGE = "<|beginofimage|>"
IMAGE = "<|image|>"

PAD = "<|pad|>"

# Files of transformers beside the tokenizer.
_ADDED = "added_tokens.json"
_ABOUT = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"


def read_tokenizer(source: Path) -> Tokenizer:
    """Read a tokenizer.json or a SentencePiece model, or the folder of one, with the tokens that
    files beside it add. Raises `WeightsError`, and `ConfigError` for a file beside it."""
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
    tokenizer = read_sentencepiece(path) if path.suffix == ".model" else _read_tokenizer_json(path)
    for token, added in sorted(_added_beside(path.parent).items()):
        _add(tokenizer, path, token, added)
    return tokenizer


def _read_tokenizer_json(path: Path) -> Tokenizer:
    try:
        return exact(Tokenizer.from_str(path.read_text(encoding="utf-8")))
    except Exception as error:  # `tokenizers` raises plain Exception
        raise WeightsError(
            f"cannot read the tokenizer {path} ({error})", fix="download it again"
        ) from None


def _added_beside(folder: Path) -> dict[int, AddedToken]:
    """Tokens by id that transformers adds to the tokenizer in `folder`.

    They are read from tokenizer_config.json, and from added_tokens.json as it was written until
    2023, where another file names those that are special. Raises `ConfigError`.
    """
    files = {name: folder / name for name in (_ADDED, _ABOUT, _SPECIAL)}
    fields = {name: read_json(path) if path.is_file() else {} for name, path in files.items()}
    with readable_errors(folder):
        special = _special_spellings(fields[_ABOUT]) | _special_spellings(fields[_SPECIAL])
        found = {
            int(token): AddedToken(
                about["content"],
                lstrip=about.get("lstrip", False),
                rstrip=about.get("rstrip", False),
                single_word=about.get("single_word", False),
                normalized=False,
                special=about.get("special", False) or about["content"] in special,
            )
            for token, about in (fields[_ABOUT].get("added_tokens_decoder") or {}).items()
        }
        for text, token in fields[_ADDED].items():
            if not isinstance(token, int):
                raise ValueError(f"the id of {text!r} is {token!r}")
            added = found.setdefault(
                token, AddedToken(text, normalized=False, special=text in special)
            )
            if added.content != text:
                raise ConfigError(
                    f"{folder}: {_ADDED} and {_ABOUT} contradict each other",
                    expected=f"one token of id {token}",
                    got=f"{text!r} and {added.content!r}",
                    fix="give --tokenizer the folder as the language model was trained with",
                )
    return found


def _special_spellings(fields: Fields) -> set[str]:
    """Spellings of special tokens in a file: by role (`pad_token`), and in lists without roles."""
    named: list[str | Fields] = [v for name, v in fields.items() if name.endswith("_token") and v]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = fields.get(name) or []
        named += more.values() if isinstance(more, dict) else more
    return {
        value["content"] if isinstance(value, dict) else value
        for value in named
        if isinstance(value, dict | str)
    }


def _add(tokenizer: Tokenizer, path: Path, token: int, added: AddedToken) -> None:
    """Add a token with the id `token` to `tokenizer`, which was read from `path`.

    Raises `ConfigError` where another token has that id, or the id is not the next free one.
    """
    known = tokenizer.get_added_tokens_decoder().get(token)
    if known is not None and known.content == added.content:
        return
    (tokenizer.add_special_tokens if added.special else tokenizer.add_tokens)([added])
    got = tokenizer.token_to_id(added.content)
    if got != token:
        raise ConfigError(
            f"the files beside {path} add {added.content!r} under an id that it cannot have",
            expected=f"id {got}",
            got=token,
            fix="give --tokenizer the folder as the language model was trained with",
        )


def add_special_tokens(tokenizer: Tokenizer, spellings: Sequence[str]) -> list[int]:
    """Add special tokens to `tokenizer`, new ones after all its ids; returns the ids of all."""
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in spellings]
    )
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return [vocabulary[text] for text in spellings]


def published_tokenizer(source: Path, tokens: TokenConfig) -> Tokenizer:
    """The tokenizer at `source` with the two special tokens that the published code adds; raises
    `ConfigError` when its ids differ from `tokens`."""
    tokenizer = read_tokenizer(source)
    boi, image = add_special_tokens(tokenizer, (BEGIN_OF_IMAGE, IMAGE))
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
