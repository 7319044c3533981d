"""Reader of LLaMA's `tokenizer.model`, a SentencePiece model, as a `tokenizers.Tokenizer`.

Only the fields of a byte-pair model are read, by their protobuf numbers in
sentencepiece_model.proto: pieces with their scores and kinds, and the normaliser's switches.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from mmi_deploy.errors import WeightsError

# SentencePiece's character for a space.
SPACE = "\u2581"

# TrainerSpec.model_type of byte-pair models.
_BPE = 2


class Kind(IntEnum):
    """Kind of a piece, with SentencePiece's numbers, which llama.cpp uses too."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its position."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Normaliser:
    """Normalisation of a text before tokenisation.

    charsmap: SentencePiece's compiled table of replacements. add_space: put a space before the
    text. one_space: merge repeated spaces.
    """

    charsmap: bytes = b""
    add_space: bool = True
    one_space: bool = False


def read_sentencepiece(path: Path) -> Tokenizer:
    """Read the tokenizer in a SentencePiece model file; raises `WeightsError`."""
    return byte_pair_tokenizer(*read_pieces(path))


def read_pieces(path: Path) -> tuple[list[Piece], Normaliser]:
    """Read pieces and normaliser of a byte-pair SentencePiece file; raises `WeightsError`."""
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
            f"{path} is not a SentencePiece model, or it is damaged", fix="download it again"
        ) from None
    if trainer.numbers.get(3, 1) != _BPE:
        raise WeightsError(
            f"{path} is not a byte-pair model",
            expected="the tokenizer of a LLaMA",
            fix="give a folder with a tokenizer.json",
        )
    charsmap = b"".join(rules.texts.get(2, []))
    add_space, one_space = (bool(rules.numbers.get(field, 1)) for field in (3, 4))
    return pieces, Normaliser(charsmap, add_space, one_space)


def byte_pair_tokenizer(pieces: Sequence[Piece], rules: Normaliser) -> Tokenizer:
    """Build a byte-pair tokenizer with the same ids as SentencePiece gives with `pieces`.

    SentencePiece merges the two neighbours whose union has the highest score; here every pair whose
    union is a piece is a merge, ranked by that piece's score.
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
    """Ids of `texts` by position; raises `WeightsError` for a repeated text."""
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
    """All pairs of pieces whose union is a piece, the best score first."""
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
    """A protobuf message: integers and byte strings by field number."""

    def __init__(self, message: bytes) -> None:
        self.numbers: dict[int, int] = {}
        self.texts: dict[int, list[bytes]] = {}
        position = 0
        while position < len(message):
            tag, position = _varint(message, position)
            field, form = tag >> 3, tag & 7
            if form == 0:
                self.numbers[field], position = _varint(message, position)
                continue
            length = {1: 8, 5: 4}.get(form, -1)
            if form == 2:
                length, position = _varint(message, position)
            if length < 0 or position + length > len(message):
                raise ValueError("not a protobuf message")
            self.texts.setdefault(field, []).append(message[position : position + length])
            position += length


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Read a varint (seven bits per byte); returns it and the position after it."""
    value = shift = 0
    while shift < 64:
        byte = message[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
    raise ValueError("not a varint")
