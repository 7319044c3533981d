"""Language models of today: LLaMA-3, Mistral, Qwen2, Qwen3 and SmolLM3 write as in transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mmi_deploy.cli.app import run
from mmi_deploy.errors import ConfigError, MmiError
from mmi_deploy.spec.backends import CPU
from mmi_deploy.spec.config import from_json, to_json
from mmi_deploy.spec.graphs import Graph, Limits, graphs, numbered
from mmi_deploy.spec.presets import tiny
from mmi_deploy.targets.precision.recipes import RECIPES
from mmi_deploy.targets.precision.rewrite import rewrite
from mmi_export.graphs.llm import LlmGraph
from mmi_export.parity.receipts import onnx_runner
from mmi_export.tracing.onnx_from_module import onnx_from_module
from mmi_train.checkpoint_import.derived_config import derive_config
from mmi_train.checkpoint_import.from_gguf import read_gguf
from mmi_train.checkpoint_import.from_llama import read_llama
from mmi_train.checkpoint_import.new_model import extend_tokenizer, taken_tensors
from mmi_train.checkpoint_import.parts import LlmPart, Parts
from mmi_train.checkpoint_import.rotary_scaling import llama3_divisors
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.weights.model_folder import load_model
from train import small_parts as parts
from train.checkpoint_import.test_exported_model import assert_same_logits
from train.checkpoint_import.test_new_model import text_logits

Fields = dict[str, Any]

IDS = torch.randint(0, parts.KNOWN, (40,), generator=torch.Generator().manual_seed(3)).tolist()

SIZES: Fields = {
    "vocab_size": parts.ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
}

LLAMA_3: Fields = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 256,  # all three kinds of frequencies, in a short text
    "rope_type": "llama3",
}

# Fields of released configurations (LLaMA-3.2-1B, Mistral-7B 0.3 and Nemo, Qwen2.5-0.5B,
# Qwen3-0.6B, SmolLM3-3B) beside their sizes, as transformers 4 wrote them.
KINDS: dict[str, Fields] = {
    "llama3": {
        "model_type": "llama",
        "attention_bias": False,
        "head_dim": 8,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": LLAMA_3,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "mistral": {
        "model_type": "mistral",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "nemo": {
        "model_type": "mistral",
        "head_dim": 12,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "qwen2": {
        "model_type": "qwen2",
        "max_position_embeddings": 32768,
        "max_window_layers": 1,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "use_sliding_window": False,
    },
    "qwen3": {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 12,
        "max_position_embeddings": 40960,
        "max_window_layers": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "smollm3": {  # it does not say that its head is tied
        "model_type": "smollm3",
        "attention_bias": False,
        "layer_types": ["full_attention"] * 2,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 0],
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
    },
}


def write_kind(folder: Path, fields: Fields) -> tuple[Path, PreTrainedModel]:
    """A random model in several files with an index; config.json holds `fields` and the sizes."""
    folder.mkdir()
    written = SIZES | fields
    (folder / "config.json").write_text(json.dumps(written))
    config = AutoConfig.from_pretrained(folder)
    theirs = parts.randomise(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    theirs.save_pretrained(folder, max_shard_size="30kB")
    assert (folder / "model.safetensors.index.json").is_file()
    (folder / "config.json").write_text(json.dumps(written))
    parts.byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder, theirs  # type: ignore[return-value]


def model_of(part: LlmPart) -> MMInterleaved:
    """As `mmi init --context 96` builds it, without writing files and new weights anew."""
    built = Parts(part, context=96)
    tokens, vocab, _ = extend_tokenizer(built)
    config = derive_config("kind", built, tiny(), tokens, vocab)
    assert from_json(to_json(config)) == config
    model = MMInterleaved(config).eval()
    state = {name: tensor.read() for name, tensor in taken_tensors(built, config, 0).items()}
    missing, unknown = model.load_state_dict(state, strict=False)
    assert not unknown
    assert not [n for n in missing if n.startswith("llm.") and "look_back" not in n]
    return model


@torch.no_grad()
def logits_of(theirs: PreTrainedModel) -> Tensor:
    return theirs(torch.tensor([IDS])).logits[0, :, : parts.KNOWN]


def assert_same_model(part: LlmPart, theirs: PreTrainedModel) -> MMInterleaved:
    model = model_of(part)
    assert_same_logits(text_logits(model, IDS).numpy(), logits_of(theirs), 1e-5)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_as_released_writes_as_in_transformers(tmp_path: Path, kind: str) -> None:
    folder, theirs = write_kind(tmp_path / "llm", KINDS[kind])
    reread = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(logits_of(reread), logits_of(theirs))
    model = assert_same_model(read_llama(folder), theirs)
    theirs.save_pretrained(tmp_path / "again")  # with the fields of transformers 5
    assert model_of(read_llama(tmp_path / "again", tokenizer=folder)).config == model.config


def run_in_steps(
    runner: Callable[[Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]],
    graph: Graph,
    prefilled: int,
) -> NDArray[np.float32]:
    """Logits [t, vocabulary] of `IDS`: the first `prefilled` tokens in one run, then one a run."""
    found, caches = [], {}
    pieces = [(0, prefilled), *((i, i + 1) for i in range(prefilled, len(IDS)))]
    for start, end in pieces:
        t = end - start
        inputs = {
            tensor.name: np.zeros(tensor.resolve(b=1, t=t, w=t, v=1, n=1, m=1), tensor.dtype)
            for tensor in graph.inputs
        }
        inputs |= caches
        inputs["token_ids"][:], inputs["visual_index"][:] = IDS[start:end], -1
        inputs["position"][:], inputs["logit_index"][:] = np.arange(start, end), np.arange(t)
        inputs["write_index"][:] = start
        outputs = runner(inputs)
        found.append(outputs["logits"][0])
        caches = {
            n.replace("present", "past"): v for n, v in outputs.items() if n.startswith("present")
        }
    assert numbered("past_key", 1) in caches
    return np.concatenate(found)


# LLaMA-3 and Mistral differ from LLaMA in constants alone: their graphs have the same nodes.
@pytest.mark.parametrize(
    "kind",
    [
        "qwen2",
        "qwen3",
        "smollm3",
        *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("llama3", "nemo")),
    ],
)
def test_the_exported_graph_prefills_and_decodes_as_transformers(tmp_path: Path, kind: str) -> None:
    wider = {"hidden_size": 128, "intermediate_size": 256}  # products large enough to be quantised
    folder, theirs = write_kind(tmp_path / "llm", KINDS[kind] | wider)
    model, wanted = model_of(read_llama(folder)), logits_of(theirs)
    graph = graphs(model.config, Limits(context=48, batch=1, images=1))["llm"]
    onnx_from_module(LlmGraph(model, graph), graph, tmp_path / "llm.onnx")
    found = run_in_steps(onnx_runner(tmp_path / "llm.onnx"), graph, 29)
    assert_same_logits(found, wanted, 1e-5)

    int8 = tmp_path / "int8.onnx"
    rewrite(RECIPES["int8"], graph, tmp_path / "llm.onnx", int8, runtime=CPU)
    nodes = onnx.load(int8, load_external_data=False).graph.node
    assert sum(node.op_type == "MatMulNBits" for node in nodes) >= 4 * 2 + 1
    rounded = run_in_steps(onnx_runner(int8), graph, 29)[:, : wanted.shape[1]]
    error = np.sqrt(np.square(rounded - wanted.numpy()).mean() / wanted.square().mean().item())
    assert 1e-3 < error < 0.06, error

    unfused = LlmGraph(model, graph, fused=False)

    @torch.no_grad()
    def eager(inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        outputs = unfused({name: torch.from_numpy(value) for name, value in inputs.items()})
        return {name: value.numpy() for name, value in outputs.items()}

    assert_same_logits(run_in_steps(eager, graph, 29), wanted, 1e-5)


@pytest.mark.parametrize("head_width", [64, 128])
@pytest.mark.parametrize(("factor", "theta"), [(32.0, 500000.0), (8.0, 500000.0), (2.5, 1e4)])
def test_the_scaling_of_llama_3_is_transformers(
    head_width: int, factor: float, theta: float
) -> None:
    fields = LLAMA_3 | {"factor": factor, "original_max_position_embeddings": 8192}
    config = AutoConfig.for_model(
        "llama", head_dim=head_width, rope_parameters={**fields, "rope_theta": theta}
    )
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    divisors = llama3_divisors(theta, head_width, factor=factor, low=1.0, high=4.0, context=8192)
    plain = 1 / theta ** (torch.arange(0, head_width, 2).float() / head_width)
    assert torch.allclose(plain / torch.tensor(divisors), wanted, rtol=1e-5, atol=0)
    assert divisors[0] == 1 and divisors[-1] == pytest.approx(factor)
    assert 1 < divisors[head_width // 4] or theta == 1e4


def gguf_of(path: Path, theirs: PreTrainedModel, **options: Any) -> Path:
    return parts.write_gguf(path / "x.gguf", theirs, **options)  # type: ignore[arg-type]


def random_kind(fields: Fields) -> PreTrainedModel:
    made = SIZES | fields
    config = AutoConfig.for_model(**made)
    return parts.randomise(  # type: ignore[return-value]
        AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    )


F32, Q8 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0


@pytest.mark.parametrize(("kind", "stored"), [("qwen2", F32), ("qwen2", Q8), ("qwen3", F32)])
def test_a_gguf_of_qwen_writes_as_transformers_reads_it(
    tmp_path: Path, kind: str, stored: gguf.GGMLQuantizationType
) -> None:
    source = random_kind(KINDS[kind] | {"intermediate_size": 64})
    path = gguf_of(tmp_path, source, architecture=kind, words="qwen2", kind=stored)
    peer = {"qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}[kind]
    given = {"gguf_file": path.name, "config": source.config}  # it misses another head width
    theirs = peer.from_pretrained(tmp_path, dtype=torch.float32, **given).eval()
    assert torch.equal(logits_of(theirs), logits_of(source)) == (stored == F32)
    assert_same_model(read_gguf(path), theirs)


def test_a_gguf_of_llama_3_holds_its_scaling_as_a_table(tmp_path: Path) -> None:
    theirs = random_kind(KINDS["llama3"])
    divisors = llama3_divisors(500000.0, 8, factor=8.0, low=1.0, high=4.0, context=256)
    path = gguf_of(tmp_path, theirs, words="llama-bpe", rope_freqs=np.float32(divisors))
    model = assert_same_model(read_gguf(path), theirs)
    assert 1 < model.config.llama.rope_divisors[1] < model.config.llama.rope_divisors[-1] == 8


def test_a_gguf_of_mistral_nemo_is_one_of_llama(tmp_path: Path) -> None:
    theirs = random_kind(KINDS["nemo"])
    assert_same_model(read_gguf(gguf_of(tmp_path, theirs, words="tekken")), theirs)


def test_a_gguf_of_smollm3_leaves_out_every_fourth_rotation(tmp_path: Path) -> None:
    """Neither the file nor llama.cpp has a field for it: the architecture says so."""
    own = {"no_rope_layers": None, "layer_types": None, "num_hidden_layers": 5}
    theirs = random_kind(KINDS["smollm3"] | own)
    path = gguf_of(tmp_path, theirs, architecture="smollm3", words="smaug-bpe")
    assert run(["init", "-o", str(tmp_path / "out"), "--llm", str(path), "--context", "96"]) == 0
    model = load_model(tmp_path / "out")
    assert_same_logits(text_logits(model, IDS).numpy(), logits_of(theirs), 1e-5)
    assert model.config.llama.layers_without_rope == (3,)


@pytest.mark.parametrize("name", ["rope.scaling.factor", "rope.scale_linear"])
def test_linear_scaling_of_rotary_positions(tmp_path: Path, name: str) -> None:
    rope = {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e6}
    theirs = random_kind(KINDS["mistral"] | {"rope_parameters": rope})
    fields = {"llama.rope.scaling.type": "linear", f"llama.{name}": 2.5}
    assert_same_model(read_gguf(gguf_of(tmp_path, theirs, fields=fields)), theirs)


REFUSED: list[tuple[str, Fields, str]] = [
    ("llama3", {"rope_scaling": LLAMA_3 | {"rope_type": "yarn"}}, "rope_scaling yarn"),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling yarn"),
    ("qwen2", {"rope_scaling": {"type": "mrope"}}, "rope_scaling mrope"),
    ("qwen2", {"use_mrope": True}, "use_mrope"),
    ("llama3", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling dynamic"),
    ("llama3", {"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling longrope"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("smollm3", {"mlp_bias": True}, "mlp_bias"),
    ("smollm3", {"layer_types": ["chunked_attention"] * 2}, "layer_types"),
    ("qwen3", {"model_type": "qwen3_moe"}, "model_type qwen3_moe"),
    ("mistral", {"model_type": "mixtral"}, "model_type mixtral"),
    ("mistral", {"model_type": "ministral3"}, "model_type ministral3"),
    ("qwen3", {"model_type": "gemma3_text"}, "model_type gemma3_text"),
    ("llama3", {"model_type": "llama4_text"}, "model_type llama4_text"),
]


def write_config(folder: Path, fields: Fields) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SIZES | fields))
    return folder


@pytest.mark.parametrize(("kind", "changes", "named"), REFUSED)
def test_what_our_blocks_do_not_have_is_refused_by_its_field(
    tmp_path: Path, kind: str, changes: Fields, named: str
) -> None:
    """From the configuration alone, before any weight is looked at."""
    folder = write_config(tmp_path / "llm", KINDS[kind] | changes)
    with pytest.raises(ConfigError, match=f"our blocks do not have {named}") as refused:
        read_llama(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_scaling": LLAMA_3 | {"factor": None}}, "rope_scaling.factor is wrong"),
        ({"rope_scaling": LLAMA_3 | {"low_freq_factor": "1"}}, "low_freq_factor is wrong"),
        ({"rope_scaling": LLAMA_3 | {"high_freq_factor": -4.0}}, "high_freq_factor is wrong"),
        ({"head_dim": 0}, "head_dim is wrong"),
        ({"head_dim": True}, "head_dim is wrong"),
    ],
)
def test_wrong_numbers_of_a_scaling_and_of_heads(
    tmp_path: Path, changes: Fields, named: str
) -> None:
    folder, _ = write_kind(tmp_path / "llm", KINDS["llama3"])
    parts.edit_json(folder / "config.json", **changes)
    with pytest.raises(ConfigError, match=named):
        read_llama(folder)


@pytest.mark.parametrize("stated", [[1], [1, 2], "all", [1, None]])
def test_a_list_of_rotary_layers_that_is_none(tmp_path: Path, stated: object) -> None:
    folder, _ = write_kind(tmp_path / "llm", KINDS["smollm3"])
    parts.edit_json(folder / "config.json", no_rope_layers=stated)
    with pytest.raises(ConfigError, match="no_rope_layers is wrong; expected 2 numbers"):
        read_llama(folder)


@pytest.mark.parametrize(
    ("kind", "changes", "window"),
    [
        ("mistral", {"sliding_window": 40}, 40),
        ("qwen2", {"use_sliding_window": True}, 32),
        ("qwen2", {}, None),
        ("qwen3", {"sliding_window": 40}, None),
        ("smollm3", {"sliding_window": 40, "use_sliding_window": True}, 40),
    ],
)
def test_a_window_counts_where_it_is_used_and_bounds_the_context(
    tmp_path: Path, kind: str, changes: Fields, window: int | None
) -> None:
    folder, _ = write_kind(tmp_path / "llm", KINDS[kind] | changes)
    part = read_llama(folder)
    assert part.window == window
    if window is not None:
        with pytest.raises(ConfigError, match=f"not have sliding_window.*--context {window} or"):
            model_of(part)


def test_a_mistral_that_does_not_say_its_window_has_one(tmp_path: Path) -> None:
    """0.1's default in transformers; later files say null."""
    folder, _ = write_kind(tmp_path / "llm", KINDS["mistral"])
    fields = json.loads((folder / "config.json").read_text())
    del fields["sliding_window"]
    (folder / "config.json").write_text(json.dumps(fields))
    assert read_llama(folder).window == AutoConfig.from_pretrained(folder).sliding_window == 4096


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("qwen2", "qwen2.rope.scaling.type", "yarn"),
        ("qwen3", "qwen3.expert_count", 8),
        ("qwen2", "qwen2.attention.sliding_window", 32),
        ("qwen3", "qwen3.attention.value_length", 4),
        ("smollm3", "smollm3.logit_scale", 0.5),
    ],
)
def test_gguf_fields_of_other_blocks(tmp_path: Path, kind: str, field: str, value: object) -> None:
    path = gguf_of(tmp_path, random_kind(KINDS[kind]), architecture=kind, fields={field: value})
    with pytest.raises(ConfigError, match=f"our blocks do not have {field}"):
        read_gguf(path)


@pytest.mark.parametrize("architecture", ["qwen3moe", "gemma3", "llama4", "mistral3", "qwen35"])
def test_other_architectures_of_gguf_files(tmp_path: Path, architecture: str) -> None:
    path = gguf_of(tmp_path, random_kind(KINDS["qwen3"]), architecture=architecture)
    with pytest.raises(ConfigError, match=f"not have general.architecture {architecture}; exp"):
        read_gguf(path)


@pytest.mark.parametrize(
    "table", [np.ones(3), np.float32([1, 2, 3]), np.float32([1, 1, np.nan, 2]), np.zeros(4)]
)
def test_a_table_of_rotary_scaling_that_is_none(tmp_path: Path, table: NDArray[Any]) -> None:
    theirs = random_kind(KINDS["llama3"])
    path = gguf_of(tmp_path, theirs, rope_freqs=table.astype(np.float32))
    with pytest.raises(MmiError, match=r"rope_freqs\.weight"):
        read_gguf(path)


def test_tensors_of_another_kind_are_named(tmp_path: Path) -> None:
    path = gguf_of(tmp_path, random_kind(KINDS["qwen2"]))  # as architecture llama
    with pytest.raises(MmiError, match=r"unknown: model\.layers\.\{0-1\}\.self_attn\.q_proj\.bias"):
        read_gguf(path)
    folder, _ = write_kind(tmp_path / "llm", KINDS["mistral"])
    parts.edit_json(folder / "config.json", model_type="qwen3", head_dim=8)
    with pytest.raises(MmiError, match=r"missing: model\.layers\.\{0-1\}\.self_attn\.q_norm"):
        read_llama(folder)
