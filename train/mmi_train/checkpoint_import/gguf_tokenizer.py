"""Tokenizer of a GGUF file: SentencePiece byte pairs (LLaMA), or GPT-2's byte-level pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mmi_deploy.errors import ConfigError, WeightsError
from mmi_train.checkpoint_import.sentencepiece_model import (
    Kind,
    Normaliser,
    Piece,
    byte_pair_tokenizer,
    vocabulary,
)

# Fields that decide how a kind of tokenizer splits a text; llama.cpp guesses missing ones, with a
# warning.
_REQUIRED = {"llama": ("token_type", "scores"), "gpt2": ("token_type", "pre", "merges")}

_FIX = "give --tokenizer a folder with the model's tokenizer.json"

# Words of LLaMA-3, with up to three digits in a number, and of Qwen2, with one.
_LLAMA_3, _QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rf"{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)

# Words of Mistral's Tekken: capitals begin a word.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _words(pattern: str) -> Callable[[], list[pre_tokenizers.PreTokenizer]]:
    return lambda: [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


# Pre-tokenizers, which split texts into words before byte pairs are merged, by llama.cpp's names.
_PRE_TOKENIZERS: dict[str, Callable[[], list[pre_tokenizers.PreTokenizer]]] = {
    "gpt-2": lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": lambda: [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "llama-bpe": _words(_LLAMA_3),
    "smaug-bpe": _words(_LLAMA_3),  # SmolLM3's
    "qwen2": _words(_QWEN_2),
    "tekken": _words(_TEKKEN),
}

# Those whose words are not merged where the vocabulary has them whole.
_WHOLE_WORDS = ("llama-bpe", "tekken")

# Those whose texts are composed (NFC) first.
_COMPOSED = ("qwen2",)


def gguf_tokenizer(path: Path, fields: dict[str, Any]) -> Tokenizer:
    """The tokenizer in the `fields` of the GGUF file `path`.

    Raises `WeightsError` without a tokenizer, and `ConfigError` for one of another kind or with
    missing fields.
    """
    own = {n.removeprefix("tokenizer.ggml."): v for n, v in fields.items()}
    kind, texts = own.get("model"), own.get("tokens")
    if not texts:
        raise WeightsError(f"{path} holds no tokenizer", fix="give --tokenizer the folder of one")
    required, words = _REQUIRED.get(str(kind)), own.get("pre", "")
    if required is None or (kind == "gpt2" and words not in (*_PRE_TOKENIZERS, "")):
        raise ConfigError(
            f"{path}: its tokenizer ({kind}, tokenizer.ggml.pre {words}) is not known",
            expected=f"llama, or gpt2 with one of {', '.join(_PRE_TOKENIZERS)}",
            fix=_FIX,
        )
    if lacking := [f"tokenizer.ggml.{name}" for name in required if own.get(name) is None]:
        raise ConfigError(
            f"{path} does not say how it cuts texts: it lacks {', '.join(lacking)}", fix=_FIX
        )
    kinds = own["token_type"]
    # Unused entries at the end only fill the embedding up to a round number of rows.
    used = max((i + 1 for i, found in enumerate(kinds) if found != Kind.UNUSED), default=0)
    texts, kinds = texts[:used], kinds[:used]
    if kind == "llama":
        pieces = [Piece(*row) for row in zip(texts, own["scores"][:used], kinds, strict=True)]
        return byte_pair_tokenizer(
            pieces, Normaliser(add_space=bool(own.get("add_space_prefix", True)))
        )
    return _byte_level(texts, kinds, own["merges"], words)


def _byte_level(texts: list[str], kinds: list[int], merges: list[str], words: str) -> Tokenizer:
    """GPT-2's byte-level tokenizer; `words` names its pre-tokenizer."""
    pairs: list[Any] = [tuple(line.split(" ", 1)) for line in merges]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary(texts),
            merges=pairs,
            ignore_merges=words in _WHOLE_WORDS,
        )
    )
    if words in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_PRE_TOKENIZERS[words]())
    tokenizer.decoder = decoders.ByteLevel()
    for special, added in ((True, Kind.CONTROL), (False, Kind.USER_DEFINED)):
        tokens = [
            AddedToken(text, special=special, normalized=False)
            for text, found in zip(texts, kinds, strict=True)
            if found == added
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(tokens)
    return tokenizer
