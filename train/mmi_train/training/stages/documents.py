"""Documents stage: the losses of the paper (Eq. 5) on documents, each in its own context.

Documents of a micro-batch are packed into rows, in which none sees another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor, nn

from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import DocumentError
from mmi_deploy.spec.config import to_json
from mmi_train.data.batches import batch_of
from mmi_train.data.documents import Documents
from mmi_train.data.mixture import MixedOrder
from mmi_train.data.readers.sample import Skipped
from mmi_train.data.rows import TokenDocument, continued, make_rows, tokens_of
from mmi_train.model.layout import map_tensors
from mmi_train.model.mm_interleaved import Batch, MMInterleaved
from mmi_train.training.stages.same_parts import Parts, all_parts, parts_of, with_parts

# Broken documents: their numbers and the reasons.
Broken = tuple[tuple[int, str], ...]

# Other documents that are tried in the place of a broken one.
_SPARE = 50


@dataclass(frozen=True)
class DocumentBatch:
    """A batch, and the documents that were to be in it and cannot be read: number and reason."""

    batch: Batch
    broken: Broken

    def pin_memory(self) -> DocumentBatch:
        """Copy in page-locked memory, for PyTorch's loader."""
        return map_tensors(self, Tensor.pin_memory)


@dataclass
class DocumentsStage:
    """Micro-batches of `documents` documents of `file`, in an order that `seed` decides; of a
    mixture the source of each document is drawn.

    A broken document is reported to `on_broken` once, with its place and the reason, and another
    one stands in for it, as for one that the rules of a data set leave out; more than `max_bad`
    broken ones end the run with `DocumentError`.
    `image_weight` is the paper's lambda. `adapters`: description of adapters that the model has.
    """

    model: MMInterleaved
    tokenizer: Tokenizer
    file: Documents
    documents: int
    seed: int = 0
    text_weight: float = 1.0
    image_weight: float = 10.0
    max_bad: int = 100
    on_broken: Callable[[str], None] = lambda reason: None
    adapters: str = "none"
    name: str = field(default="documents", init=False)

    def __post_init__(self) -> None:
        self._order = MixedOrder(self.file, self.seed)
        self._broken: dict[int, str] = {}

    @property
    def module(self) -> nn.Module:
        return self.model

    @property
    def broken(self) -> Mapping[int, str]:
        """Documents that cannot be read, as far as they have been met, with the reasons."""
        return self._broken

    def describe(self) -> dict[str, object]:
        return {
            "model": to_json(self.model.config),
            "data": self.file.sha256,
            "documents": self.documents,
            "text_weight": self.text_weight,
            "image_weight": self.image_weight,
            "lora": self.adapters,
        }

    def document(self, index: int, epoch: int = 0) -> TokenDocument:
        """Document `index` of the file as tokens, with the draws of `epoch`. Raises
        `DocumentError`."""
        config = self.model.config
        made = tokens_of(
            self.file.parts(index, epoch),
            continued(self.tokenizer),
            config.tokens,
            config.visual_tokens,
            read_all=True,
            given_learn=False,
        )
        if made.size > config.llama.context:
            raise DocumentError(
                "the document is too long for the model",
                expected=f"at most {config.llama.context} tokens",
                got=made.size,
                fix="cut it into several",
            )
        if not made.weight.any() and not any(made.drawn):
            raise DocumentError("nothing in the document is learned")
        return made

    def batch(self, index: int, rng: np.random.Generator) -> DocumentBatch:
        found, broken = [], []
        for position in range(index * self.documents, (index + 1) * self.documents):
            number, epoch = self._order[position]
            for _ in range(_SPARE):
                try:
                    found.append(self.document(number, epoch))
                    break
                except DocumentError as error:
                    last = number, str(error)
                    if not (isinstance(error, Skipped) and error.by_rule):
                        broken.append(last)
                number = self._order.another(number, rng)
            else:
                number, reason = last
                raise DocumentError(
                    f"{_SPARE} documents in a row cannot be read, "
                    f"the last of them {self.file.name(number)}: {reason}"
                )
        config = self.model.config
        longest = max(document.size for document in found)
        rows = make_rows(found, config.tokens, longest)
        return DocumentBatch(batch_of(rows, config), tuple(broken))

    def losses(self, batch: DocumentBatch) -> dict[str, Tensor]:
        self.report(batch.broken)
        losses = self.model(
            batch.batch, text_weight=self.text_weight, image_weight=self.image_weight
        )
        return {"total": losses.total, "text": losses.text, "image": losses.image}

    def shared(self, batch: DocumentBatch) -> tuple[Parts, Broken]:
        return parts_of(batch.batch), batch.broken

    def agreed(
        self, batches: Sequence[DocumentBatch], known: Sequence[Sequence[tuple[Parts, Broken]]]
    ) -> list[DocumentBatch]:
        for one in zip(*known, strict=True):
            for _, broken in one:
                self.report(broken)
        wanted = [all_parts(parts for parts, _ in one) for one in zip(*known, strict=True)]
        wanted[-1] = all_parts(wanted)
        return [
            replace(batch, batch=with_parts(batch.batch, parts, self.model.config))
            for batch, parts in zip(batches, wanted, strict=True)
        ]

    def report(self, broken: Iterable[tuple[int, str]]) -> None:
        """Report the broken documents that are new; a worker process or another rank may have met
        them. Raises `DocumentError` for more than `max_bad`."""
        for number, reason in broken:
            if number in self._broken:
                continue
            self._broken[number] = reason
            self.on_broken(f"{self.file.name(number)} is left out: {reason}")
            if len(self._broken) > self.max_bad:
                raise DocumentError(
                    f"more than {self.max_bad} documents cannot be read, "
                    f"the last of them {self.file.name(number)}: {reason}",
                    fix="repair them, or allow more with --max-bad",
                )
