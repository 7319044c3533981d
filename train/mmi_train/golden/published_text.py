"""The published code's tokenization, on the tokenizer that a golden case file carries.

Special tokens are split out of a text; every piece between them is encoded on its own, with a
blank in front, blanks beside pictures left out.
"""

from __future__ import annotations

import base64
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from mmi_deploy.spec.config import TokenConfig
from mmi_train.checkpoint_import.sentencepiece_model import read_sentencepiece
from mmi_train.data.document import ImagePart, Part, TextPart
from mmi_train.data.readers.sample import PicturePart, SamplePart
from mmi_train.data.rows import TokenDocument, continued, tokens_of

BOI, IMAGE, BOS, EOS = "<|beginofimage|>", "<|image|>", "<s>", "</s>"

# Visual tokens of a picture in the cases.
SPAN = 4

_SPECIAL = re.compile("|".join(map(re.escape, (BOI, IMAGE, BOS, EOS))))
_NOTHING = np.zeros((1, 1, 3), np.uint8)


@lru_cache(maxsize=2)
def _read(model: str) -> tokenizers.Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(base64.b64decode(model))
        return read_sentencepiece(path)


class PublishedText:
    """Tokenizer of a case. `tokens`: the ids of its special tokens."""

    def __init__(self, about: Mapping[str, Any]) -> None:
        self._inner = _read(about["model_base64"])
        ids: Mapping[str, int] = about["ids"]
        pad = next(number for name, number in ids.items() if name.startswith("padding"))
        self.tokens = TokenConfig(
            bos=ids[BOS], eos=ids[EOS], pad=pad, boi=ids[BOI], image=ids[IMAGE]
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text without special tokens."""
        return self._inner.encode(text, add_special_tokens=False).ids if text else []

    def ids(self, text: str) -> list[int]:
        """Ids of a text with special tokens as they are written; `<s>` in front."""
        config = self.tokens
        numbers = {BOI: config.boi, IMAGE: config.image, BOS: config.bos, EOS: config.eos}
        found, at, beside = [config.bos], 0, False
        for mark in [*_SPECIAL.finditer(text), None]:
            piece = text[at : mark.start() if mark else len(text)]
            piece = piece.lstrip() if beside else piece
            beside = mark is not None and mark[0] in (BOI, IMAGE)
            found += self.encode(piece.rstrip() if beside else piece)
            if mark is not None:
                found.append(numbers[mark[0]])
                at = mark.end()
        return found

    def document(self, parts: Sequence[SamplePart]) -> TokenDocument:
        """Tokens of a sample's parts, as training makes them."""
        plain: list[Part] = [
            part if isinstance(part, TextPart) else ImagePart(_NOTHING, part.learn)
            for part in parts
        ]
        encode = continued(self)  # type: ignore[arg-type]
        return tokens_of(plain, encode, self.tokens, SPAN, read_all=True, given_learn=False)

    def targets(self, document: TokenDocument) -> list[int]:
        """Targets of a document, one shorter than its ids, -100 without loss."""
        ids = np.where(document.weight > 0, document.token_ids, -100)
        return [int(number) for number in ids[1:]]


def written(parts: Sequence[SamplePart], *, end: bool = False, boi: bool = True) -> str:
    """Text of parts as the published collators write it, pictures as their tokens."""
    picture = (BOI if boi else "") + IMAGE * SPAN
    text = "".join(part.text if isinstance(part, TextPart) else picture for part in parts)
    return text + EOS * end


def even(text: str) -> str:
    """The text without blanks beside pictures and at its ends, which no token stands for."""
    mark = f"(?:{re.escape(BOI)}|{re.escape(IMAGE)})"
    text = re.sub(rf"\s*({mark})\s*", r"\1", text)
    return re.sub(rf"\s*({re.escape(EOS)})", r"\1", text).strip()


def padded(
    rows: Sequence[Sequence[int]], fill: int, width: int | None = None, *, left: bool = False
) -> list[list[int]]:
    """Rows of `width` entries, by default as long as the longest."""
    width = max(map(len, rows)) if width is None else width
    return [
        [fill] * (width - len(row)) + list(row) if left else [*row, *[fill] * (width - len(row))]
        for row in rows
    ]


def shade(part: PicturePart) -> int:
    """Grey level of a picture of a case, which stands for it."""
    return int(part.picture.load()[0, 0, 0])
