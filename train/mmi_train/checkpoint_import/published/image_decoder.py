"""Names of the image decoder's tensors and of the model's top-level ones, published -> ours.

`RULES`: (pattern of a whole published name, replacement by our name). `DERIVED`: tensors that the
published files hold although the configuration determines them, and our buffer of the same value.
"""

from __future__ import annotations

from mmi_train.checkpoint_import.published.llm import mmfs_rules
from mmi_train.checkpoint_import.published.vision import qformer_rules

_T = r"(weight|bias)"

# Placeholder in our names for the number of the middle block, which comes after all skips.
MIDDLE = "middle"

_UNET = r"(?:time_embedding|conv_in|(?:down|up)_blocks|mid_block|conv_norm_out|conv_out)"
_SKIP = r"image_decoder\.decoder\.mmfs_module\.mmfs_down_blocks\.(\d+)\."
_MID = r"image_decoder\.decoder\.mmfs_module\.mmfs_mid_block\."
_LOOK_BACK = r"image_decoder.unet.look_back.\1."


def _of_middle_block(rules: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Turn rules of the blocks at the skip connections into those of the middle block, whose
    published name has no number: every group moves down by one."""
    return [
        (
            theirs.replace(_SKIP, _MID),
            ours.replace(r"\1", MIDDLE).replace(r"\2", r"\1").replace(r"\3", r"\2"),
        )
        for theirs, ours in rules
    ]


_SKIP_RULES = [
    *mmfs_rules(_SKIP + r"mmfs\.", _LOOK_BACK + "mmfs."),
    (_SKIP + rf"(query_norm|conv)\.{_T}", _LOOK_BACK + r"\2.\3"),
    (_SKIP + rf"feat_norm\.{_T}", _LOOK_BACK + r"value_norm.\2"),
]
_SKIP_DERIVED = [(_SKIP + "pos_embed", _LOOK_BACK + "table")]

RULES: list[tuple[str, str]] = [
    ("soi_token", "boi_embedding"),
    (rf"context_feat_proj\.{_T}", r"image_decoder.context_proj.\1"),
    (r"image_decoder\.neg_prompt_embeds", "image_decoder.null_condition"),
    *qformer_rules(r"image_decoder\.perceiver_resampler\.", "image_decoder.resampler."),
    (rf"image_decoder\.decoder\.unet\.({_UNET}\..+)", r"image_decoder.unet.\1"),
    (r"image_decoder\.decoder\.vae\.(.+)", r"image_decoder.vae.autoencoder.\1"),
    *_SKIP_RULES,
    *_of_middle_block(_SKIP_RULES),
]

DERIVED: list[tuple[str, str]] = [*_SKIP_DERIVED, *_of_middle_block(_SKIP_DERIVED)]
