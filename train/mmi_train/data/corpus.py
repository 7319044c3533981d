"""Corpus for training from scratch: documents and pictures that are made, not read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
from tokenizers import Tokenizer

from mmi_train.data.document import Part

Split = Literal["train", "held_out"]


class MadeDocument(Protocol):
    """A document of some kind. `targets`: indices of the parts that can be asked for."""

    @property
    def kind(self) -> str: ...

    @property
    def parts(self) -> Sequence[Part]: ...

    @property
    def targets(self) -> Sequence[int]: ...


class Corpus(Protocol):
    """Endless documents of several kinds, each made from the draws of a generator."""

    @property
    def mixture(self) -> Mapping[str, int]:
        """Documents of each kind in a micro-batch of the main stage."""

    @property
    def conditioning_mixture(self) -> Mapping[str, int]:
        """Documents of each kind in a micro-batch of the conditioning stage, without U-Net."""

    @property
    def picture_mixture(self) -> Mapping[str, int]:
        """Documents of each kind in a micro-batch of the pictures stage, which trains the image
        decoder alone."""

    def document(
        self, kind: str, rng: np.random.Generator, split: Split = "train"
    ) -> MadeDocument: ...

    def pictures(self, rng: np.random.Generator, count: int) -> list[np.ndarray]:
        """Training pictures for the autoencoder, uint8 [height, width, 3]."""

    def tokenizer(self) -> Tokenizer:
        """Tokenizer of all texts of the corpus, special tokens included."""

    def describe(self) -> object:
        """Settings that decide the documents; a checkpoint of another corpus is refused."""
