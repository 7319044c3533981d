"""A tiny CLIP with random weights, in the folder and form of the real one."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel

from mmi_train.evaluation.metrics.clip_similarity import FOLDER

WORDS = ("[start]", "[end]", "[unk]", "a", "red", "blue", "square", "ring", "on", "white")
LENGTH = 8


def tiny_clip(weights: Path) -> Path:
    """Write CLIP into a folder of weights; pictures of 16 pixels, 8 tokens, 8 channels."""
    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    layers |= {"num_attention_heads": 2, "projection_dim": 8}
    text = {"vocab_size": len(WORDS), "max_position_embeddings": LENGTH}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(
        text_config=layers | text,
        vision_config=layers | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(weights / FOLDER)
    words = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, "[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[start] $A [end]", special_tokens=[("[start]", 0), ("[end]", 1)]
    )
    tokenizer.save(str(weights / FOLDER / "tokenizer.json"))
    return weights
