"""The `llm` graph: tokens to logits and hidden states, KV cache in place.

Letters: b batch, t tokens, k positions whose logits are wanted, c cache slots, m images, n pool of
encoded images, s feature cells, h heads, d channels per head, v rows of visual tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmi_deploy.graphs import Graph, numbered
from mmi_export import operators
from mmi_export.folding import FoldedLlmLookBack
from mmi_export.fused_llama import FusedAttention, FusedMlp
from mmi_export.onnx_from_module import Tensors, sharing_copy
from mmi_train.model.llama import Block, KvCache
from mmi_train.model.mm_interleaved import MMInterleaved


class InPlaceCache:
    """Stands for `KvCache`: keys and values of all slots, the new ones written at `write_index`."""

    def __init__(self, inputs: Tensors) -> None:
        self.inputs = inputs
        self.present: Tensors = {}

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value [b, h, t, d] of one layer into its cache; returns it, [b, h, c, d]."""
        return self._write("key", layer, key), self._write("value", layer, value)

    def _write(self, kind: str, layer: int, new: Tensor) -> Tensor:
        past = self.inputs[numbered(f"past_{kind}", layer)]
        present = operators.tensor_scatter(past, new, self.inputs["write_index"])
        self.present[numbered(f"present_{kind}", layer)] = present
        return present

    def advance(self, tokens: int) -> None:
        """The caller keeps count."""


class LlmGraph(nn.Module):
    """`MMInterleaved.llm` and its head, with MMFS, the head and the BoI vector folded."""

    def __init__(self, model: MMInterleaved, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        embedding = model.llm.embed_tokens.weight.detach().clone()
        embedding[model.config.tokens.boi] += model.boi_embedding.detach()[0]
        self.embedding = nn.Parameter(embedding, requires_grad=False)
        self.llm = sharing_copy(model.llm)
        del self.llm.embed_tokens
        for block in cast(Iterable[Block], self.llm.layers):
            block.register_module("self_attn", FusedAttention(block.self_attn))
            block.register_module("mlp", FusedMlp(block.mlp))
            if block.look_back is not None:
                block.register_module("look_back", FoldedLlmLookBack(block.look_back))
        weight, bias = model.head.folded()
        self.head_weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.head_bias = nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, inputs: Tensors) -> Tensors:
        cache = InPlaceCache(inputs)
        hidden = self.llm(
            self._embed(inputs),
            inputs["position"],
            self._visible(inputs),
            cast(KvCache, cache),
            [inputs[name] for name in self.graph.names("llm_value")],
            inputs["image_slot"],
            inputs["image_position"],
        )
        wanted = operators.gather_rows(hidden, inputs["logit_index"])  # [b, k, c]
        logits = F.linear(wanted, self.head_weight, self.head_bias)
        outputs = {"logits": logits, "hidden": hidden, **cache.present}
        return {tensor.name: outputs[tensor.name] for tensor in self.graph.outputs}

    def _embed(self, inputs: Tensors) -> Tensor:
        index = inputs["visual_index"]
        visual = F.embedding(index.clamp(min=0), inputs["visual_tokens"])
        words = F.embedding(inputs["token_ids"], self.embedding)
        return torch.where((index >= 0).unsqueeze(-1), visual, words)

    def _visible(self, inputs: Tensors) -> Tensor:
        """[b, 1, t, c]: query t of row b sees key j iff start[b] <= j <= write_index[b] + t.

        A query before `start` is padding; it sees its own key, so that its softmax is no 0 / 0.
        """
        tokens = inputs["token_ids"].shape[1]
        slots = inputs[numbered("past_key", 0)].shape[2]
        last = (inputs["write_index"].unsqueeze(1) + torch.arange(tokens)).unsqueeze(
            -1
        )  # [b, t, 1]
        first = torch.minimum(inputs["start"][:, None, None], last)
        slot = torch.arange(slots)
        return ((slot >= first) & (slot <= last)).unsqueeze(1)
