"""Tokenizer: text to token ids and back, by Hugging Face's `tokenizers` and a tokenizer.json."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from mmi_deploy.errors import BundleError, DocumentError
from mmi_deploy.spec.config import TokenConfig

FILE_NAME = "tokenizer.json"

# Tokens of context that a stream decodes with its first token; more if they begin inside a
# character.
_CONTEXT = 8

# Spelling of byte tokens, which a decoder with byte fallback joins to characters.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")

# Number of words that an error lists, and the most characters of each.
_LISTED = 8
_CHARACTERS = 40


def read_tokenizer_file(path: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json for `exact` encoding; raises `BundleError`."""
    try:
        return exact(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
    except Exception as error:  # `tokenizers` raises plain Exception
        raise BundleError(
            f"cannot read the tokenizer {path} ({error})",
            fix="copy it again from the model folder",
        ) from None


def exact(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Switch off truncation, padding and BPE dropout in place.

    Training may leave them in a tokenizer.json, where they would cut, pad or randomly split texts.
    """
    inner.no_truncation()
    inner.no_padding()
    if getattr(inner.model, "dropout", None) is not None:
        inner.model.dropout = None
    return inner


# Largest vocabulary whose words are listed.
LISTED_WORDS = 500


@dataclass(frozen=True)
class Vocabulary:
    """Number of words and word pieces; `words`: all of them, sorted, if they are few, else none."""

    size: int
    words: tuple[str, ...]


class Tokenizer:
    """Tokenizer that never encodes a user's text as special tokens."""

    def __init__(
        self, inner: tokenizers.Tokenizer, tokens: TokenConfig, folder: Path | None = None
    ) -> None:
        """`folder`: the bundle or model folder of the tokenizer, for error messages."""
        self._inner, self._folder = exact(inner), folder
        self._inner.encode_special_tokens = True  # `<s>` in a text is three characters
        self._reserved = {tokens.bos, *tokens.ends, tokens.boi, tokens.image}
        unknown = getattr(inner.model, "unk_token", None)
        marks = {inner.id_to_token(token) for token in self._reserved}
        special = {
            token: added.content
            for token, added in inner.get_added_tokens_decoder().items()
            if added.special
        }
        marks |= {*special.values()}
        self._silent = frozenset(special)
        self._marks = re.compile("|".join(re.escape(mark) for mark in marks if mark) or r"(?!)")
        self._unknown = inner.token_to_id(unknown) if unknown else None
        vocabulary = inner.get_vocab()
        largest = max(vocabulary.values(), default=-1)
        named = {token for word, token in vocabulary.items() if _BYTE.fullmatch(word)}
        letter = inner.token_to_id("<0x41>")
        joins = letter is not None and inner.decode([letter]) == "A"
        self._bytes = frozenset(named if joins else ())
        if max(self._reserved) > largest:
            raise BundleError(
                "the tokenizer lacks special tokens of the model",
                expected=f"ids up to {max(self._reserved)}",
                got=f"a vocabulary up to id {largest}",
                fix="use the tokenizer that the model was trained with",
            )

    @classmethod
    def open(cls, path: Path, tokens: TokenConfig) -> Tokenizer:
        """Read a tokenizer.json; raises `BundleError`."""
        return cls(read_tokenizer_file(path), tokens, path.parent)

    def encode(self, text: str) -> list[int]:
        """Encode `text` without adding special tokens at its ends.

        Raises `DocumentError` for words without a token, among them the spellings of special tokens
        unless the vocabulary has tokens for their letters.
        """
        encoding = self._inner.encode(text, add_special_tokens=False)
        unknown = [
            place
            for token, place in zip(encoding.ids, encoding.offsets, strict=True)
            if token == self._unknown or token in self._reserved
        ]
        if not unknown:
            return encoding.ids
        marks = [
            mark[0]
            for mark in self._marks.finditer(text)
            if any(start < mark.end() and mark.start() < end for start, end in unknown)
        ]
        if marks:
            raise DocumentError(
                f"the text holds {_listed(marks)}, which the model reserves for its own marks",
                fix="write it in other words; a picture is linked as ![what it shows](file.png)",
            )
        raise DocumentError(
            f"the model does not know {_listed(text[start:end] for start, end in unknown)}",
            fix="say it with words that it was trained on: "
            f"`mmi inspect {self._folder or 'BUNDLE'}` lists them",
        )

    @property
    def vocabulary(self) -> Vocabulary:
        """Words and word pieces of texts, without special tokens."""
        listed = sorted(set(self._inner.get_vocab()) - self._special())
        return Vocabulary(len(listed), tuple(listed) if len(listed) <= LISTED_WORDS else ())

    def _special(self) -> set[str]:
        """Spellings of special tokens, which do not occur in texts."""
        unknown = getattr(self._inner.model, "unk_token", None)
        added = self._inner.get_added_tokens_decoder().values()
        found = {self._inner.id_to_token(token) for token in self._reserved} | {unknown}
        return {name for name in found if name} | {one.content for one in added if one.special}

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode `token_ids`; special tokens are left out."""
        return self._inner.decode(list(token_ids), skip_special_tokens=True)

    def spelling(self, token_id: int) -> str:
        """Text that the token adds, with the space in front of a word; of a special or byte token,
        which alone adds none, its name."""
        if self.is_silent(token_id) or self.is_byte(token_id):
            return self._inner.id_to_token(token_id) or f"<{token_id}>"
        # Alone, a word loses the space in front of it.
        return self.decode([token_id] * 2)[len(self.decode([token_id])) :]

    def is_silent(self, token_id: int) -> bool:
        """True if `decode` leaves the token out: a special token, or an id without a word."""
        return token_id in self._silent or self._inner.id_to_token(token_id) is None

    def is_byte(self, token_id: int) -> bool:
        """True for a byte token. `decode` joins a run of bytes as a whole: one invalid byte turns
        every byte of the run into U+FFFD."""
        return token_id in self._bytes


def _listed(words: Iterable[str]) -> str:
    """The first distinct words, and the number of further ones."""
    different = list(dict.fromkeys(words))
    more = f" and {len(different) - _LISTED} more" if len(different) > _LISTED else ""
    return ", ".join(repr(_shortened(word)) for word in different[:_LISTED]) + more


def _shortened(word: str) -> str:
    """At most `_CHARACTERS` of a word: what takes more is no word."""
    return word if len(word) <= _CHARACTERS else word[: _CHARACTERS - 1] + "…"


class TextStream:
    """Streaming decoder that returns only text which later tokens cannot change.

    The concatenated text equals decoding all tokens at once. A character may consist of several
    tokens (bytes), a run of byte tokens is decoded as a whole, and the text of a token depends on
    the previous token (spaces). So text waits until its characters are complete and its run of
    bytes has ended, and the tokens of the last returned text are decoded again with the new ones.
    `before`: tokens of the text that the stream continues, if any.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._given: list[int] = []
        self._waiting: list[int] = []
        # Part of the waiting tokens' text that `before` already contains.
        self._shown = ""
        for token in self._end_of(before):
            self.feed(token)
        self._shown = self._new_text()

    def _end_of(self, before: Sequence[int]) -> list[int]:
        """The last tokens of `before`, starting at one that begins a character."""
        ids = [token for token in before if not self._tokenizer.is_silent(token)]
        start = max(len(ids) - _CONTEXT, 0)
        while start > 0 and (
            self._tokenizer.is_byte(ids[start])
            or self._tokenizer.decode(ids[start:]).startswith("\ufffd")
        ):
            start -= 1
        return ids[start:]

    def feed(self, token_id: int) -> str:
        """Add a token and return the text that is final now; empty while a character is
        incomplete."""
        if self._tokenizer.is_silent(token_id):
            return ""
        self._waiting.append(token_id)
        if self._tokenizer.is_byte(token_id):
            return ""
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        text = self._not_shown(text)
        self._given, self._waiting, self._shown = self._waiting, [], ""
        return text

    def rest(self) -> str:
        """Flush the waiting text at the end of a stream; incomplete characters become U+FFFD."""
        text = self._not_shown(self._new_text())
        self._given, self._waiting, self._shown = [], [], ""
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._given)
        return self._tokenizer.decode(self._given + self._waiting)[len(before) :]

    def _not_shown(self, text: str) -> str:
        return text[len(os.path.commonprefix((self._shown, text))) :]
