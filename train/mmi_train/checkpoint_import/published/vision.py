"""Names of the visual tokenizer's tensors, published -> ours.

`RULES`: (pattern of a whole published name, replacement by our name). `DERIVED`: tensors that the
published files hold although the configuration determines them, and our buffer of the same value.
"""

from __future__ import annotations

_T = r"(weight|bias)"

_ATTENTION = (
    ("attn.sampling_offsets", "attention.offset_proj"),
    ("attn.attention_weights", "attention.weight_proj"),
    ("attn.value_proj", "attention.value_proj"),
    ("attn.output_proj", "attention.output_proj"),
    ("query_norm", "query_norm"),
    ("feat_norm", "feature_norm"),
)
_EXTRACTOR = (
    *_ATTENTION,
    ("ffn.fc1", "ffn.fc1"),
    ("ffn.dwconv.dwconv", "ffn.conv"),
    ("ffn.fc2", "ffn.fc2"),
    ("ffn_norm", "ffn_norm"),
)
_QFORMER_LAYER = (
    ("attention.attention.query", "self_attention.query_proj"),
    ("attention.attention.key", "self_attention.key_proj"),
    ("attention.attention.value", "self_attention.value_proj"),
    ("attention.attention.q_norm", "self_attention.query_norm"),
    ("attention.attention.k_norm", "self_attention.key_norm"),
    ("attention.output.dense", "self_attention.output_proj"),
    ("attention.output.LayerNorm", "self_norm"),
    ("crossattention.attention.query", "cross_attention.query_proj"),
    ("crossattention.attention.key", "cross_attention.key_proj"),
    ("crossattention.attention.value", "cross_attention.value_proj"),
    ("crossattention.attention.q_norm", "cross_attention.query_norm"),
    ("crossattention.attention.k_norm", "cross_attention.key_norm"),
    ("crossattention.output.dense", "cross_attention.output_proj"),
    ("crossattention.output.LayerNorm", "cross_norm"),
    ("intermediate_query.dense", "fc1"),
    ("output_query.dense", "fc2"),
    ("output_query.LayerNorm", "ffn_norm"),
)


def qformer_rules(theirs: str, ours: str) -> list[tuple[str, str]]:
    """Rules of one published Q-Former; `theirs` (a pattern) and `ours` (a name) end in a dot."""
    former = theirs + r"blip2qformer\."
    return [
        (theirs + "queries", ours + "queries"),
        (former + rf"layernorm\.{_T}", ours + r"norm.\1"),
        *(
            (former + rf"encoder\.layer\.(\d+)\.{old}\.{_T}", ours + rf"layers.\1.{new}.\2")
            for old, new in _QFORMER_LAYER
        ),
    ]


# Our names of the tensors whose size depends on the image size.
POSITION_TABLE = "vision.encoder.embeddings.position_embedding.weight"
POSITION_IDS = "vision.encoder.embeddings.position_ids"

_CLIP = r"visual_tokenizer\.encoder\.vision_model\."
_BLOCK = _CLIP + r"adapter_interactions\.(\d+)\."
_OURS = r"vision.encoder.interactions.\1."

RULES: list[tuple[str, str]] = [
    (rf"visual_tokenizer\.pos_proj\.{_T}", r"vision.position_proj.\1"),
    (rf"visual_tokenizer\.pos_ln\.{_T}", r"vision.position_norm.\1"),
    (rf"visual_tokenizer\.post_ln\.{_T}", r"vision.post_norm.\1"),
    (rf"visual_tokenizer\.proj\.{_T}", r"vision.output_proj.\1"),
    (
        _CLIP + r"(embeddings\.(class_embedding|(patch|position)_embedding\.weight))",
        r"vision.encoder.\1",
    ),
    (_CLIP + rf"pre_layrnorm\.{_T}", r"vision.encoder.pre_norm.\1"),
    (_CLIP + r"encoder\.(layers\..+)", r"vision.encoder.\1"),
    (_CLIP + r"adapter_level_embed", "vision.encoder.level_embed"),
    (_CLIP + rf"adapter_up\.{_T}", r"vision.encoder.upsample.\1"),
    (_CLIP + rf"adapter_spm\.fc(\d)\.{_T}", r"vision.encoder.spatial_prior.out\1.\2"),
    (_CLIP + rf"adapter_spm\.(stem|conv\d)\.(\d)\.{_T}", r"vision.encoder.spatial_prior.\1.\2.\3"),
    (_BLOCK + r"injector\.gamma", _OURS + "injector.gamma"),
    *(
        (_BLOCK + rf"injector\.{old}\.{_T}", _OURS + rf"injector.{new}.\2")
        for old, new in _ATTENTION
    ),
    *(
        (_BLOCK + rf"extractor\.{old}\.{_T}", _OURS + rf"extractor.{new}.\2")
        for old, new in _EXTRACTOR
    ),
    *(
        (_BLOCK + rf"extra_extractors\.(\d)\.{old}\.{_T}", _OURS + rf"extra_extractors.\2.{new}.\3")
        for old, new in _EXTRACTOR
    ),
    *qformer_rules(r"visual_tokenizer\.perceiver_resampler\.", "vision.resampler."),
]

DERIVED: list[tuple[str, str]] = [
    (r"visual_tokenizer\.pos_embed", "vision.position_table"),
    (r"visual_tokenizer\.clip_mean", "vision.pixel_mean"),
    (r"visual_tokenizer\.clip_std", "vision.pixel_std"),
    (_CLIP + r"embeddings\.position_ids", POSITION_IDS),
]
