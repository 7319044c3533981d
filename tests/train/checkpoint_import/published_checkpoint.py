"""A checkpoint as the published code saves one, small, and the tokenizer that belongs to it."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from export.small_models import random_model, released_reading
from mmi_deploy.spec.config import ModelConfig, TokenConfig
from mmi_train.checkpoint_import.published import published_name
from mmi_train.model.mm_interleaved import MMInterleaved

LETTERS = "▁abcdefghijklmnopqrstuvwxyz"
# In the order in which they would have been learned: the earlier, the higher the score.
WORDS = ["▁a", "▁th", "▁the", "in", "er", "on", "▁s", "at", "▁c", "▁cat", "▁sat", "▁on"]

SPECIAL, BYTES = 3, 256
# How many ids the tokenizer has without the marks for pictures.
OWN = SPECIAL + BYTES + len(WORDS) + len(LETTERS)


def sentencepiece_model(kind: int = 2) -> bytes:
    """A `tokenizer.model` like LLaMA's, with a few words. `kind` 2: byte pairs."""
    rows = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    rows += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(BYTES)]
    rows += [(text, -float(rank), 1) for rank, text in enumerate((*WORDS, *LETTERS))]

    def field(number: int, value: bytes) -> bytes:
        size = len(value)
        length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
        return bytes([number << 3 | 2]) + length + value

    def piece(text: str, score: float, kind: int) -> bytes:
        return field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind])

    pieces = b"".join(field(1, piece(*row)) for row in rows)
    trainer = field(2, bytes([0x18, kind]))
    normaliser = field(3, bytes([0x18, 1, 0x20, 0]))  # a space in front; spaces stay
    return pieces + trainer + normaliser


def config() -> ModelConfig:
    """The released reading at test size, with this tokenizer's ids."""
    reading = released_reading()
    return replace(
        reading,
        tokens=TokenConfig(bos=1, eos=2, pad=OWN - 1, boi=OWN, image=OWN + 1),
        llama=replace(reading.llama, vocab=OWN + 2),
        vision_resampler=replace(reading.vision_resampler, eps=1e-12),
    )


def model() -> MMInterleaved:
    """Random weights, none of them zero."""
    return random_model(config())


def published_state(module: MMInterleaved) -> dict[str, Tensor]:
    """The state of `module` under the published names, derived constants among them."""
    skips = len(module.image_decoder.unet.look_back) - 1
    own = {**module.state_dict(), **dict(module.named_buffers())}
    named = {published_name(name, skips): value for name, value in own.items()}
    return {name: value.clone() for name, value in named.items() if name is not None}


def write_shards(folder: Path, state: dict[str, Tensor], shards: int) -> None:
    """As Hugging Face cuts a checkpoint: shards, and an index of what lies where."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"pytorch_model-{k + 1:05}-of-{shards:05}.bin" for k in range(shards)]
    where = {name: files[index % shards] for index, name in enumerate(state)}
    for file in files:
        part = {name: value for name, value in state.items() if where[name] == file}
        torch.save(part, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
