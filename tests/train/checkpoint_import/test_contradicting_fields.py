"""Fields of other models' folders that stand in two places, and tokens that end a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPModel, LlamaForCausalLM

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import read_config
from mmi_train.checkpoint_import.config_fields import read_json
from mmi_train.checkpoint_import.from_clip import read_clip
from mmi_train.checkpoint_import.from_gguf import read_gguf
from mmi_train.checkpoint_import.from_llama import read_llama
from mmi_train.checkpoint_import.parts import EMBEDDING, HEAD
from mmi_train.weights.model_folder import CONFIG, load_model
from train import small_parts as parts
from train.checkpoint_import.test_new_model import Init, assert_same_text, built, init, refused

__all__ = ["init"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return parts.write_llama(tmp_path / "llama", parts.llama())


def theirs(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder).eval()


def test_a_head_of_its_own_is_kept_although_the_config_says_tied(
    init: Init, folder: Path, tmp_path: Path
) -> None:
    """transformers 5 keeps both as well."""
    parts.edit_json(folder / "config.json", tie_word_embeddings=True)
    code, said = init(folder)
    assert code == 0
    assert f"{HEAD} differs from {EMBEDDING}: both are kept" in " ".join(said.split())
    model = load_model(tmp_path / "out")
    kept = theirs(folder)
    assert not torch.equal(kept.lm_head.weight, kept.model.embed_tokens.weight)
    assert_same_text(model, kept, tmp_path / "out")


def test_a_head_that_differs_in_one_number_is_kept(folder: Path) -> None:
    state = dict(theirs(folder).state_dict())
    state[HEAD] = state[EMBEDDING].clone()
    state[HEAD][-1, -1] += 1e-4
    write_whole(folder, state)
    parts.edit_json(folder / "config.json", tie_word_embeddings=True)
    model = read_llama(folder)
    assert not model.tied and torch.equal(model.head.read(), state[HEAD])


def test_a_head_that_equals_the_embedding_is_tied_and_nothing_said(
    init: Init, folder: Path, tmp_path: Path
) -> None:
    state = dict(theirs(folder).state_dict())
    state[HEAD] = state[EMBEDDING].clone()
    write_whole(folder, state)
    parts.edit_json(folder / "config.json", tie_word_embeddings=True)
    code, said = init(folder)
    assert code == 0 and "tie_word_embeddings" not in said
    assert read_llama(folder).tied
    assert_same_text(load_model(tmp_path / "out"), theirs(folder), tmp_path / "out")


def test_a_head_of_another_size_is_not_dropped(init: Init, folder: Path) -> None:
    state = dict(theirs(folder).state_dict())
    state[HEAD] = state[HEAD][:-3].clone()
    write_whole(folder, state)
    parts.edit_json(folder / "config.json", tie_word_embeddings=True)
    refused(init, folder, f"{HEAD} has shape [{parts.ROWS - 3}, 256]")


def write_whole(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """All weights of `folder` in one file."""
    for path in folder.glob("model*"):
        path.unlink()
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "a.tmp")
    (folder / "a.tmp").rename(folder / "model.safetensors")


DEFAULT = {"rope_type": "default"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": 50000},
        {"rope_parameters": DEFAULT, "rope_theta": 300.0},
        {"rope_parameters": None, "rope_theta": 300.0},
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_parameters": None, "rope_scaling": {**DEFAULT, "rope_theta": 7e3}},
        {"rope_parameters": None},
    ],
)
def test_the_base_of_rotary_positions_is_transformers(
    folder: Path, changes: dict[str, Any]
) -> None:
    parts.edit_json(folder / "config.json", **changes)
    wanted = theirs(folder).config.rope_parameters["rope_theta"]
    model = read_llama(folder)
    assert (model.rope_theta, model.rope_divisors) == (wanted, ())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"rope_theta": 10000.0},
            "one value in rope_parameters.rope_theta and rope_theta; got 50000.0 and 10000.0",
        ),
        ({"rope_scaling": {**DEFAULT, "rope_theta": 7e3}}, "rope_scaling.rope_theta"),
        (
            {"rope_parameters": {**DEFAULT, "type": "linear", "factor": 2.0}},
            "one value in rope_parameters.rope_type and rope_parameters.type",
        ),
    ],
)
def test_rotary_positions_that_contradict_themselves_are_refused(
    init: Init, folder: Path, changes: dict[str, Any], named: str
) -> None:
    parts.edit_json(folder / "config.json", **changes)
    refused(init, folder, "config.json contradicts itself", named)


@pytest.mark.parametrize("factor", [0, None, "1", True])
def test_linear_scaling_by_what_is_no_number_is_refused(
    init: Init, folder: Path, factor: object
) -> None:
    scaling = {"type": "linear", "factor": factor}
    parts.edit_json(folder / "config.json", rope_parameters=None, rope_scaling=scaling)
    refused(init, folder, "rope_scaling.factor is wrong; expected a positive number")


def test_linear_scaling_is_transformers(init: Init, folder: Path, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 3.0, "rope_theta": 50000.0}
    parts.edit_json(folder / "config.json", rope_parameters=rope)
    assert_same_text(built(init, folder, tmp_path / "out"), theirs(folder), tmp_path / "out")


def test_fields_that_change_nothing_are_taken(init: Init, folder: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": None}
    parts.edit_json(folder / "config.json", quantization_config=None, rope_parameters=rope)
    assert init(folder)[0] == 0


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_field_that_stands_twice_is_refused(init: Init, folder: Path, name: str) -> None:
    text = (folder / name).read_text()
    (folder / name).write_text(text.replace("{", '{"bos_token_id": 0, ', 1))
    refused(init, folder, f"{name} is not a JSON object: bos_token_id stands in it twice")
    with pytest.raises(ConfigError, match="stands in it twice"):
        read_json(folder / name)


@pytest.mark.parametrize(
    ("config", "generation", "wanted"),
    [
        (2, None, (2,)),
        ([2, 0], None, (2, 0)),
        (2, 2, (2,)),
        (2, [2, 0, 5], (2, 0, 5)),
        ([0, 5], [5, 2], (0, 5, 2)),
        (None, [2, 0], (2, 0)),
        ([2, -1], -1, (2,)),
    ],
)
def test_all_end_tokens_are_kept(
    init: Init, folder: Path, tmp_path: Path, config: object, generation: object, wanted: object
) -> None:
    """LLaMA-3 instruct names them in generation_config.json alone."""
    parts.edit_json(folder / "config.json", eos_token_id=config)
    parts.edit_json(folder / "generation_config.json", eos_token_id=generation)
    assert init(folder)[0] == 0
    assert read_config(tmp_path / "out" / CONFIG).tokens.ends == wanted


def test_the_end_tokens_are_those_that_transformers_generates_to(folder: Path) -> None:
    parts.edit_json(folder / "generation_config.json", eos_token_id=[2, 0, 7])
    assert set(theirs(folder).generation_config.eos_token_id) == set(read_llama(folder).ends)


def test_a_named_end_token_takes_the_place_of_all(init: Init, folder: Path, tmp_path: Path) -> None:
    parts.edit_json(folder / "config.json", eos_token_id=[0, 2])
    assert init(folder, "--eos", "<|im_end|>")[0] == 0
    assert read_config(tmp_path / "out" / CONFIG).tokens.ends == (2,)


def test_a_padding_token_that_ends_texts_is_replaced(
    init: Init, folder: Path, tmp_path: Path
) -> None:
    parts.edit_json(folder / "config.json", eos_token_id=[2, 0], pad_token_id=0)
    tokens = built(init, folder, tmp_path / "out").config.tokens
    assert (tokens.pad, tokens.ends) == (parts.KNOWN + 2, (2, 0))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (["</s>"], "config.json: eos_token_id is wrong; expected ids of tokens; got ['</s>']"),
        ([2, True], "eos_token_id is wrong"),
        ([2, parts.KNOWN], f"has no eos token; got {parts.KNOWN}"),
        ([], "has no eos token"),
    ],
)
def test_end_tokens_that_are_none_are_refused(
    init: Init, folder: Path, value: object, said: str
) -> None:
    parts.edit_json(folder / "config.json", eos_token_id=value)
    (folder / "generation_config.json").unlink()
    refused(init, folder, said)


def test_two_first_tokens_are_told(init: Init, folder: Path, tmp_path: Path) -> None:
    parts.edit_json(folder / "generation_config.json", bos_token_id=0)
    code, said = init(folder)
    assert code == 0 and "tokens that begin a text, [1, 0]: the first is used" in " ".join(
        said.split()
    )
    assert read_config(tmp_path / "out" / CONFIG).tokens.bos == 1


def test_a_gguf_keeps_the_ends_of_text_turn_and_message(init: Init, tmp_path: Path) -> None:
    fields = {"tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.eom_token_id": 2}
    path = parts.write_gguf(tmp_path / "x.gguf", parts.llama(), fields=fields)
    assert read_gguf(path).ends == (2, 0)
    assert built(init, path, tmp_path / "out").config.tokens.ends == (2, 0)


def test_clip_sizes_in_its_older_place_are_transformers(tmp_path: Path) -> None:
    """CLIP's first folders hold `vision_config_dict` beside an emptier `vision_config`."""
    parts.write_clip(tmp_path / "clip")
    path = tmp_path / "clip" / "config.json"
    config = json.loads(path.read_text())
    older = {name: config["vision_config"].pop(name) for name in ("hidden_size", "patch_size")}
    parts.edit_json(path, vision_config=config["vision_config"], vision_config_dict=parts.VISION)
    wanted = CLIPModel.from_pretrained(tmp_path / "clip").config.vision_config
    found = read_clip(tmp_path / "clip")
    assert (found.width, found.patch_size) == (wanted.hidden_size, wanted.patch_size)
    assert (found.width, found.patch_size) == (older["hidden_size"], older["patch_size"])
    changed = {**parts.VISION, "num_attention_heads": 4}
    parts.edit_json(path, vision_config_dict=changed)
    with pytest.raises(ConfigError, match=r"vision_config_dict\.num_attention_heads; got 2 and 4"):
        read_clip(tmp_path / "clip")


@pytest.mark.parametrize(
    "field", [{"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1.0}]
)
def test_pixels_that_are_prepared_otherwise_are_refused(
    tmp_path: Path, field: dict[str, object]
) -> None:
    parts.write_clip(tmp_path / "clip")
    path = tmp_path / "clip" / "preprocessor_config.json"
    plain = {"do_rescale": True, "rescale_factor": 0.00392156862745098, "do_normalize": None}
    path.write_text(json.dumps({**plain, "image_mean": [0.1, 0.2, 0.3]}))
    assert read_clip(tmp_path / "clip").pixel_mean == (0.1, 0.2, 0.3)
    path.write_text(json.dumps(plain | field))
    with pytest.raises(ConfigError, match=f"not prepared with this {next(iter(field))}"):
        read_clip(tmp_path / "clip")
