"""CLIP similarity: cosine of the embeddings of two pictures, as the paper measures stories.

Source: Radford et al., "Learning Transferable Visual Models" (2021); the paper takes ViT-L/14.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmi_deploy.errors import WeightsError

# Folder of the network within the folder of weights, and its address.
FOLDER = "clip-vit-large-patch14"
ADDRESS = "https://huggingface.co/openai/clip-vit-large-patch14"

# Mean and standard deviation of CLIP's training pictures.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """CLIP from a folder that transformers wrote. Raises `WeightsError`."""

    def __init__(self, weights: Path | None) -> None:
        from transformers import CLIPVisionModelWithProjection

        if weights is None or not (weights / FOLDER / "config.json").is_file():
            raise WeightsError(
                f"{weights or 'no folder of weights'} holds no {FOLDER}/config.json",
                fix=f"get config.json and model.safetensors from {ADDRESS}, and give the folder "
                f"that holds {FOLDER} with --weights DIR",
            )
        try:
            self._model = CLIPVisionModelWithProjection.from_pretrained(
                weights / FOLDER, local_files_only=True, use_safetensors=True
            ).eval()
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise WeightsError(f"{weights / FOLDER} holds no CLIP: {reason}") from None
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(self._device)
        self._side = int(self._model.config.image_size)

    def embed(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Unit embeddings, float32 [pictures, channels], of pictures uint8 [height, width, 3]."""
        with torch.inference_mode():
            pixels = torch.stack([self._pixels(rgb) for rgb in pictures])
            found = self._model(pixel_values=pixels.to(self._device)).image_embeds
            return np.asarray(torch.nn.functional.normalize(found, dim=-1).cpu().numpy())

    def _pixels(self, rgb: np.ndarray) -> Tensor:
        """CLIP's own preparation: shorter side scaled bicubically, centre cut out, normalised."""
        image = Image.fromarray(rgb)
        width, height = image.size
        longer = int(self._side * max(width, height) / min(width, height))
        size = (self._side, longer) if width <= height else (longer, self._side)
        scaled = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
        top, left = ((length - self._side) // 2 for length in scaled.shape[:2])
        cut = scaled[top : top + self._side, left : left + self._side]
        values = (cut / 255.0 - np.array(_MEAN)) / np.array(_STD)
        return torch.from_numpy(values.transpose(2, 0, 1)).float()


def similarities(first: np.ndarray, second: np.ndarray) -> list[float]:
    """Cosine of each pair of unit embeddings [pictures, channels]."""
    return [float(value) for value in (first * second).sum(-1)]
