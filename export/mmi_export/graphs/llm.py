"""The `llm` graph: tokens to logits and hidden states, with the KV cache updated in place.

Letters: b batch, t tokens, w wanted positions, k keys, a key-value heads, d channels per head,
c channels, u vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmi_deploy.spec.graphs import Graph, numbered
from mmi_export.graphs import operators
from mmi_export.graphs.folding import FoldedGatedMmfs
from mmi_export.graphs.fused_llama import DeployedAttention, FusedAttention, FusedMlp
from mmi_export.tracing.onnx_from_module import Tensors, sharing_copy
from mmi_train.model.llama import Block, KvCache
from mmi_train.model.lm_head import LmHead
from mmi_train.model.mm_interleaved import MMInterleaved


class InPlaceCache:
    """Replacement of `KvCache`: all slots are inputs; new entries are written at `write_index`."""

    def __init__(self, inputs: Tensors) -> None:
        self.inputs = inputs
        self.present: Tensors = {}

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write key and value [b, a, t, d] of one layer into its cache; return it, [b, a, k, d]."""
        return self._write("key", layer, key), self._write("value", layer, value)

    def _write(self, kind: str, layer: int, new: Tensor) -> Tensor:
        past = self.inputs[numbered(f"past_{kind}", layer)]
        present = operators.tensor_scatter(past, new, self.inputs["write_index"])
        self.present[numbered(f"present_{kind}", layer)] = present
        return present

    def advance(self, tokens: int) -> None:
        """Do nothing: the caller counts tokens."""


class TokenEmbedding(nn.Module):
    """Embed token ids [b, t] as [b, t, c]; begin-of-image gets its learned vector added."""

    def __init__(self, model: MMInterleaved) -> None:
        super().__init__()
        self.boi = model.config.tokens.boi
        self.embedding, self.boi_embedding = model.llm.embed_tokens.weight, model.boi_embedding

    def forward(self, token_ids: Tensor) -> Tensor:
        words = F.embedding(token_ids, self.embedding)
        is_boi = (token_ids == self.boi).unsqueeze(-1)
        return torch.where(is_boi, words + self.boi_embedding, words)


class FoldedTokenEmbedding(nn.Module):
    """`TokenEmbedding` as one table."""

    def __init__(self, model: MMInterleaved) -> None:
        super().__init__()
        row = torch.tensor([model.config.tokens.boi])
        table = model.llm.embed_tokens.weight.detach().index_add(0, row, model.boi_embedding)
        self.embedding = nn.Parameter(table.detach(), requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.embedding)


class Head(nn.Module):
    """`LmHead`: logits of the new ids are added to those of the frozen head."""

    def __init__(self, head: LmHead) -> None:
        super().__init__()
        self.head, self.head_new = head.head, head.head_new
        count = head.head_new.out_features
        column = torch.full((head.head.out_features,), count)
        column = column.index_copy(0, head.new_ids, torch.arange(count))
        self.register_buffer("column", column)  # [u]: index of the new logit; `count`: none

    def forward(self, hidden: Tensor) -> Tensor:
        new = F.pad(self.head_new(hidden), (0, 1))  # [b, w, count + 1], zeros at the end
        return self.head(hidden) + new.index_select(-1, self.get_buffer("column"))


class FoldedHead(nn.Module):
    """`LmHead` as one linear map."""

    def __init__(self, head: LmHead) -> None:
        super().__init__()
        weight, bias = head.folded()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias)


class LlmGraph(nn.Module):
    """`MMInterleaved.llm` and its head, with MMFS folded.

    `fused`: the head and the begin-of-image vector are folded too, and linear maps of one input are
    stacked. Otherwise every large weight is used as the model's file holds it.
    """

    def __init__(self, model: MMInterleaved, graph: Graph, fused: bool = True) -> None:
        super().__init__()
        self.graph = graph
        self.words: nn.Module = FoldedTokenEmbedding(model) if fused else TokenEmbedding(model)
        self.llm = sharing_copy(model.llm)
        del self.llm.embed_tokens
        attention = FusedAttention if fused else DeployedAttention
        for block in cast(Iterable[Block], self.llm.layers):
            block.register_module("self_attn", attention(block.self_attn))
            if fused:
                block.register_module("mlp", FusedMlp(block.mlp))
            if block.look_back is not None:
                block.register_module("look_back", FoldedGatedMmfs(block.look_back))
        self.head: nn.Module = FoldedHead(model.head) if fused else Head(model.head)

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
        wanted = operators.gather_rows(hidden, inputs["logit_index"])  # [b, w, c]
        outputs = {"logits": self.head(wanted), "hidden": hidden, **cache.present}
        return {tensor.name: outputs[tensor.name] for tensor in self.graph.outputs}

    def _embed(self, inputs: Tensors) -> Tensor:
        index = inputs["visual_index"]
        visual = F.embedding(index.clamp(min=0), inputs["visual_tokens"])
        words = self.words(inputs["token_ids"])
        return torch.where((index >= 0).unsqueeze(-1), visual, words)

    def _visible(self, inputs: Tensors) -> Tensor:
        """Mask [b, 1, t, k]: query t of row b sees key k iff start[b] <= k <= write_index[b] + t.

        A query before `start` is padding; it sees its own key, as a softmax over none is 0 / 0.
        """
        tokens = inputs["token_ids"].shape[1]
        slots = inputs[numbered("past_key", 0)].shape[2]
        last = inputs["write_index"].unsqueeze(1) + torch.arange(tokens)  # [b, t]
        last = last.unsqueeze(-1)  # [b, t, 1]
        first = torch.minimum(inputs["start"][:, None, None], last)
        slot = torch.arange(slots)
        return ((slot >= first) & (slot <= last)).unsqueeze(1)
