"""LLaMA and its descendants: the settings that follow from the kind of a language model alone.

Hugging Face's configurations leave out fields at the defaults of their kind, and some settings have
no field at all. GGUF files name the kind too (Mistral's are those of LLaMA).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """One kind of language model.

    qkv_bias, qk_norm: as in `LlamaConfig`. theta: base of the rotary angles where none is stated.
    unrotated_every: each so-manieth layer has no rotary positions where no list is stated; None:
    all have. switched_window: a sliding window counts only with `use_sliding_window`. defaults:
    values of absent fields, as in transformers. pairs_adjacent: GGUF files hold the channels of a
    rotary pair beside each other.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    theta: float = 10000.0
    unrotated_every: int | None = None
    switched_window: bool = False
    defaults: Mapping[str, object] = field(default_factory=dict)
    pairs_adjacent: bool = False

    def unrotated(self, layers: int) -> tuple[int, ...]:
        """Indices of the layers without rotary positions, where no list is stated."""
        if self.unrotated_every is None:
            return ()
        return tuple(range(self.unrotated_every - 1, layers, self.unrotated_every))


# By Hugging Face's model_type.
FAMILIES = {
    "llama": Family(pairs_adjacent=True),
    "mistral": Family(defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family(
        qkv_bias=True,
        switched_window=True,
        defaults={"num_key_value_heads": 32, "sliding_window": 4096},
    ),
    "qwen3": Family(
        qk_norm=True,
        switched_window=True,
        defaults={"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
    ),
    "smollm3": Family(
        theta=2000000.0,
        unrotated_every=4,
        switched_window=True,
        defaults={"num_key_value_heads": 4, "tie_word_embeddings": True},
        pairs_adjacent=True,
    ),
}

# Architectures of GGUF files.
GGUF_ARCHITECTURES = tuple(name for name in FAMILIES if name != "mistral")
