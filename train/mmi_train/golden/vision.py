"""Check of the visual tokenizer: units `visual_tokenizer`.

Letters: n encoded images, c channels, g patches per side.
"""

from __future__ import annotations

from mmi_train.checkpoint_import.state_dict import published_module
from mmi_train.golden import configs
from mmi_train.golden.compare import Checks
from mmi_train.golden.configs import PUBLISHED, Section
from mmi_train.golden.hooks import recorded
from mmi_train.golden.units import Unit
from mmi_train.model.spatial_prior import map_to_tokens
from mmi_train.model.visual_tokenizer import VisualTokenizer


def check(unit: Unit, checks: Checks) -> None:
    """Run the visual tokenizer of a unit and compare its outputs and intermediate tokens."""
    config = Section(unit.config)
    pixels = unit.input("image")  # [n, 3, side, side]
    clip = config.section("clip")
    vision = configs.vision(clip, pixels.shape[-1], unit.state)
    resampler = configs.qformer(config.section("perceiver"), PUBLISHED.vision_resampler, unit.state)
    width = config.count("llm_hidden_size", PUBLISHED.llama.width)
    model = published_module(
        lambda: VisualTokenizer(vision, resampler, width),
        unit.state,
        theirs="visual_tokenizer.",
        ours="vision.",
    )
    encoder = model.encoder
    parts = {"encoder": encoder, "prior": encoder.spatial_prior}
    parts |= {f"inter{index}": stage for index, stage in enumerate(encoder.interactions)}
    with recorded(parts) as flow:
        features = model(pixels)
    checks.compare("vis_embed", features.tokens)
    for level, feature_map in enumerate(features.maps):
        checks.compare(f"ms{level}", feature_map)
    hidden = flow["encoder"][1][0] + model.token_positions  # [n, 1 + g * g, c]
    checks.compare("image_embeds", hidden[:, 1:])
    for level, prior in enumerate(flow["prior"][1], start=1):
        checks.compare(f"spm_c{level}", prior if level == 1 else map_to_tokens(prior))
    for index in range(len(encoder.interactions)):
        class_token, patches, pyramid = flow[f"inter{index}"][1]
        checks.compare(f"inter{index}_cls", class_token)
        checks.compare(f"inter{index}_x", patches)
        checks.compare(f"inter{index}_c", pyramid)
