"""The drawn world as a corpus for training from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from tokenizers import Tokenizer

from mmi_train.data.corpus import Split
from mmi_train.data.synthetic.tasks import MAKERS, TaskDocument
from mmi_train.data.synthetic.vocabulary import build_tokenizer
from mmi_train.data.synthetic.world import WorldConfig, random_scene, render

# Share of the autoencoder's pictures that are class maps.
SEGMENTATION = 0.1


@dataclass(frozen=True)
class DrawnWorld:
    """Scenes of one difficulty, with the tasks that are about them."""

    world: WorldConfig

    @property
    def mixture(self) -> Mapping[str, int]:
        return MappingProxyType({"reading": 8, "drawing": 8, "segmentation": 5, "story": 5})

    @property
    def conditioning_mixture(self) -> Mapping[str, int]:
        # Without the U-Net a picture to draw costs next to nothing.
        return MappingProxyType({"reading": 14, "drawing": 20, "segmentation": 8, "story": 8})

    @property
    def picture_mixture(self) -> Mapping[str, int]:
        return MappingProxyType({"drawing": 2, "segmentation": 3, "story": 5})

    @property
    def distillation_mixture(self) -> Mapping[str, int]:
        """Documents of each kind in a micro-batch of a student, which loses most of the pictures
        from text."""
        return MappingProxyType({"drawing": 5, "segmentation": 3, "story": 3})

    def document(self, kind: str, rng: np.random.Generator, split: Split = "train") -> TaskDocument:
        return MAKERS[kind](rng, self.world, split)

    def pictures(self, rng: np.random.Generator, count: int) -> list[np.ndarray]:
        scenes = [random_scene(rng, self.world, "train") for _ in range(count)]
        return [render(scene, segmentation=rng.random() < SEGMENTATION) for scene in scenes]

    def tokenizer(self) -> Tokenizer:
        return build_tokenizer()

    def describe(self) -> WorldConfig:
        return self.world
