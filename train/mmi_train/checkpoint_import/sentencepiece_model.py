"""LLaMA's `tokenizer.model`, a SentencePiece model, as a `tokenizers.Tokenizer`.

Only what a byte-pair model needs is read of it, by its protobuf field numbers
(sentencepiece_model.proto): pieces with their scores and kinds, and the normaliser's switches.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from mmi_deploy.errors import WeightsError

SPACE = "\u2581"
"""How SentencePiece writes a space."""

_BPE = 2


class Kind(IntEnum):
    """Of a piece; llama.cpp uses the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Normaliser:
    """What happens to a text before it is cut. `charsmap`: SentencePiece's compiled table."""

    charsmap: bytes = b""
    add_space: bool = True
    one_space: bool = False


def read_sentencepiece(path: Path) -> Tokenizer:
    """The tokenizer in a SentencePiece model file; raises `WeightsError`."""
    return byte_pair_tokenizer(*read_pieces(path))


def read_pieces(path: Path) -> tuple[list[Piece], Normaliser]:
    """What a SentencePiece model file of byte pairs holds; raises `WeightsError`."""
    try:
        model = _Message(path.read_bytes())
        pieces = [_piece(_Message(text)) for text in model.texts.get(1, [])]
        trainer = _Message(b"".join(model.texts.get(2, [])))
        rules = _Message(b"".join(model.texts.get(3, [])))
        if not pieces:
            raise ValueError
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, IndexError, KeyError, struct.error):
        raise WeightsError(
            f"{path} is no SentencePiece model, or it is damaged", fix="download it again"
        ) from None
    if trainer.numbers.get(3, 1) != _BPE:
        raise WeightsError(
            f"{path} is no byte-pair model",
            expected="the tokenizer of a LLaMA",
            fix="give a folder with a tokenizer.json",
        )
    charsmap = b"".join(rules.texts.get(2, []))
    add_space, one_space = (bool(rules.numbers.get(field, 1)) for field in (3, 4))
    return pieces, Normaliser(charsmap, add_space, one_space)


def byte_pair_tokenizer(pieces: Sequence[Piece], rules: Normaliser) -> Tokenizer:
    """A byte-pair tokenizer that cuts texts as SentencePiece does with `pieces`.

    SentencePiece joins the two neighbours whose union has the highest score; here every pair that
    gives a piece is a merge, ranked by that piece's score.
    """
    ids = vocabulary(piece.text for piece in pieces)
    unknown = next((piece.text for piece in pieces if piece.kind == Kind.UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges(pieces, ids),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=any(piece.kind == Kind.BYTE for piece in pieces),
        )
    )
    steps: list[normalizers.Normalizer] = []
    if rules.charsmap:
        steps.append(normalizers.Precompiled(rules.charsmap))
    if rules.one_space:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_space:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    back: list[decoders.Decoder] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if rules.add_space:
        back.append(decoders.Strip(" ", left=1))
    tokenizer.decoder = decoders.Sequence(back)
    control = (Kind.CONTROL, Kind.UNKNOWN)
    tokenizer.add_special_tokens(
        [AddedToken(p.text, normalized=False, special=True) for p in pieces if p.kind in control]
    )
    tokenizer.add_tokens(
        [AddedToken(p.text, normalized=False) for p in pieces if p.kind == Kind.USER_DEFINED]
    )
    return tokenizer


def vocabulary(texts: Iterable[str]) -> dict[str, int]:
    """The id of each text, its place; raises `WeightsError` for one that has two."""
    ids: dict[str, int] = {}
    for index, text in enumerate(texts):
        if ids.setdefault(text, index) != index:
            raise WeightsError(
                f"the tokenizer gives {text!r} two ids",
                got=f"{ids[text]} and {index}",
                fix="download it again, or give --tokenizer another one",
            )
    return ids


def _merges(pieces: Sequence[Piece], ids: dict[str, int]) -> list[tuple[str, str]]:
    usable = {p.text for p in pieces if p.kind in (Kind.NORMAL, Kind.USER_DEFINED)}
    ranked = sorted(
        (piece for piece in pieces if piece.kind == Kind.NORMAL),
        key=lambda piece: (-piece.score, ids[piece.text]),
    )
    return [
        (left, right)
        for piece in ranked
        for cut in range(1, len(piece.text))
        if (left := piece.text[:cut]) in usable and (right := piece.text[cut:]) in usable
    ]


def _piece(message: _Message) -> Piece:
    (score,) = struct.unpack("<f", message.texts.get(2, [bytes(4)])[0])
    return Piece(message.texts[1][0].decode(), score, message.numbers.get(3, Kind.NORMAL))


class _Message:
    """A protobuf message: whole numbers and byte strings by field number."""

    def __init__(self, message: bytes) -> None:
        self.numbers: dict[int, int] = {}
        self.texts: dict[int, list[bytes]] = {}
        position = 0
        while position < len(message):
            tag, position = _number(message, position)
            field, form = tag >> 3, tag & 7
            if form == 0:
                self.numbers[field], position = _number(message, position)
                continue
            length = {1: 8, 5: 4}.get(form, -1)
            if form == 2:
                length, position = _number(message, position)
            if length < 0 or position + length > len(message):
                raise ValueError("no protobuf message")
            self.texts.setdefault(field, []).append(message[position : position + length])
            position += length


def _number(message: bytes, position: int) -> tuple[int, int]:
    """A number of seven bits a byte, and the position after it."""
    value = shift = 0
    while shift < 64:
        byte = message[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
    raise ValueError("no number")
