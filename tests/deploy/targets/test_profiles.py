"""Profiles come from the contract: prefill and decode of one engine, guidance's doubled batch."""

from __future__ import annotations

import pytest

from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.spec.graphs import Limits, graphs
from mmi_deploy.spec.presets import PRESETS, preset, tiny
from mmi_deploy.targets.profiles import DECODE, DEFAULT, PREFILL, choose, profiles

LIMITS = Limits(context=512)
GRAPHS = graphs(tiny(), LIMITS)


@pytest.mark.parametrize("name", PRESETS)
def test_every_dynamic_input_of_every_graph_has_ordered_shapes(name: str) -> None:
    for graph in graphs(preset(name), LIMITS).values():
        for profile in profiles(graph):
            dynamic = {
                tensor.name
                for tensor in graph.inputs
                if any(isinstance(side, str) for side in tensor.shape)
            }
            assert set(profile.shapes) == dynamic, graph.name
            for least, likely, greatest in profile.shapes.values():
                sides = zip(least, likely, greatest, strict=True)
                assert all(1 <= a <= b <= c for a, b, c in sides), (graph.name, profile.name)


def test_llm_has_a_profile_for_prompts_and_one_for_single_tokens() -> None:
    prefill, decode = profiles(GRAPHS["llm"])
    assert (prefill.name, decode.name) == (PREFILL, DECODE)
    assert prefill.shapes["token_ids"] == ((1, 1), (1, 256), (8, 512))
    assert decode.shapes["token_ids"] == ((1, 1), (1, 1), (8, 1))
    assert decode.shapes["logit_index"] == ((1, 1), (1, 1), (8, 1))
    assert prefill.shapes["logit_index"] == decode.shapes["logit_index"], "the last token's alone"
    assert decode.shapes["past_key.00"] == prefill.shapes["past_key.00"]
    assert [profile.name for profile in profiles(GRAPHS["vae_decoder"])] == [DEFAULT]


def test_a_short_context_cuts_the_likely_prompt() -> None:
    prefill, _ = profiles(graphs(tiny(), Limits(context=100))["llm"])
    assert prefill.shapes["token_ids"] == ((1, 1), (1, 100), (8, 100))


def test_every_row_of_a_step_is_a_picture() -> None:
    (profile,) = profiles(GRAPHS["denoise_step"])
    for name in ("latents", "history", "step", "guidance", "condition_key.00"):
        assert [shape[0] for shape in profile.shapes[name]] == [1, 1, 8]


def test_narrower_limits_cut_rows_images_and_the_pool() -> None:
    narrow = Limits(context=512, batch=2, images=3, pool=6)
    prefill, decode = profiles(GRAPHS["llm"], narrow)
    for profile in (prefill, decode):
        assert profile.ranges["b"].max == 2
        assert profile.ranges["n"].max == 6 and profile.ranges["m"].max == 3
        assert profile.ranges["m"].opt == 3
    (encoder,) = profiles(GRAPHS["vision_encoder"], narrow)
    assert encoder.ranges["n"].max == 2, "here n is the batch"


def test_one_row_is_a_static_shape() -> None:
    """Static shapes of the image graphs, but for sizes that vary within a document."""
    one = Limits(context=512, batch=1)
    dynamic = {
        "vision_encoder": set(),
        "llm_values": set(),
        "image_condition": {"x"},
        "unet_values": set(),
        "denoise_step": {"steps", "n", "m"},
        "denoise_shallow": {"steps", "n", "m"},
        "vae_decoder": set(),
    }
    for name, letters in dynamic.items():
        (profile,) = profiles(GRAPHS[name], one)
        found = {letter for letter, size in profile.ranges.items() if size.min != size.max}
        assert found == letters, name


def test_limits_below_the_least_are_refused() -> None:
    with pytest.raises(ConfigError, match="llm takes no fewer than 1 for b; got 0"):
        profiles(GRAPHS["llm"], Limits(context=512, batch=0))


def test_the_narrowest_profile_that_holds_a_request_is_chosen() -> None:
    offered = profiles(GRAPHS["llm"])
    sizes = {"b": 2, "t": 1, "w": 1, "v": 1, "n": 1, "m": 1}
    assert offered[choose(offered, "llm", sizes)].name == DECODE
    assert offered[choose(offered, "llm", {**sizes, "t": 2})].name == PREFILL
    assert offered[choose(offered, "llm", {**sizes, "t": 512})].name == PREFILL


@pytest.mark.parametrize(
    ("letter", "size", "line"),
    [
        ("b", 9, r"takes b = 9; expected 1 to 8\. .*mmi build --rows"),
        ("n", 199, r"takes n = 199; expected 1 to 128\. .*mmi build --max-images"),
        ("t", 513, r"takes t = 513; expected 1 to 512\. .*mmi build --graph llm"),
    ],
)
def test_a_request_that_no_profile_holds_is_refused_with_the_fix(
    letter: str, size: int, line: str
) -> None:
    offered = profiles(GRAPHS["llm"])
    sizes = {"b": 1, "t": 2, "w": 1, "v": 1, "n": 1, "m": 1}
    with pytest.raises(EngineError, match=line):
        choose(offered, "llm", {**sizes, letter: size})
