"""Names of the language model's tensors, published -> ours.

`RULES`: (pattern of a whole published name, replacement by our name). `DERIVED`: tensors that the
published files hold although the configuration determines them; the language model has none.
The null value is published as [1, 1, 1, c]; our shape is [c].

Letters: c channels.
"""

from __future__ import annotations

_T = r"(weight|bias)"


def mmfs_rules(theirs: str, ours: str) -> list[tuple[str, str]]:
    """Rules of one published MMFS module.

    theirs: a pattern that ends in a dot, with one group, the number of its block. ours: the
    replacement of that prefix, which may refer to the group.
    """
    layers = (
        ("sampling_offsets", "offset_proj"),
        ("dynamic_offset_mask", "query_proj"),
        ("attention_weights", "weight_proj"),
        ("value_proj", "value_proj"),
        ("output_proj", "output_proj"),
    )
    return [
        (theirs + "ignore_token", ours + "null_value"),
        (theirs + r"query_relpos\.weight", ours + "image_index.weight"),
        *((rf"{theirs}{old}\.{_T}", rf"{ours}{new}.\2") for old, new in layers),
    ]


_BLOCK = r"mm_decoder\.layers\.(\d+)\."
_LOOK_BACK = _BLOCK + r"llama_cross_attn\."

RULES: list[tuple[str, str]] = [
    (r"mm_decoder\.(embed_tokens|norm)\.weight", r"llm.\1.weight"),
    (
        _BLOCK + r"((?:self_attn|mlp)\.\w+_proj|(?:input|post_attention)_layernorm)\.weight",
        r"llm.layers.\1.\2.weight",
    ),
    (_LOOK_BACK + "gate", r"llm.layers.\1.look_back.gate"),
    (_LOOK_BACK + r"norm1\.weight", r"llm.layers.\1.look_back.query_norm.weight"),
    (_LOOK_BACK + r"norm2\.weight", r"llm.layers.\1.look_back.value_norm.weight"),
    *mmfs_rules(_LOOK_BACK + r"attn\.", r"llm.layers.\1.look_back.mmfs."),
    (rf"text_decoder\.(head|head_new)\.{_T}", r"head.\1.\2"),
]

DERIVED: list[tuple[str, str]] = []
