"""Configurations of the released reading that `mmi bench` can measure."""

from __future__ import annotations

import pytest

from mmi_bench.compare.released_reading import Size, released_reading
from mmi_deploy.spec.presets import released_13b


@pytest.mark.parametrize("size", ["small", "large"])
def test_each_size_keeps_the_released_reading(size: Size) -> None:
    config, released = released_reading(size), released_13b()
    assert config.vision_resampler.form == config.image_decoder.resampler.form == "qformer"
    assert config.image_decoder.unet.mmfs_at == "skips"
    assert config.llm_mmfs.null_slot and config.image_decoder.mmfs.null_slot
    assert config.image_decoder.mmfs.images_seen == released.image_decoder.mmfs.images_seen == 1
    assert config.vision.layers == 24
    # The CPU and CUDA kernels take multiples of 8 channels per head, up to 128.
    for mmfs in (config.llm_mmfs, config.image_decoder.mmfs):
        channels = mmfs.value_width // mmfs.heads
        assert channels % 8 == 0 and channels <= 128


def test_sizes_are_those_of_the_documentation() -> None:
    small, large = released_reading("small"), released_reading("large")
    assert (small.llama.width, small.llama.layers, small.vision.width) == (128, 6, 128)
    assert (large.llama.width, large.llama.layers, large.vision.width) == (1024, 8, 512)
