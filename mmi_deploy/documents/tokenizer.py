"""Text to token ids and back, on Hugging Face's `tokenizers` (a tokenizer.json, no Python code)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from mmi_deploy.errors import BundleError, DocumentError
from mmi_deploy.spec.config import TokenConfig

FILE_NAME = "tokenizer.json"

_CONTEXT = 8
"""Tokens before a stream that decide how it begins; one character takes at most four."""

_LISTED = 8
"""Words that an error names."""


class Tokenizer:
    """A tokenizer that never makes special tokens out of what a user wrote."""

    def __init__(self, inner: tokenizers.Tokenizer, tokens: TokenConfig) -> None:
        self._inner = inner
        self._inner.encode_special_tokens = True  # `<s>` in a text is three characters
        self._reserved = {tokens.bos, *tokens.ends, tokens.boi, tokens.image}
        unknown = getattr(inner.model, "unk_token", None)
        marks = {inner.id_to_token(token) for token in self._reserved}
        marks |= {
            token.content for token in inner.get_added_tokens_decoder().values() if token.special
        }
        self._marks = re.compile("|".join(re.escape(mark) for mark in marks if mark) or r"(?!)")
        self._unknown = inner.token_to_id(unknown) if unknown else None
        largest = max(inner.get_vocab().values(), default=-1)
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
        try:
            inner = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # `tokenizers` raises plain Exception
            raise BundleError(
                f"cannot read the tokenizer {path} ({error})",
                fix="copy it again from the model folder",
            ) from None
        return cls(inner, tokens)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, none added at either end.

        Raises `DocumentError` for words the model has no token for, among them the spellings of
        special tokens unless the vocabulary has tokens for their letters.
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
            fix="say it with words that it was trained on",
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`; special tokens are left out."""
        return self._inner.decode(list(token_ids), skip_special_tokens=True)


def _listed(words: Iterable[str]) -> str:
    """The first of the different words, and how many more there are."""
    different = list(dict.fromkeys(words))
    more = f" and {len(different) - _LISTED} more" if len(different) > _LISTED else ""
    return ", ".join(map(repr, different[:_LISTED])) + more


class TextStream:
    """Decodes tokens as they come and gives out only text that later tokens cannot change.

    One character may take several tokens (bytes), and a token's text depends on the one before it
    (spaces), so the tokens of the last text given out are decoded again together with the new ones.
    `before`: the tokens of the text that the stream goes on from, if there is one.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._given = list(before[-_CONTEXT:])
        self._waiting: list[int] = []

    def feed(self, token_id: int) -> str:
        """The text that is certain now; empty while a character is incomplete."""
        self._waiting.append(token_id)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._given, self._waiting = self._waiting, []
        return text

    def rest(self) -> str:
        """What was held back, for the end of a text; incomplete characters show as U+FFFD."""
        text = self._new_text() if self._waiting else ""
        self._given, self._waiting = [], []
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._given)
        return self._tokenizer.decode(self._given + self._waiting)[len(before) :]
