"""Inputs of the operator `mmi::MultiImageDeformableAttention`, version 1: names, axes and types.

Letters: b batch, q queries, m image slots, l levels, h heads, p points, d channels per head,
n encoded images, s feature cells, r table rows.
"""

from __future__ import annotations

# Inputs in order, one letter per axis; `*` is 1 (shared by all queries) or q.
INPUT_SHAPES = {
    "value": "nshd",
    "image_slot": "bm",
    "offsets": "bqhp2",
    "logits": "bqhlp",
    "offset_table": "rhp2",
    "logit_table": "rhlp",
    "image_position": "b*m",
    "reference": "*2",
    "null_value": "hd",
}

# Inputs of the operator's own type T: float32, float16 or bfloat16.
NARROW_INPUTS = ("value", "offsets", "logits")

# Limits of every kernel: 1..4 levels, 1..16 points, multiples of 8 up to 128 channels per head.
MAX_LEVELS, MAX_POINTS, MAX_CHANNELS, CHANNEL_STEP = 4, 16, 128, 8

# Inputs of type int32.
INDEX_INPUTS = ("image_slot", "image_position")

# Positions of the inputs that are float32 for every T: they are small, and rounding them would
# change sampling locations and weights.
FLOAT32_INPUTS = tuple(
    position
    for position, name in enumerate(INPUT_SHAPES)
    if name not in NARROW_INPUTS and name not in INDEX_INPUTS
)
