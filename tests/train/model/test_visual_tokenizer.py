"""The visual tokenizer: against the published code, transformers' CLIP and plain formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import ResamplerConfig, VisionConfig
from mmi_deploy.spec.presets import paper_13b, tiny
from mmi_train.checkpoint_import.published import DerivedConstant, rename
from mmi_train.model.interactions import DeformableAttention
from mmi_train.model.positions import resize_table, table_1d, table_2d
from mmi_train.model.spatial_prior import map_to_tokens
from mmi_train.model.visual_tokenizer import VisualTokenizer, flatten_maps
from mmi_train.model.vit_adapter import VitAdapter, resize_positions

SMALL = VisionConfig(
    image_size=56,
    patch_size=14,
    width=32,
    layers=4,
    heads=2,
    mlp_width=48,
    prior_width=8,
    adapter_heads=2,
    adapter_points=3,
    position_grid=16,
)
RESAMPLER = ResamplerConfig(
    form="perceiver", queries=4, width=24, context_width=32, layers=1, heads=2, mlp_width=32
)


@pytest.fixture(scope="module")
def run(published):
    """The published run `visual_tokenizer_224`: our model with its weights, and its tensors."""
    tensors, about = published("visual_tokenizer_224")
    clip, former = about["clip"], about["perceiver"]
    vision = VisionConfig(
        image_size=clip["image_size"],
        patch_size=clip["patch_size"],
        width=clip["hidden_size"],
        layers=clip["num_hidden_layers"],
        heads=clip["num_attention_heads"],
        mlp_width=clip["intermediate_size"],
        activation=clip["hidden_act"],
        adapter_heads=4,
    )
    resampler = ResamplerConfig(
        form="qformer",
        queries=former["num_queries"],
        width=former["hidden_size"],
        context_width=former["encoder_hidden_size"],
        layers=former["num_hidden_layers"],
        heads=former["num_attention_heads"],
        mlp_width=former["intermediate_size"],
        cross_every=former["cross_attention_frequency"],
        qk_norm=former["qk_normalization"],
    )
    model = VisualTokenizer(vision, resampler, about["llm_hidden_size"]).eval()
    state, derived = {}, {}
    for name, tensor in tensors.items():
        if name.startswith("state."):
            ours = rename("visual_tokenizer." + name.removeprefix("state."))
            if isinstance(ours, DerivedConstant):
                derived[ours.buffer.removeprefix("vision.")] = tensor
            else:
                state[ours.removeprefix("vision.")] = tensor
    model.load_state_dict(state)
    return model, tensors, derived


def test_published_run_agrees_at_every_recorded_place(run, agree):
    model, tensors, _ = run
    seen: dict[str, torch.Tensor] = {}

    def watch(module: nn.Module, keep) -> None:
        module.register_forward_hook(lambda _, inputs, output: seen.update(keep(output)))

    encoder = model.encoder
    watch(encoder.spatial_prior, lambda out: {"spm_c4": map_to_tokens(out[3])})
    for k, stage in enumerate(encoder.interactions):
        names = [f"inter{k}_{part}" for part in ("cls", "x", "c")]
        watch(stage, lambda out, names=names: dict(zip(names, out, strict=True)))
    watch(encoder, lambda out: {"image_embeds": (out[0] + model.token_positions)[:, 1:]})
    with torch.no_grad():
        tokens, maps = model(tensors["in.image"])
    seen["vis_embed"] = tokens
    seen |= {f"ms{level}": level_map for level, level_map in enumerate(maps)}
    expected = {name: x for name, x in tensors.items() if name.startswith("out.")}
    assert len(expected) == 11
    for name, value in expected.items():
        agree(seen[name.removeprefix("out.")], value, 1e-5)


def test_published_constants_follow_from_the_configuration(run, agree):
    model, _, derived = run
    buffers = dict(model.named_buffers())
    position_ids = "encoder.embeddings.position_ids"
    assert set(derived) == {"position_table", "pixel_mean", "pixel_std", position_ids}
    for name, value in derived.items():
        agree(buffers[name], value, 1e-6)


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.75, as PyTorch and OpenCV have it."""
    a, x = -0.75, np.abs(x)
    inner = (a + 2) * x**3 - (a + 3) * x**2 + 1
    outer = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, inner, np.where(x < 2, outer, 0))


def bicubic(table: np.ndarray, side: int, align_corners: bool) -> np.ndarray:
    """[s * s, c] -> [side * side, c] in float64; cells beyond the edge repeat it."""
    old = round(len(table) ** 0.5)
    place = np.arange(side) * (old - 1) / (side - 1)
    if not align_corners:
        place = (np.arange(side) + 0.5) * old / side - 0.5
    matrix = np.zeros((side, old))
    for row, x in enumerate(place):
        for cell in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            matrix[row, np.clip(cell, 0, old - 1)] += cubic(np.array(x - cell))
    grid = table.reshape(old, old, -1)
    return np.einsum("yi,xj,ijc->yxc", matrix, matrix, grid).reshape(side * side, -1)


@pytest.mark.parametrize("side", [3, 8, 12])
@pytest.mark.parametrize("align_corners", [False, True])
def test_resize_table_is_bicubic_without_antialiasing(agree, side, align_corners):
    table = torch.randn(25, 6, generator=torch.Generator().manual_seed(0))
    expected = bicubic(table.double().numpy(), side, align_corners)
    agree(resize_table(table, side, align_corners), expected, 1e-5)


def test_position_tables_are_sines_then_cosines(agree):
    table = table_1d(5, 8)
    for position in range(5):
        angles = [position / 10000 ** (2 * i / 8) for i in range(4)]
        agree(table[position], [*np.sin(angles), *np.cos(angles)], 1e-6)
    row, column = table_1d(3, 4)[2], table_1d(3, 4)[1]
    agree(table_2d(3, 8).view(3, 3, 8)[2, 1], torch.cat([row, column]), 1e-6)
    fine, coarse = table_2d(4, 8).view(4, 4, 8), table_2d(2, 8, cells=4).view(2, 2, 8)
    assert ((coarse[0, 0] - fine[:2, :2].mean((0, 1))).abs() < 0.15).all()
    assert torch.equal(table_2d(4, 8, cells=4), fine.flatten(0, 1))


def test_weights_of_224_pixels_serve_448(agree):
    model = VisualTokenizer(replace(SMALL, image_size=224), RESAMPLER, 16)
    larger = VisualTokenizer(replace(SMALL, image_size=448), RESAMPLER, 16).eval()
    state = model.state_dict()
    name = "encoder.embeddings.position_embedding.weight"
    table = state[name].normal_(generator=torch.Generator().manual_seed(0)).clone()
    larger.load_state_dict(state | {name: resize_positions(table, larger.config.grid)})
    loaded = larger.state_dict()[name]
    assert loaded.shape == (1 + 32 * 32, 32)
    agree(loaded[0], table[0], 0)
    agree(loaded[1:], bicubic(table[1:].double().numpy(), 32, align_corners=True), 1e-5)
    sin_cos = bicubic(table_2d(16, 32).double().numpy(), 32, align_corners=False)
    agree(larger.token_positions[1:], sin_cos, 1e-5)
    assert larger.config.level_sides == (128, 64, 32, 16)
    with torch.no_grad():
        tokens, maps = larger(torch.rand(1, 3, 448, 448))
    assert tokens.shape == (1, 4, 16) and tokens.isfinite().all()
    assert [level.shape[2:] for level in maps] == [(s, s) for s in larger.config.level_sides]


def test_before_training_the_patch_tokens_are_those_of_clip(agree):
    """The injectors' gamma is 0, so CLIP's layers run as in CLIP, all but its last norm."""
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        )
    ).eval()
    ours = VitAdapter(SMALL).eval()
    theirs = {
        name.removeprefix("vision_model.").replace("encoder.layers", "layers"): value
        for name, value in clip.state_dict().items()
    }
    theirs = {name.replace("pre_layrnorm", "pre_norm"): x for name, x in theirs.items()}
    left_over = ours.load_state_dict(theirs, strict=False).unexpected_keys
    assert {name.split(".")[0] for name in left_over} == {"post_layernorm"}
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = clip(pixels, output_hidden_states=True).hidden_states[-1]
        agree(ours(pixels)[0], expected, 1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 6, "interactions": 2},
        {"layers": 1, "interactions": 1, "width": 48},
        {"layers": 3, "interactions": 3, "image_size": 28},
        {"layers": 8, "activation": "gelu", "adapter_value_ratio": 1.0, "position_grid": 4},
    ],
)
def test_other_sizes_build_and_run(changes):
    vision = replace(SMALL, **changes)
    resampler = replace(RESAMPLER, context_width=vision.width)
    model = VisualTokenizer(vision, resampler, 16).eval()
    side = vision.image_size
    with torch.no_grad():
        tokens, maps = model(torch.rand(3, 3, side, side))
    assert tokens.shape == (3, 4, 16)
    assert [tuple(x.shape) for x in maps] == [(3, vision.width, s, s) for s in vision.level_sides]
    assert tokens.isfinite().all() and all(level.isfinite().all() for level in maps)


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="multiple of 28 pixels; got 60 pixels"):
        VitAdapter(replace(SMALL, image_size=60))
    with pytest.raises(ConfigError, match="even number of patches"):
        VitAdapter(replace(SMALL, image_size=42))
    with pytest.raises(ConfigError, match="multiple of 4; got 6"):
        VitAdapter(replace(SMALL, layers=6))


def test_sampling_starts_as_deformable_detrs_ring(agree):
    attention = DeformableAttention(32, heads=4, points=2, ratio=0.5, level_sides=(4, 2))
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    offsets = attention.offset_proj(torch.randn(3, 32)).view(3, 4, 2, 2, 2)  # [b, h, l, p, xy]
    for level in range(2):
        for point in range(2):
            expected = ((point + 1) * directions).expand(3, -1, -1)
            agree(offsets[:, :, level, point], expected, 1e-6)


def test_flatten_maps_runs_level_after_level_and_row_major():
    maps = [torch.arange(s * s).view(1, 1, s, s) + 100 * level for level, s in enumerate((3, 2))]
    assert flatten_maps(tuple(maps))[0, :, 0].tolist() == [*range(9), *range(100, 104)]


@pytest.fixture
def trained():
    """The tiny preset moved off its start, where gradients do not reach everything yet."""
    torch.manual_seed(0)
    config = tiny()
    model = VisualTokenizer(config.vision, config.vision_resampler, config.llama.width).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.03)
        for stage in model.encoder.interactions:
            stage.injector.gamma.fill_(0.3)
    return model, torch.rand(2, 3, config.vision.image_size, config.vision.image_size)


def loss_of(model: VisualTokenizer, pixels: torch.Tensor) -> torch.Tensor:
    tokens, maps = model(pixels)
    weight = torch.linspace(-1, 1, tokens.numel()).view_as(tokens)
    return (tokens.float() * weight).sum() + flatten_maps(maps).float().square().mean()


def gradients(model: VisualTokenizer, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model, pixels).backward()
    return {name: x.grad.clone() for name, x in model.named_parameters()}


def test_training_in_bf16_reaches_every_parameter(trained, agree):
    model, pixels = trained
    full = gradients(model, pixels)
    with torch.autocast("cpu", torch.bfloat16):
        half = gradients(model, pixels)
        tokens, maps = model(pixels)
    assert maps[0].dtype == torch.bfloat16
    exact_tokens, exact_maps = model(pixels)
    agree(tokens.float(), exact_tokens, 0.05)
    agree(flatten_maps(maps).float(), flatten_maps(exact_maps), 0.05)
    for name, gradient in full.items():
        assert gradient.isfinite().all() and half[name].isfinite().all(), name
        if not name.endswith("k_proj.bias"):  # softmax does not see it
            assert gradient.abs().max() > 1e-9, name
            cosine = nn.functional.cosine_similarity(gradient.flatten(), half[name].flatten(), 0)
            assert cosine > 0.8, (name, float(cosine))


def test_gradient_checkpointing_changes_no_gradient(trained, agree):
    model, pixels = trained
    plain = gradients(model, pixels)
    model.encoder.gradient_checkpointing = True
    for name, gradient in gradients(model, pixels).items():
        agree(gradient, plain[name], 1e-5)


def test_constants_hold_numbers_even_when_built_without_weights():
    with torch.device("meta"):
        config = paper_13b()
        model = VisualTokenizer(config.vision, config.vision_resampler, config.llama.width)
    assert all(parameter.is_meta for parameter in model.parameters())
    own = {name: x for name, x in model.named_buffers() if "position_ids" not in name}
    assert len(own) >= 8 and not any(buffer.is_meta for buffer in own.values())
    assert model.token_positions.shape == (257, 1024)
