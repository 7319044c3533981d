"""CLIP similarity: cosine of the embeddings of two pictures, as the paper measures stories, and of
a picture and its caption, by which it chooses among candidates.

Source: Radford et al., "Learning Transferable Visual Models" (2021); the paper takes ViT-L/14.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmi_deploy.documents.tokenizer import read_tokenizer_file
from mmi_deploy.errors import WeightsError
from mmi_deploy.system.files import sha256_of

# Folder of the network within the folder of weights, and its address.
FOLDER = "clip-vit-large-patch14"
ADDRESS = "https://huggingface.co/openai/clip-vit-large-patch14"

# Its files; the last is for texts alone.
FILES = ("config.json", "model.safetensors", "tokenizer.json")

# Mean and standard deviation of CLIP's training pictures.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def _folder(weights: Path | None, *names: str) -> Path:
    """CLIP's folder. Raises `WeightsError` if one of `names` is not in it."""
    for name in names:
        if weights is None or not (weights / FOLDER / name).is_file():
            raise WeightsError(
                f"{weights or 'no folder of weights'} holds no {FOLDER}/{name}",
                fix=f"get {' and '.join(names)} from {ADDRESS}, and give the folder that holds "
                f"{FOLDER} with --weights DIR",
            )
    assert weights is not None, "there is a name"
    return weights / FOLDER


def _loaded(kind: Any, folder: Path) -> Any:
    """A part of CLIP from a folder that transformers wrote. Raises `WeightsError`."""
    from transformers.utils import logging

    # Of a half of CLIP it lists the tensors of the other.
    said, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"{folder} holds no CLIP: {reason}") from None
    finally:
        logging.set_verbosity(said)
        if bar:
            logging.enable_progress_bar()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


class Clip:
    """CLIP's network for pictures, from a folder that transformers wrote. Raises `WeightsError`."""

    def __init__(self, weights: Path | None) -> None:
        from transformers import CLIPVisionModelWithProjection

        folder = _folder(weights, *FILES[:2])
        self._model = _loaded(CLIPVisionModelWithProjection, folder)
        self._device = self._model.device
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


class Reranker:
    """Chooses, of the pictures drawn of a caption, the one that CLIP finds most similar to it."""

    def __init__(self, weights: Path | None) -> None:
        """weights: folder of CLIP with both its networks and its tokenizer. Raises `WeightsError`
        and `BundleError`."""
        from transformers import CLIPTextModelWithProjection

        folder = _folder(weights, *FILES)
        self._clip = Clip(weights)
        self._texts = _loaded(CLIPTextModelWithProjection, folder)
        self._tokenizer = read_tokenizer_file(folder / FILES[2])
        self._tokenizer.enable_truncation(self._texts.config.max_position_embeddings)

    @staticmethod
    def checksum(weights: Path | None) -> str:
        """SHA-256 of the weights."""
        return sha256_of(_folder(weights, *FILES) / FILES[1])

    def __call__(self, caption: str, pictures: Sequence[np.ndarray]) -> int:
        """Number of the best of the pictures, uint8 [height, width, 3]; the first of equal ones."""
        scores = self._clip.embed(pictures) @ self.embed(caption)
        return int(scores.argmax())

    def embed(self, caption: str) -> np.ndarray:
        """Unit embedding, float32 [channels], of a text; what is beyond CLIP's length is cut."""
        ids = torch.tensor([self._tokenizer.encode(caption).ids], device=self._texts.device)
        with torch.inference_mode():
            found = self._texts(input_ids=ids).text_embeds
            return np.asarray(torch.nn.functional.normalize(found, dim=-1)[0].cpu().numpy())
