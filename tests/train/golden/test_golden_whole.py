"""Units of whole models of other sizes, written by our model in the published format.

Their weights go through the rules backwards and come back through the checker, and their outputs
come from other code than the checker's: the training forward, and generation that reads everything
anew.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmi_deploy.spec.config import ModelConfig, ResamplerConfig
from mmi_deploy.spec.presets import released_13b
from mmi_train.checkpoint_import.published import published_name
from mmi_train.golden import configs
from mmi_train.golden.__main__ import main
from mmi_train.golden.check import check_folder
from mmi_train.golden.configs import Section
from mmi_train.golden.unet import set_base_grids
from mmi_train.model.diffusion import ddim
from mmi_train.model.image_decoder import PreviousImages
from mmi_train.model.losses import text_targets
from mmi_train.model.mm_interleaved import Batch, MMInterleaved
from mmi_train.model.vae import Vae

BOS, EOS, PAD, BOI, IMAGE = 1, 2, 50, 51, 52
VOCAB = 53


def small(
    *,
    grid: int,
    levels: tuple[int, ...],
    every: int,
    widths: tuple[int, ...],
    depth: int,
    queries: int,
) -> ModelConfig:
    """The published model with small parts; pictures of 128 pixels."""
    published = released_13b()
    decoder = published.image_decoder
    mmfs = replace(published.llm_mmfs, heads=2, points=4, value_width=16, levels=levels, images=6)
    return replace(
        published,
        name="golden",
        tokens=replace(published.tokens, pad=PAD, boi=BOI, image=IMAGE),
        vision=replace(
            published.vision,
            image_size=14 * grid,
            width=24,
            layers=4,
            heads=3,
            mlp_width=20,
            prior_width=4,
            adapter_heads=3,
            position_grid=grid,
        ),
        vision_resampler=replace(
            published.vision_resampler,
            queries=queries,
            width=12,
            context_width=24,
            layers=3,
            heads=2,
            mlp_width=16,
        ),
        llama=replace(
            published.llama,
            vocab=VOCAB,
            width=32,
            layers=3,
            heads=4,
            kv_heads=4,
            mlp_width=40,
            context=96,
            mmfs_every=every,
        ),
        llm_mmfs=replace(mmfs, images_seen=5),
        image_decoder=replace(
            decoder,
            resampler=replace(
                decoder.resampler, queries=7, width=32, context_width=32, heads=4, mlp_width=24
            ),
            unet=replace(
                decoder.unet,
                latent_side=16,
                norm_groups=4,
                block_widths=widths,
                layers_per_block=depth,
                condition_width=32,
                attention_heads=(2,) * len(widths),
                attention_blocks=(True,) * (len(widths) - 1) + (False,),
            ),
            mmfs=replace(decoder.mmfs, heads=2, points=3, value_width=8, images=4),
            vae=replace(decoder.vae, block_widths=(8, 8, 8, 8), layers_per_block=1, norm_groups=4),
        ),
    )


SIZES: dict[str, dict[str, Any]] = {
    "two levels": {
        "grid": 4,
        "levels": (1, 2),
        "every": 2,
        "widths": (8, 16, 24),
        "depth": 1,
        "queries": 3,
    },
    "one level": {
        "grid": 2,
        "levels": (2,),
        "every": 1,
        "widths": (8, 8),
        "depth": 2,
        "queries": 1,
    },
    "all levels": {
        "grid": 6,
        "levels": (0, 1, 2, 3),
        "every": 3,
        "widths": (8, 8, 16, 16),
        "depth": 1,
        "queries": 2,
    },
}


def side_car(config: ModelConfig) -> dict[str, Any]:
    """`config` in the published code's terms."""
    vision, llama, decoder = config.vision, config.llama, config.image_decoder
    unet, vae, tokens = decoder.unet, decoder.vae, config.tokens
    return {
        "model": {
            "seq_len": llama.context,
            "txt_vocab_size": llama.vocab,
            "special_token_dict": {
                "pad_token_id": tokens.pad,
                "soi_token_id": tokens.boi,
                "image_token_id": tokens.image,
            },
            "visual_tokenizer_config": {"perceiver_config": perceiver(config.vision_resampler)},
            "image_decoder_config": {
                "image_size": decoder.image_size,
                "perceiver_config": perceiver(decoder.resampler),
            },
            "cross_attention_frequency": llama.mmfs_every,
            "spatial_shapes": [vision.level_sides[level] for level in config.llm_mmfs.levels],
        },
        "tiny": {
            "llama": {
                "hidden_size": llama.width,
                "intermediate_size": llama.mlp_width,
                "num_hidden_layers": llama.layers,
                "num_attention_heads": llama.heads,
                "max_position_embeddings": llama.context,
            },
            "clip": {
                "hidden_size": vision.width,
                "intermediate_size": vision.mlp_width,
                "num_hidden_layers": vision.layers,
                "num_attention_heads": vision.heads,
            },
            "unet": {
                "block_out_channels": list(unet.block_widths),
                "layers_per_block": unet.layers_per_block,
                "cross_attention_dim": unet.condition_width,
                "attention_head_dim": unet.attention_heads[0],
                "norm_num_groups": unet.norm_groups,
                "down_block_types": [
                    "CrossAttnDownBlock2D" if attends else "DownBlock2D"
                    for attends in unet.attention_blocks
                ],
            },
            "vae": {
                "block_out_channels": list(vae.block_widths),
                "layers_per_block": vae.layers_per_block,
                "norm_num_groups": vae.norm_groups,
            },
        },
    }


def perceiver(part: ResamplerConfig) -> dict[str, Any]:
    return {
        "num_queries": part.queries,
        "hidden_size": part.width,
        "encoder_hidden_size": part.context_width,
        "cross_attention_frequency": part.cross_every,
        "num_hidden_layers": part.layers,
        "num_attention_heads": part.heads,
        "qk_normalization": part.qk_norm,
        "intermediate_size": part.mlp_width,
    }


def published_state(model: MMInterleaved) -> dict[str, Tensor]:
    """The model's weights, and its derived constants, under their published names."""
    skips = len(model.image_decoder.unet.look_back) - 1
    state = {}
    for name, tensor in (*model.named_buffers(), *model.named_parameters()):
        if published := published_name(name, skips):
            state[f"state.{published}"] = tensor.detach().clone()
    return state


@pytest.fixture(scope="module", params=SIZES)
def model(request: pytest.FixtureRequest) -> MMInterleaved:
    """A model of that size with every weight away from where it starts."""
    torch.manual_seed(7)
    config = small(**SIZES[request.param])
    model = MMInterleaved(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        # Generated text shall hold no image and end nowhere, so that it can be read again whole.
        model.head.head.bias[[BOS, EOS, PAD, BOI, IMAGE]] = -1e4
    sides = config.vision.level_sides
    set_base_grids(model.image_decoder.unet, config.image_decoder.image_size, sides)
    return model


@pytest.fixture(scope="module")
def folder(model: MMInterleaved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four units of that model."""
    path = tmp_path_factory.mktemp("units")
    write_forward(path, model)
    with torch.no_grad():
        write_texts(path, model)
        write_scores(path, model)
        write_images(path, model)
    return path


def write(folder: Path, name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    whole = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    save_file(whole, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps({"config": config}))


def rows(*parts: list[int]) -> Tensor:
    """Token rows, padded on the right."""
    length = max(map(len, parts))
    return torch.tensor([part + [PAD] * (length - len(part)) for part in parts])


def image_tokens(model: MMInterleaved) -> list[int]:
    return [BOI] + [IMAGE] * model.config.visual_tokens


def images(model: MMInterleaved, count: int) -> Tensor:
    side = model.config.vision.image_size
    return torch.rand(count, 3, side, side)


def write_forward(folder: Path, model: MMInterleaved) -> None:
    """Losses of the training forward: three images in two rows, one of them without context, one
    with its condition dropped; and of fine-tuning, with prompts, a masked picture and weights."""
    image = image_tokens(model)
    ids = rows([BOS, *image, 9, 8, *image, EOS], [BOS, 7, 6, 5, *image, 4, EOS])
    pixels, targets = images(model, 3), torch.rand(3, 3, 128, 128)
    pictures, slot = torch.tensor([[0, 0], [0, 1], [1, 0]]), torch.tensor([[0, 1], [2, -1]])
    draws = replace(model.image_decoder.random_draws(3), drop=torch.tensor([0.5, 0.05, 0.7]))
    losses = model(Batch(ids, slot, pixels, pictures, target_pixels=targets), draws=draws)
    prompt, mask = torch.tensor([3, 2]), torch.tensor([1.0, 0.0, 1.0])
    masked = Batch(
        ids,
        slot,
        pixels,
        pictures,
        target_pixels=targets,
        picture_weight=mask,
        text_target=text_targets(ids, model.config.tokens, prompt=prompt),
    )
    tuned = model(masked, draws=draws, text_weight=0.25, image_weight=3.0)
    watched = {
        "soi_token": "boi_embedding",
        "visual_tokenizer.proj.weight": "vision.output_proj.weight",
        "mm_decoder.layers.0.llama_cross_attn.attn.ignore_token": (
            "llm.layers.0.look_back.mmfs.null_value"
        ),
    }
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(losses.total, [named[name] for name in watched.values()])
    write(
        folder,
        "full_forward",
        side_car(model.config),
        {
            **published_state(model),
            "in.text_ids": ids,
            "in.attention_mask": (ids != PAD).long(),
            "in.image_tensors": pixels,
            "in.image_tensors_dec": targets,
            "in.num_image_per_seq": torch.tensor([2, 1]),
            "in.nearest_bos_idxs": torch.tensor([0, 0, 0]),
            "in.rng.000_rand_like": draws.drop[:, None, None],
            "in.rng.001_randn": draws.posterior,
            "in.rng.002_randn_like": draws.noise,
            "in.rng.003_randint": draws.timestep,
            "in.ignore_prompt_token_offset": prompt,
            "in.image_loss_mask_sft": mask,
            "in.loss_txt_weight_sft": torch.tensor(0.25),
            "in.loss_img_weight_sft": torch.tensor(3.0),
            "out.gt_text_ids_offset": masked.text_target,
            "out.loss_sft": tuned.total,
            "out.loss_txt_sft": tuned.text,
            "out.loss_img_sft": tuned.image,
            "out.loss_mmc4": losses.total,
            "out.loss_txt_mmc4": losses.text,
            "out.loss_img_mmc4": losses.image,
            **{f"out.grad.{name}": value for name, value in zip(watched, gradients, strict=True)},
        },
    )


def write_texts(folder: Path, model: MMInterleaved) -> None:
    """Greedy text, for every token a new reading of the whole row; one row is shorter."""
    image, steps = image_tokens(model), 5
    prompts = [[BOS, 9, *image, 8, *image, 7], [BOS, 5, *image]]
    pixels = images(model, 3)
    encoded = model.encode_images(pixels)
    chosen = []
    for prompt, slot in zip(prompts, ([[0, 1]], [[2]]), strict=True):
        ids = list(prompt)
        for _ in range(steps):
            hidden = model.read(torch.tensor([ids]), encoded, torch.tensor(slot))
            ids.append(int(model.head(hidden[0, -1]).argmax()))
        chosen.append([BOS, *ids[len(prompt) :]])
    length = max(map(len, prompts))
    padded = torch.tensor([[PAD] * (length - len(prompt)) + prompt for prompt in prompts])
    write(
        folder,
        "full_generate_texts_beam1",
        {"num_beams": 1, "max_new_tokens": steps, "min_length": 0, "do_sample": False},
        {
            "in.text_ids": padded,
            "in.attention_mask": (padded != PAD).long(),
            "in.image_tensors": pixels,
            "in.num_image_per_seq": torch.tensor([2, 1]),
            "out.text_ids": torch.tensor(chosen),
        },
    )


def write_scores(folder: Path, model: MMInterleaved) -> None:
    """Each option scored on its own, without padding."""
    prompt, options = [BOS, *image_tokens(model), 9], [[3, 4, 5], [6, 7], [8]]
    pixels = images(model, 1)
    encoded, slot = model.encode_images(pixels), torch.zeros(1, 1, dtype=torch.int64)
    scores = []
    for option in options:
        hidden = model.read(torch.tensor([prompt + option]), encoded, slot)
        chances = model.head(hidden[0, len(prompt) - 1 : -1]).log_softmax(-1)
        scores.append(chances[range(len(option)), option].sum())
    padded = rows(*options)
    write(
        folder,
        "full_generate_scores",
        {},
        {
            "in.text_ids": torch.tensor(prompt),
            "in.image_tensors": pixels,
            "in.options_ids": padded,
            "in.options_attn_mask": (padded != PAD).long(),
            "out.scores": torch.stack(scores)[None, None],
        },
    )


def write_images(folder: Path, model: MMInterleaved) -> None:
    """The second picture of a row, drawn with noise, decoded by another VAE than the model's."""
    decoder, image = model.image_decoder, image_tokens(model)
    ids, pixels = torch.tensor([[BOS, 9, *image, 8, *image]]), images(model, 2)
    encoded = model.encode_images(pixels)
    slot = torch.tensor([[0, 1]])
    layout = model.picture_layout(ids, slot, torch.tensor([[0, 1]]))
    condition = model.condition(model.read(ids, encoded, slot), layout)
    only = PreviousImages(encoded.features[:1], torch.zeros(1, 1).int(), torch.ones(1, 1).int())
    start, *noise = torch.randn(3, 1, *decoder.latent_shape)
    scheduler = ddim(decoder.config.diffusion)
    scheduler.set_timesteps(2)
    latents = decoder.draw(condition, only, start, scheduler, guidance=3.0, step_noise=noise)
    disk = Vae(decoder.config.vae).eval()
    part = "image_decoder.decoder.vae."
    state = {}
    for name, value in disk.state_dict().items():
        published = published_name(f"image_decoder.vae.{name}")
        assert published is not None
        state["state.disk_vae." + published.removeprefix(part)] = value
    write(
        folder,
        "full_generate_images",
        {"num_inference_steps": 2, "guidance_scale": 3.0, "image_size": 128},
        {
            **state,
            "in.text_ids": ids,
            "in.image_tensors": pixels,
            "in.target_image_idxs": torch.tensor([1]),
            "in.initial_latents": start,
            "in.step_noise.0": noise[0],
            "in.step_noise.1": noise[1],
            "out.latents.1": latents,
            "out.timesteps": torch.tensor([501, 1]),
            "out.image": disk.decode(latents),
        },
    )


def test_the_configuration_is_read_back(model: MMInterleaved):
    state = {name.removeprefix("state."): value for name, value in published_state(model).items()}
    read = configs.model(Section(side_car(model.config)), state, model.config.vision.image_size)
    assert read == replace(model.config, name=read.name)


def test_whole_models_of_other_sizes_pass(folder: Path):
    report = check_folder(folder)
    assert not report.broken
    assert [line for line in report.lines if line.verdict != "pass"] == []
    assert len(report.lines) == 6 + 4 + 1 + 1 + 3


@pytest.mark.parametrize("model", ["one level"], indirect=True)
def test_generation_without_the_whole_models_weights(folder: Path, tmp_path: Path, capsys):
    for path in folder.iterdir():
        if not path.name.startswith("full_forward."):
            shutil.copy(path, tmp_path)
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("give the folder that holds it with --weights") == 3
    assert main([str(tmp_path), "--weights", str(folder)]) == 0


@pytest.mark.parametrize("model", ["one level"], indirect=True)
def test_a_missing_weight_of_the_whole_model_is_named(folder: Path, tmp_path: Path, capsys):
    for path in folder.glob("full_forward.*"):
        shutil.copy(path, tmp_path)
    tensors = load_file(tmp_path / "full_forward.safetensors")
    lacking = "image_decoder.decoder.mmfs_module.mmfs_mid_block.pos_embed"
    del tensors[f"state.{lacking}"]
    save_file(tensors, tmp_path / "full_forward.safetensors")
    assert main([str(tmp_path)]) == 1
    assert f"missing: {lacking}" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["two levels"], indirect=True)
def test_a_wrong_gradient_fails(folder: Path, tmp_path: Path):
    """Allowing for cell borders must not let an error of one per cent through."""
    for path in folder.glob("full_forward.*"):
        shutil.copy(path, tmp_path)
    tensors = load_file(tmp_path / "full_forward.safetensors")
    tensors["out.grad.soi_token"] *= 1.01
    save_file(tensors, tmp_path / "full_forward.safetensors")
    failed = [line.tensor for line in check_folder(tmp_path).lines if line.verdict == "FAIL"]
    assert failed == ["grad.soi_token"]


@pytest.mark.parametrize("model", ["one level"], indirect=True)
@pytest.mark.parametrize(
    ("name", "change", "failing"),
    [
        ("ignore_prompt_token_offset", 1, {"gt_text_ids_offset", "loss_sft", "loss_txt_sft"}),
        ("image_loss_mask_sft", 0.5, {"loss_sft", "loss_img_sft"}),
        ("loss_txt_weight_sft", 0.5, {"loss_sft"}),
        ("loss_img_weight_sft", -3.0, {"loss_sft"}),
    ],
)
def test_what_a_call_gives_changes_its_own_losses_alone(
    folder: Path, tmp_path: Path, name: str, change: float, failing: set[str]
):
    """Those of the other run in the same file, with the configuration's weights, stay."""
    for path in folder.glob("full_forward.*"):
        shutil.copy(path, tmp_path)
    tensors = load_file(tmp_path / "full_forward.safetensors")
    tensors[f"in.{name}"] += change
    save_file(tensors, tmp_path / "full_forward.safetensors")
    failed = {line.tensor for line in check_folder(tmp_path).lines if line.verdict == "FAIL"}
    assert failed == failing


@pytest.mark.parametrize("model", ["one level"], indirect=True)
@pytest.mark.parametrize("name", ["ignore_prompt_token_offset", "image_loss_mask_sft"])
def test_a_number_too_many_is_said(folder: Path, tmp_path: Path, capsys, name: str):
    for path in folder.glob("full_forward.*"):
        shutil.copy(path, tmp_path)
    tensors = load_file(tmp_path / "full_forward.safetensors")
    tensors[f"in.{name}"] = torch.ones(7).to(tensors[f"in.{name}"].dtype)
    save_file(tensors, tmp_path / "full_forward.safetensors")
    assert main([str(tmp_path)]) == 1
    assert f"in.{name.removesuffix('_sft')} does not fit" in capsys.readouterr().out
