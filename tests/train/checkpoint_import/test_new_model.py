"""`mmi init`: a model around trained parts computes what the parts computed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from mmi_deploy.cli.app import run
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import ModelConfig, read_config
from mmi_deploy.spec.presets import preset as preset_called
from mmi_deploy.spec.presets import released_13b
from mmi_train.checkpoint_import import from_diffusion
from mmi_train.checkpoint_import.fresh import fresh_tensors
from mmi_train.checkpoint_import.from_gguf import read_gguf
from mmi_train.checkpoint_import.published import rename
from mmi_train.checkpoint_import.sentencepiece_model import read_pieces
from mmi_train.checkpoint_import.tokenizer_files import read_tokenizer
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.weights import lazy_tensor
from mmi_train.weights.model_folder import CONFIG, TOKENIZER, load_model
from train import small_parts as parts

TEXT = "the cat sat at 42 caf\u00e9s \U0001f408 <|im_end|>\n  the end"
NEW_TOKENS = ("<|beginofimage|>", "<|image|>", "<|pad|>")

Init = Callable[..., tuple[int, str]]


@pytest.fixture
def init(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Init:
    """Runs `mmi init` as users do; returns its exit code and what it said on stderr."""

    def call(llm: Path, *options: object) -> tuple[int, str]:
        arguments = ["init", "-o", str(tmp_path / "out"), "--llm", str(llm), *map(str, options)]
        code = run(arguments)
        return code, capsys.readouterr().err

    return call


def built(init: Init, llm: Path, out: Path, *options: object) -> MMInterleaved:
    code, said = init(llm, *options)
    assert code == 0, said
    return load_model(out)


def refused(init: Init, llm: Path, *expected: str, options: tuple[object, ...] = ()) -> None:
    code, said = init(llm, *options)
    last = said.strip().splitlines()[-1]
    assert code == 2 and last.startswith("mmi: "), said
    for text in expected:
        assert text in last
    out = llm.parent / "out"
    assert not out.exists() and not list(llm.parent.glob(".out*"))


def text_logits(model: MMInterleaved, ids: list[int]) -> Tensor:
    """[t, vocabulary] of a text without images."""
    row = torch.tensor([ids])
    with torch.no_grad():
        hidden = model.read(row, model.encode_images(None), torch.full((1, 1), -1))
        return model.head(hidden)[0]


def assert_same_text(model: MMInterleaved, theirs: LlamaForCausalLM, folder: Path) -> None:
    """Same ids, same logits for the words it knew; the new tokens as unlikely as published."""
    tokenizer = Tokenizer.open(folder / TOKENIZER, model.config.tokens)
    ids = tokenizer.encode(TEXT)
    assert ids == parts.byte_tokenizer_ids(TEXT)
    assert tokenizer.decode(ids) == TEXT
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits[0]
    logits = text_logits(model, ids)
    assert logits.shape == (len(ids), parts.KNOWN + len(NEW_TOKENS))
    assert torch.allclose(logits[:, : parts.KNOWN], wanted[:, : parts.KNOWN], atol=2e-5)
    assert torch.equal(logits[0, parts.KNOWN :], torch.tensor([-5.0, -5.0, -100.0]))


@pytest.mark.parametrize("tied", [False, True])
def test_a_hugging_face_folder_writes_as_before(init, tmp_path, tied):
    theirs = parts.llama(tied)
    folder = parts.write_llama(tmp_path / "llama", theirs)
    assert len(list(folder.glob("*.safetensors"))) > 1
    model = built(init, folder, tmp_path / "out")
    assert_same_text(model, theirs, tmp_path / "out")
    llama, tokens = model.config.llama, model.config.tokens
    assert (llama.kv_heads, llama.rope_theta, llama.eps, llama.context) == (2, 50000.0, 1e-5, 96)
    new = (tokens.boi, tokens.image, tokens.pad)
    assert new == (parts.KNOWN, parts.KNOWN + 1, parts.KNOWN + 2)
    assert (tokens.bos, tokens.eos) == (1, 2)
    rows = model.llm.embed_tokens.weight[parts.KNOWN :]
    assert rows.std().item() == pytest.approx(0.02, rel=0.15)


F32, F16, BF16, Q8, Q4 = (
    getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "F16", "BF16", "Q8_0", "Q4_K")
)


@pytest.mark.parametrize(
    ("kind", "tied"), [(F32, False), (F16, True), (BF16, False), (Q8, True), (Q4, False)]
)
def test_a_gguf_file_writes_as_in_transformers(init, tmp_path, kind, tied):
    """transformers reads GGUF on its own: dequantised, rows in Hugging Face's order."""
    path = parts.write_gguf(tmp_path / "llama.gguf", parts.llama(tied), kind)
    theirs = LlamaForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).eval()
    model = built(init, path, tmp_path / "out")
    assert_same_text(model, theirs, tmp_path / "out")


def test_f32_gguf_and_folder_are_the_same_model(init, tmp_path):
    theirs = parts.llama()
    a = built(init, parts.write_llama(tmp_path / "llama", theirs), tmp_path / "out")
    b = built(init, parts.write_gguf(tmp_path / "x.gguf", theirs), tmp_path / "out")
    ours, other = a.state_dict(), b.state_dict()
    assert all(torch.equal(ours[name], other[name]) for name in ours)
    assert a.config == b.config


def test_rows_are_dequantised_in_pieces_as_in_one(tmp_path, monkeypatch):

    model = read_gguf(parts.write_gguf(tmp_path / "x.gguf", parts.llama(), Q8))
    monkeypatch.setattr(lazy_tensor, "PIECE_BYTES", 5000)
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"):
        pieces = list(model.tensors[name].pieces())
        assert len(pieces) > 3
        assert torch.equal(torch.cat(pieces), model.tensors[name].read().flatten())


def test_a_gguf_file_may_hold_sentencepiece(init, tmp_path, repository):

    source = repository / "tests/oracles/sentencepiece.model"
    pieces, _ = read_pieces(source)
    llama = parts.llama(vocab_size=len(pieces))
    model = built(
        init, parts.write_gguf(tmp_path / "x.gguf", llama, pieces=pieces), tmp_path / "out"
    )
    assert model.config.tokens.boi == len(pieces)
    tokenizer = Tokenizer.open(tmp_path / "out" / TOKENIZER, model.config.tokens)
    theirs = read_tokenizer(source)
    theirs.encode_special_tokens = True
    assert tokenizer.encode(TEXT) == theirs.encode(TEXT, add_special_tokens=False).ids


def test_older_folders_hold_pickles_and_rotary_constants(init, tmp_path):
    theirs = parts.llama()
    folder = parts.write_llama(tmp_path / "llama", theirs)
    for path in folder.glob("model*"):
        path.unlink()
    state = dict(theirs.state_dict())
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)
    torch.save(state, folder / "pytorch_model.bin")
    assert_same_text(built(init, folder, tmp_path / "out"), theirs, tmp_path / "out")


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts.write_llama(tmp_path_factory.mktemp("parts") / "llama", parts.llama())


def clip_output(model: Any, pixels: Tensor) -> Tensor:
    """Output of CLIP's layers, without its last norm."""
    with torch.no_grad():
        vision = getattr(model, "vision_model", model)
        return vision(pixels, output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("write", [parts.write_clip, parts.write_clip_vision])
def test_a_clip_sees_as_before(init, tmp_path, llama_folder, write):
    """The adapter's injectors start at zero: the patches pass through CLIP's layers unchanged."""
    theirs = write(tmp_path / "clip")
    model = built(init, llama_folder, tmp_path / "out", "--vision", tmp_path / "clip")
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        tokens, _ = model.vision.encoder(pixels)
    assert torch.allclose(tokens, clip_output(theirs, pixels), atol=1e-5)
    vision = model.config.vision
    assert (vision.grid, vision.position_grid, model.config.llm_mmfs.base_grid) == (4, 4, 4)


def test_a_clip_for_larger_images_has_its_positions_resized(init, tmp_path, llama_folder):
    theirs = parts.write_clip_vision(tmp_path / "clip")
    options = ("--vision", tmp_path / "clip", "--image-size", 64)
    model = built(init, llama_folder, tmp_path / "out", *options)
    assert model.config.vision.image_size == 64
    table = model.vision.encoder.embeddings.position_embedding.weight
    small = dict(theirs.named_parameters())
    name = next(name for name in small if name.endswith("position_embedding.weight"))
    assert table.shape[0] == 65 and torch.allclose(table[[0, 1, 64]], small[name][[0, 1, 16]])


@pytest.mark.parametrize("text", [True, False])
def test_a_stable_diffusion_draws_as_before(init, tmp_path, llama_folder, text):
    """MMFS in the U-Net starts at zero: without training it predicts what it predicted."""
    theirs = parts.write_diffusion(tmp_path / "sd", text)
    model = built(init, llama_folder, tmp_path / "out", "--diffusion", tmp_path / "sd")
    decoder = model.image_decoder
    latents, condition = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 64)
    step = torch.tensor([3, 700])
    with torch.no_grad():
        wanted = theirs["unet"](latents, step, condition).sample
        images = model.encode_images(None)
        slot = torch.zeros(2, 1, dtype=torch.int64)
        found = decoder.unet(latents, step, condition, images.features, slot, slot + 1)
        pixels = theirs["vae"].decode(latents / 0.2).sample / 2 + 0.5
    assert torch.allclose(found, wanted, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(decoder.vae.decode_unclipped(latents), pixels, atol=1e-4)
    config = model.config.image_decoder
    assert config.diffusion.prediction == "v_prediction" and config.diffusion.beta_end == 0.01
    assert config.unet.mmfs_at == "skips" and config.vae.scaling_factor == 0.2
    if text:  # "" is its first and its end token, and padding
        with torch.no_grad():
            empty = theirs["text_encoder"](torch.tensor([[0] + [1] * 6])).last_hidden_state
        assert torch.allclose(decoder.null_condition, empty, atol=1e-6)
        assert config.resampler.queries == 7
    else:
        assert decoder.null_condition.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_stable_diffusion_of_zero_terminal_snr_keeps_its_schedule(init, tmp_path, llama_folder):
    """As those that were tuned with diffusers' `rescale_betas_zero_snr`; with epsilon it is
    refused, because its last timestep predicts no picture."""
    parts.write_diffusion(tmp_path / "sd", text=False)
    scheduler = tmp_path / "sd" / "scheduler"
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    DDIMScheduler(prediction_type="v_prediction", **options).save_pretrained(scheduler)
    model = built(init, llama_folder, tmp_path / "out", "--diffusion", tmp_path / "sd")
    diffusion = model.config.image_decoder.diffusion
    assert diffusion.rescale_betas_zero_snr and diffusion.spacing == "trailing"
    theirs = DDIMScheduler.from_pretrained(scheduler).alphas_cumprod
    own = model.image_decoder.diffusion.signal
    torch.testing.assert_close(own**2, theirs, rtol=0, atol=2e-5)
    DDIMScheduler(prediction_type="epsilon", **options).save_pretrained(scheduler)
    with pytest.raises(ConfigError, match=r"scheduler_config\.json.*rescale_betas_zero_snr needs"):
        from_diffusion._schedule(scheduler / "scheduler_config.json", diffusion)


def test_an_autoencoder_under_its_old_names(init, tmp_path, llama_folder):
    """Stable Diffusion's own file calls its attention query, key, value and proj_attn."""
    theirs = parts.write_diffusion(tmp_path / "sd", text=False)["vae"].state_dict()
    path = tmp_path / "sd" / "vae" / "diffusion_pytorch_model.safetensors"
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in theirs.items():
        for ours, before in new.items():
            name = name.replace(f".{ours}.", f".{before}.")
        shaped = "proj_attn.weight" in name or "query.weight" in name
        old[name] = value[:, :, None, None].contiguous() if shaped else value
    assert old.keys() != theirs.keys()
    save_file(old, path)
    model = built(init, llama_folder, tmp_path / "out", "--diffusion", tmp_path / "sd")
    own = model.image_decoder.vae.autoencoder.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("preset", ["released_13b", "paper_13b", "tiny"])
def test_the_preset_gives_the_form_and_the_parts_the_sizes(init, tmp_path, llama_folder, preset):
    model = built(init, llama_folder, tmp_path / "out", "--preset", preset, "--context", 80)
    config, form = model.config, preset_called(preset)
    assert config.vision_resampler.form == form.vision_resampler.form
    assert config.llm_mmfs.null_slot == form.llm_mmfs.null_slot
    assert config.image_decoder.unet.mmfs_at == form.image_decoder.unet.mmfs_at
    assert config.image_decoder.mmfs.images_seen == form.image_decoder.mmfs.images_seen
    assert (config.llama.width, config.llama.layers, config.llama.context) == (256, 3, 80)
    assert config.vision.width == 128


def test_a_seed_gives_the_same_weights(init, tmp_path, llama_folder):
    first = load_after(init, llama_folder, tmp_path, 1)
    assert all(
        torch.equal(v, first[n]) for n, v in load_after(init, llama_folder, tmp_path, 1).items()
    )
    other = load_after(init, llama_folder, tmp_path, 2)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert "vision.output_proj.weight" in changed and "llm.embed_tokens.weight" in changed
    assert "llm.layers.1.mlp.up_proj.weight" not in changed


def load_after(init: Init, llm: Path, tmp_path: Path, seed: int) -> dict[str, Tensor]:
    return built(init, llm, tmp_path / "out", "--seed", seed).state_dict()


def test_the_written_type(init, tmp_path, llama_folder):
    assert init(llama_folder, "--dtype", "bfloat16")[0] == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.bfloat16}


def golden_config(published: ModelConfig) -> ModelConfig:
    """The sizes of the model that the published code was started with for the statistics."""
    decoder = published.image_decoder
    vision = replace(published.vision, width=64, layers=24, heads=4, mlp_width=96, adapter_heads=4)
    reads = replace(
        published.vision_resampler, queries=8, width=48, context_width=64, layers=4, heads=4
    )
    llama = replace(
        published.llama, vocab=514, width=128, layers=6, heads=4, kv_heads=4, mlp_width=160
    )
    unet = replace(
        decoder.unet,
        latent_side=32,
        block_widths=(32, 64, 64, 64),
        condition_width=64,
        attention_heads=(2, 4, 4, 4),
    )
    tells = replace(decoder.resampler, width=64, context_width=128, heads=4, mlp_width=96)
    vae = replace(decoder.vae, block_widths=(32, 32, 32, 32), layers_per_block=1)
    return replace(
        published,
        tokens=replace(published.tokens, pad=511, boi=512, image=513),
        vision=vision,
        vision_resampler=replace(reads, mlp_width=96),
        llama=llama,
        llm_mmfs=replace(published.llm_mmfs, value_width=64),
        image_decoder=replace(decoder, resampler=tells, unet=unet, vae=vae),
    )


def test_new_weights_start_as_published(repository):
    """Mean, deviation and greatest magnitude of 618 tensors of the published model before its
    training. (The null condition is the text encoder's, and not among them.)"""

    config = golden_config(released_13b())
    with torch.device("meta"):
        sketch = MMInterleaved(config)
    published = json.loads((repository / "tests/golden/init_statistics.json").read_text())
    shapes = {name: value.shape for name, value in sketch.state_dict().items()}
    new = {str(rename(name)): name for name in published}
    new["image_decoder.null_condition"] = ""
    taken = [name for name in shapes if name not in new]
    drawn = fresh_tensors({name: shapes[name] for name in new}, config, taken, seed=0)
    assert len(published) == 618
    for ours, theirs in new.items():
        value = drawn[ours].read()
        assert value.shape == shapes[ours] and value.dtype == torch.float32
        if not theirs:
            continue
        mean, deviation, greatest = published[theirs]
        count = value.numel()
        spread = value.std().item() if count > 1 else 0.0
        assert spread == pytest.approx(deviation, rel=4 * math.sqrt(2 / count), abs=1e-9), theirs
        near = 6 * deviation / math.sqrt(count) + 1e-9
        assert value.mean().item() == pytest.approx(mean, abs=near), theirs
        most = value.abs().max().item()
        assert most == pytest.approx(greatest, rel=0.5, abs=1e-9), theirs


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gemma"}, "model_type gemma"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters yarn"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_scaling"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
]


@pytest.mark.parametrize(("changes", "named"), FIELDS)
def test_what_our_blocks_do_not_have_is_refused_by_name(init, tmp_path, changes, named):
    folder = parts.write_llama(tmp_path / "llama", parts.llama())
    parts.edit_json(folder / "config.json", **changes)
    refused(init, folder, f"our blocks do not have {named}", "build on a model without it")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": "large"}, "hidden_size is wrong"),
        ({"num_attention_heads": 3, "head_dim": None}, "do not divide a width of 256"),
        ({"num_key_value_heads": 3}, "do not divide a width of 256"),
        ({"rms_norm_eps": "small"}, "cannot be built on"),
        ({"rope_scaling": "no"}, "cannot be built on"),
        (
            {"intermediate_size": 500},
            "model.layers.{0-2}.mlp.gate_proj.weight has shape [512, 256]",
        ),
    ],
)
def test_configs_that_contradict_themselves(init, tmp_path, changes, named):
    folder = parts.write_llama(tmp_path / "llama", parts.llama())
    parts.edit_json(folder / "config.json", **changes)
    refused(init, folder, named)


def test_a_window_is_refused_only_if_documents_are_longer(init, tmp_path):
    folder = parts.write_llama(tmp_path / "llama", parts.llama())
    parts.edit_json(folder / "config.json", model_type="mistral", sliding_window=80)
    refused(init, folder, "our blocks do not have sliding_window", "--context 80 or less")
    assert init(folder, "--context", "80")[0] == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("llama.rope.scaling.type", "yarn"),
        ("llama.expert_count", 8),
        ("llama.attention.sliding_window", 32),
        ("llama.rope.dimension_count", 32),
        ("llama.logit_scale", 0.5),
    ],
)
def test_gguf_fields_of_other_blocks_are_refused_by_name(init, tmp_path, field, value):
    path = parts.write_gguf(tmp_path / "x.gguf", parts.llama(), fields={field: value})
    refused(init, path, f"our blocks do not have {field}")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("attention.head_count", 0, "llama.attention.head_count is wrong; expected a positive"),
        ("attention.head_count_kv", 0, "4 heads and 0 key-value heads"),
        ("rope.freq_base", "many", "could not convert string to float"),
    ],
)
def test_gguf_sizes_that_cannot_be(init, tmp_path, field, value, said):
    fields = {f"llama.{field}": value}
    refused(init, parts.write_gguf(tmp_path / "x.gguf", parts.llama(), fields=fields), said)


def test_an_unknown_tokenizer_in_a_gguf_needs_another(init, tmp_path, llama_folder):
    path = parts.write_gguf(tmp_path / "x.gguf", parts.llama(), words="bloom")
    refused(init, path, "tokenizer.ggml.pre bloom", "give --tokenizer")
    assert init(path, "--tokenizer", llama_folder)[0] == 0


def test_damaged_gguf_files(init, tmp_path):
    path = parts.write_gguf(tmp_path / "x.gguf", parts.llama())
    whole = path.read_bytes()
    for broken in (b"", b"GGUF", whole[:3000], whole[: len(whole) // 2], b"x" * 5000):
        path.write_bytes(broken)
        refused(init, path, "is not a GGUF file, or it is cut off or damaged")


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def test_tensors_that_do_not_fit_are_all_named(init, tmp_path):
    folder = parts.write_llama(tmp_path / "llama", parts.llama())
    (folder / "model.safetensors.index.json").unlink()
    state = {}
    for path in folder.glob("model-*.safetensors"):
        state.update(load_file(path))
        path.unlink()
    del state["model.layers.2.mlp.up_proj.weight"], state["lm_head.weight"]
    state["model.layers.0.self_attn.q_norm.weight"] = torch.ones(64)
    state["model.norm.weight"] = torch.ones(9)
    save_file(state, folder / "model.safetensors")
    refused(
        init,
        folder,
        "missing: model.layers.2.mlp.up_proj.weight, lm_head.weight",
        "unknown: model.layers.0.self_attn.q_norm.weight",
        "model.norm.weight has shape [9], expected [256]",
    )


def test_damaged_folders(init, tmp_path):
    folder = parts.write_llama(tmp_path / "llama", parts.llama())
    path = shard(folder)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    refused(init, folder, path.name, "is cut off")
    path.write_bytes(b"\xff" * 64)
    refused(init, folder, path.name, "is not a safetensors file, or is damaged")
    path.unlink()
    refused(init, folder, "cannot read", path.name)
    for left in folder.glob("*.safetensors*"):
        left.unlink()
    refused(init, folder, "holds no weights; expected model.safetensors")
    (folder / "config.json").write_text("[]")
    refused(init, folder, "config.json is not a JSON object")
    (folder / "config.json").unlink()
    refused(init, folder, "cannot read", "config.json")


def test_documents_need_two_different_ends(init, tmp_path):
    folder = parts.write_llama(tmp_path / "llama", parts.llama())
    parts.edit_json(folder / "config.json", bos_token_id=0, eos_token_id=[0, 2])
    refused(init, folder, "begins and ends its documents with the same token", "--bos or --eos")
    assert init(folder, "--eos", "<|im_end|>")[0] == 0
    tokens = read_config(tmp_path / "out" / CONFIG).tokens
    assert (tokens.bos, tokens.eos) == (0, 2)
    refused_options = ("--bos", "<s>", "--force")
    code, said = init(folder, *refused_options)
    assert code == 2 and "the tokenizer has no bos token '<s>'" in said


def test_a_tokenizer_of_another_model_is_refused(init, tmp_path):
    folder = parts.write_llama(tmp_path / "llama", parts.llama(vocab_size=parts.KNOWN - 1))
    refused(init, folder, "the tokenizer does not belong to", f"got {parts.KNOWN}")


def test_a_padding_id_that_is_no_token_is_replaced(init, tmp_path):
    """Some name an id behind their vocabulary: there our own marks will be."""
    folder = parts.write_llama(tmp_path / "llama", parts.llama())
    parts.edit_json(folder / "config.json", pad_token_id=parts.KNOWN)
    model = built(init, folder, tmp_path / "out")
    assert model.config.tokens.pad == parts.KNOWN + 2


def test_a_language_model_that_knows_pictures_is_refused(init, tmp_path):
    folder = parts.write_llama(tmp_path / "llama", parts.llama())
    tokenizer = parts.byte_tokenizer()
    tokenizer.add_special_tokens(["<|image|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    refused(init, folder, "has one of our special tokens already")


@pytest.mark.parametrize(
    ("part", "changes", "named"),
    [
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type"),
        ("unet", {"transformer_layers_per_block": [1, 2, 2]}, "transformer_layers_per_block"),
        ("unet", {"in_channels": 9}, "out_channels; expected 9; got 4"),
        ("unet", {"new_switch": True}, "new_switch"),
        ("unet", {"attention_head_dim": 7}, "block width 32 is not a multiple of 7"),
        ("unet", {"block_out_channels": "many"}, "block_out_channels is wrong"),
        ("unet", {"sample_size": None}, "sample_size is wrong"),
        ("vae", {"block_out_channels": [32, 32, 32]}, "down_block_types"),
        ("vae", {"scaling_factor": "x"}, "scaling_factor"),
        ("scheduler", {"beta_start": 3}, "beta_start"),
        ("vae", {"use_quant_conv": False}, "use_quant_conv"),
        ("vae", {"act_fn": "gelu"}, "act_fn"),
        ("vae", {"shift_factor": 0.1}, "shift_factor"),
    ],
)
def test_diffusion_fields_of_other_models_are_refused_by_name(
    init, tmp_path, llama_folder, part, changes, named
):
    parts.write_diffusion(tmp_path / "sd", text=False)
    file = "scheduler_config.json" if part == "scheduler" else "config.json"
    parts.edit_json(tmp_path / "sd" / part / file, **changes)
    code, said = init(llama_folder, "--diffusion", tmp_path / "sd")
    assert code == 2 and named in said.splitlines()[-1], said


def without_a_layer(sd: Path) -> None:
    path = sd / "text_encoder" / "model.safetensors"
    state = {name: t for name, t in load_file(path).items() if "layers.1.mlp" not in name}
    save_file(state, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without_a_layer, "lacks tensors: encoder.layers.1.mlp.fc1.bias"),
        (lambda sd: cut(sd / "text_encoder" / "model.safetensors"), "cannot read"),
        (lambda sd: cut(sd / "tokenizer" / "vocab.json"), "cannot read"),
        (lambda sd: (sd / "text_encoder" / "config.json").write_text("[]"), "cannot read"),
        (
            lambda sd: [path.unlink() for path in (sd / "tokenizer").iterdir()],
            "is not the tokenizer of",
        ),
    ],
)
def test_a_damaged_text_encoder_is_refused(init, tmp_path, llama_folder, damage, said):
    """transformers draws what is missing at random, and goes on."""
    parts.write_diffusion(tmp_path / "sd")
    damage(tmp_path / "sd")
    code, printed = init(llama_folder, "--diffusion", tmp_path / "sd")
    last = printed.splitlines()[-1]
    assert code == 2 and said in last and "leave out text_encoder and tokenizer" in last, printed


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def test_a_clip_that_does_not_fit_is_refused(init, tmp_path, llama_folder):
    parts.write_clip_vision(tmp_path / "clip")
    config = tmp_path / "clip" / "config.json"
    parts.edit_json(config, num_hidden_layers=8)
    code, said = init(llama_folder, "--vision", tmp_path / "clip")
    assert code == 2 and "missing: vision.encoder.layers.{4-7}." in said.splitlines()[-1]
    parts.edit_json(config, num_hidden_layers=4, image_size=40)
    code, said = init(llama_folder, "--vision", tmp_path / "clip")
    assert code == 2 and "must be an even number of patches wide" in said.splitlines()[-1]
    parts.edit_json(config, image_size=32, num_attention_heads=3)
    code, said = init(llama_folder, "--vision", tmp_path / "clip")
    assert code == 2 and "width 64 is not a multiple of 3" in said.splitlines()[-1]
    parts.edit_json(config, model_type="siglip_vision_model")
    code, said = init(llama_folder, "--vision", tmp_path / "clip")
    assert code == 2 and "is not a CLIP" in said.splitlines()[-1]
    parts.write_clip_vision(tmp_path / "clip")
    code, said = init(llama_folder, "--vision", tmp_path / "clip", "--image-size", 4)
    assert code == 2 and "position_grid" in said.splitlines()[-1]
    parts.edit_json(config, vision_config=None)
    code, said = init(llama_folder, "--vision", tmp_path / "clip")
    assert code == 2 and "config.json cannot be built on" in said.splitlines()[-1]
