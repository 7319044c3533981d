"""Plan of a fine-tuning run: what each rank would hold and compute, found without its weights.

A step runs forwards and backwards on fake tensors, which have shapes, types and a device but no
memory, while every storage that lives is counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import DocumentError
from mmi_deploy.spec.config import ImageDecoderConfig
from mmi_train.data.batches import batch_of, packed_batch
from mmi_train.data.documents import Documents
from mmi_train.data.rows import TokenDocument, make_rows
from mmi_train.model.autocast import mixed_precision, without_norm_warnings
from mmi_train.model.layout import map_tensors
from mmi_train.model.mm_interleaved import Batch
from mmi_train.training.checkpoints import learning
from mmi_train.training.fine_tuning import (
    DISTILLATIONS,
    FineTuning,
    check_distillation,
    stage_class,
)
from mmi_train.training.lora import add_adapters, stored_name
from mmi_train.training.optimiser import frozen_matrices, parameter_groups
from mmi_train.training.ranks import sharded_units
from mmi_train.training.stages import CRITIC_PREFIX, MODEL_PREFIX
from mmi_train.training.stages.distillation import (
    UNET,
    ConsistencyStage,
    DistillationStage,
    teacher_of,
)
from mmi_train.training.stages.documents import DocumentBatch, DocumentsStage
from mmi_train.training.stages.packed_documents import PackedDocumentsStage
from mmi_train.weights.model_folder import TOKENIZER, open_model, types_in_memory

# Documents among which the longest is looked for: every one is decoded.
MOST_READ = 500

# Largest micro-batch that is looked for.
MOST_BATCH = 2**16

# Scalar loss of a micro-batch.
Loss = Callable[[Batch], Tensor]

# Bytes of a value in NF4: four bits, a byte of scale for 64 values, four bytes for 256 scales.
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)


# What every rank holds whole, and what is in a checkpoint, by the names of `MemoryPlan.held`.
WHOLE = ("4-bit weights", "tables")
_IN_CHECKPOINTS = ("learning weights", "adapters", "AdamW's moments", "averages (EMA)")


@dataclass(frozen=True)
class Step:
    """A micro-batch: bytes of activations and gradients at its peak, and FLOPs of its forward and
    backward pass, recomputation included."""

    peak: int
    flops: int


@dataclass(frozen=True)
class Unit:
    """Bytes of the weights that ranks gather together, and of those among them that learn."""

    weights: int
    learning: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a run. `held`: by what they are, on all ranks together; `steps`: a micro-batch by
    (documents, gradient checkpointing); `tokens`: of the longest document that was read; `units`:
    what `ranks` gather together, the rest of the model last; `accumulate`: micro-batches of a step;
    `largest`: bytes of the largest tensor of the file, and of the largest that is read whole.
    """

    held: Mapping[str, int]
    steps: Mapping[tuple[int, bool], Step]
    tokens: int
    units: Sequence[Unit] = ()
    accumulate: int = 1
    ranks: int = 1
    largest: tuple[int, int] = (0, 0)

    def per_rank(self, batch: int, checkpointed: bool) -> int:
        """Bytes of a rank while it trains."""
        held = sum(map(self.share, self.held))
        return held + self.gathered + self.activations(batch, checkpointed)

    def share(self, name: str) -> int:
        """Bytes of a rank of what is held under this name: its shards, or all of it."""
        return self.held[name] if name in WHOLE else -(-self.held[name] // self.ranks)

    @property
    def reading(self) -> int:
        """Most bytes of the rows that a rank has read and not yet given their type and device."""
        sharded, whole = self.largest
        return max(-(-sharded // self.ranks), whole)

    @property
    def checkpoint_copy(self) -> int:
        """Bytes of host memory that a rank's shards take a second time while they are written in
        the background; one process writes at once, without a copy."""
        if self.ranks == 1:
            return 0
        return sum(self.share(name) for name in self.held if name in _IN_CHECKPOINTS)

    @property
    def gathered(self) -> int:
        """Most bytes of whole weights and gradients that a rank has beside its shards: of the unit
        it computes, of the next, which is fetched meanwhile, and of the rest of the model; with
        accumulation the gradients of all units until they are averaged."""
        if self.ranks == 1:
            return 0
        *parts, rest = self.units
        largest = max((unit.weights for unit in parts), default=0)
        if self.accumulate > 1:
            gradients = sum(unit.learning for unit in self.units)
        else:
            gradients = rest.learning + max((unit.learning for unit in parts), default=0)
        return rest.weights + min(2, len(parts)) * largest + gradients

    def activations(self, batch: int, checkpointed: bool) -> int:
        """Bytes that a micro-batch of `batch` documents takes beside all gradients."""
        return max(self._line("peak", batch, checkpointed) - self.held["gradients"], 0)

    def flops(self, batch: int, checkpointed: bool) -> int:
        """FLOPs of a micro-batch of `batch` documents."""
        return self._line("flops", batch, checkpointed)

    def _line(self, what: str, batch: int, checkpointed: bool) -> int:
        """The value at `batch` on the line through the two numbers of documents measured."""
        sizes = [size for size, kind in self.steps if kind == checkpointed]
        few, many = min(sizes), max(sizes)
        low, high = (getattr(self.steps[size, checkpointed], what) for size in (few, many))
        return int(low + (high - low) * (batch - few) // max(many - few, 1))

    def largest_batch(self, memory: int, checkpointed: bool) -> int:
        """Most documents of a micro-batch that fit into `memory` bytes; 0: not even one."""
        if self.per_rank(1, checkpointed) > memory:
            return 0
        fits = 1
        while self.per_rank(2 * fits, checkpointed) <= memory and fits < MOST_BATCH:
            fits *= 2
        for step in (fits >> power for power in range(1, fits.bit_length())):
            fits += step if self.per_rank(fits + step, checkpointed) <= memory else 0
        return fits


def memory_plan(
    start: Path,
    file: Documents,
    tuning: FineTuning,
    *,
    precision: Literal["bf16", "fp32"] = "bf16",
    accumulate: int = 1,
    ranks: int = 1,
    checkpointed: Sequence[bool] = (False, True),
    batches: Sequence[int] | None = None,
    teacher: Path | None = None,
) -> MemoryPlan:
    """Plan the run that `fine_tune` would do; its micro-batches have the length of the longest
    document among the first `MOST_READ` of `file`. checkpointed: without and with gradient
    checkpointing. batches: numbers of documents for which a step is followed; None: one, and the
    run's. teacher: model folder whose U-Net is distilled; None: that of `start`. Raises `MmiError`
    as the run would."""
    taught = check_distillation(start, teacher, tuning, ranks)
    rules = tuning.optimiser(1).rules
    model, stored = open_model(start)
    lean = frozen_matrices(rules) if precision == "bf16" else None
    types = types_in_memory(model, stored, torch.float32, lean)
    in_four_bits: set[str] = set()
    if tuning.lora is not None:
        layers = add_adapters(model, replace(tuning.lora, four_bit=False))
        for layer in layers:
            types[f"{layer}.base_layer.weight"] = types.pop(f"{layer}.weight")
        if tuning.lora.four_bit:
            in_four_bits = {f"{layer}.base_layer.weight" for layer in layers}
    parameter_groups(model, tuning.optimiser(1))
    sizes_in_file = {name: one.shape.numel() * one.dtype.itemsize for name, one in stored.items()}
    quantised = {stored_name(name) for name in in_four_bits}
    largest = (
        max(size for name, size in sizes_in_file.items() if name not in quantised),
        max((sizes_in_file[name] for name in quantised), default=0),
    )
    sizes = batches or (1, max(tuning.batch, 2))
    tokenizer = Tokenizer.open(start / TOKENIZER, model.config.tokens)
    source = stage_class(tuning, file)(model, tokenizer, file, tuning.batch)
    made = _micro_batches(source, file, sizes)
    tokens = made[min(sizes)].token_ids.shape[1]
    # The gradients of the first micro-batch are there in the second; of ranks `gathered` has them.
    rounds = 1 if accumulate == ranks == 1 else 2
    stage = _distillation(source, taught, tuning)
    module = model if stage is None else stage.module
    copies = [] if stage is None else stage.copies
    mode = FakeTensorMode()
    with mode:
        fakes: dict[Tensor, Tensor] = {}
        _make_fake(model, types, fakes)
        for unet in copies:
            own = {name.removeprefix(UNET): kind for name, kind in types.items()}
            _make_fake(unet, own, fakes)
        if isinstance(stage, ConsistencyStage):
            stage.follow({name: value.detach() for name, value in learning(model).items()})
        model.train()
        held = _held(module, in_four_bits)
        held["teacher"] = 0
        if stage is not None:
            held["teacher"] = _copied(stage.teacher.unet, module, in_four_bits)
        loss = _loss(source, stage, tuning)
        units = _units(model, in_four_bits)
        steps = {}
        for kind in checkpointed:
            model.checkpoint_gradients(kind)
            for unet in copies:
                unet.gradient_checkpointing = kind
            for size, batch in made.items():
                fake = map_tensors(batch, mode.from_tensor)
                steps[size, kind] = _step(module, fake, loss, precision, rounds)
    return MemoryPlan(held, steps, tokens, units, accumulate, ranks, largest)


def _micro_batches(
    source: DocumentsStage, file: Documents, sizes: Sequence[int]
) -> dict[int, Batch]:
    """A micro-batch of each of `sizes` documents, the longest that is found, or of packed rows,
    the first of the source whose has the most images."""
    config = source.model.config
    if isinstance(source, PackedDocumentsStage):
        rows = [source.rows(index, 0)[0][0] for index in range(len(source.mixture.sources))]
        row = max(rows, key=lambda row: (len(row.images), len(row.token_ids)))
        return {size: packed_batch([row] * size, config) for size in sizes}
    document = _longest(source, file)
    return {
        size: batch_of(make_rows([document] * size, config.tokens, document.size), config)
        for size in sizes
    }


def _longest(stage: DocumentsStage, file: Documents) -> TokenDocument:
    found: TokenDocument | None = None
    reason = ""
    for index in range(min(len(file), MOST_READ)):
        try:
            made = stage.document(index)
        except DocumentError as error:
            reason = str(error)
            continue
        if found is None or made.size > found.size:
            found = made
    if found is None:
        raise DocumentError(f"no document can be read, from {file.name(0)} on: {reason}")
    return found


def _make_fake(
    model: nn.Module, types: Mapping[str, torch.dtype], made: dict[Tensor, Tensor]
) -> None:
    """Replace weights and buffers by fake ones on the CPU, in the types of the run; what modules
    share stays shared. made: fake tensors of real ones so far."""
    for prefix, module in model.named_modules():
        for name, value in list(module._parameters.items()):
            if value is not None and value not in made:
                kind = types.get(f"{prefix}.{name}" if prefix else name, torch.float32)
                empty = torch.empty(value.shape, dtype=kind, device="cpu")
                made[value] = nn.Parameter(empty, requires_grad=value.requires_grad)
            if value is not None:
                module._parameters[name] = made[value]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer not in made:
                made[buffer] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
            if buffer is not None:
                module._buffers[name] = made[buffer]


def _held(model: nn.Module, in_four_bits: set[str]) -> dict[str, int]:
    """Bytes of weights, gradients, moments and averages by what they are."""
    found = dict.fromkeys(
        (
            "frozen weights",
            "4-bit weights",
            "learning weights",
            "adapters",
            "tables",
            "gradients",
            "AdamW's moments",
            "averages (EMA)",
        ),
        0,
    )
    learns = 0
    for name, value in model.named_parameters():
        size = value.numel() * value.dtype.itemsize
        if _own_name(name) in in_four_bits:
            found["4-bit weights"] += round(value.numel() * _NF4)
            continue
        if not value.requires_grad:
            found["frozen weights"] += size
            continue
        learns += size
        found["adapters" if ".lora_" in name else "learning weights"] += size
    found["tables"] = sum(value.numel() * value.dtype.itemsize for value in model.buffers())
    stored = sum(
        value.numel() * value.dtype.itemsize
        for name, value in model.state_dict().items()
        if name in dict(model.named_buffers())
    )
    found |= {
        "gradients": learns,
        "AdamW's moments": 2 * learns,
        "averages (EMA)": learns + stored,
    }
    return found


def _own_name(name: str) -> str:
    """Name in the model of a weight of a stage, or for the critic of its U-Net's counterpart."""
    if name.startswith(CRITIC_PREFIX):
        return UNET + name.removeprefix(CRITIC_PREFIX)
    return name.removeprefix(MODEL_PREFIX)


def _copied(teacher: nn.Module, model: nn.Module, in_four_bits: set[str]) -> int:
    """Bytes of the tensors of a teacher that it does not share with the model."""
    own = {*model.parameters(), *model.buffers()}
    size = 0.0
    for name, value in (*teacher.named_parameters(), *teacher.named_buffers()):
        if value not in own:
            size += value.numel() * (
                _NF4 if f"{UNET}{name}" in in_four_bits else value.dtype.itemsize
            )
    return round(size)


def _distillation(
    source: DocumentsStage, taught: ImageDecoderConfig, tuning: FineTuning
) -> DistillationStage | None:
    """Stage of a distillation. taught: the teacher's configuration."""
    if tuning.distill is None:
        return None
    student, teacher = tuning.distill.config_of(taught), teacher_of(source.model.image_decoder.unet)
    kind = DISTILLATIONS[student.kind]
    return kind(source, teacher, taught.branches, tuning.distill, student)


def _loss(source: DocumentsStage, stage: DistillationStage | None, tuning: FineTuning) -> Loss:
    """The loss of the run's largest step. stage: of a distillation."""
    model = source.model
    if stage is None:
        weights = {"text_weight": tuning.text_weight, "image_weight": tuning.image_weight}
        return lambda batch: model(batch, **weights).total

    return lambda batch: stage.losses(stage.costliest(DocumentBatch(batch, ())))["total"]


def _units(model: nn.Module, in_four_bits: set[str]) -> list[Unit]:
    """Bytes of the units that ranks shard; 4-bit weights stay whole, and are not gathered."""
    found = []
    known = {value for name, value in model.named_parameters() if name in in_four_bits}
    for part in sharded_units(model):
        own = set(part.parameters()) - known
        known |= own
        sizes = {value: value.numel() * value.dtype.itemsize for value in own}
        learning = sum(size for value, size in sizes.items() if value.requires_grad)
        found.append(Unit(sum(sizes.values()), learning))
    return found


class _Storages(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, as long as each lives."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.live = self.peak = 0
        self._known = WeakIdKeyDictionary(ref_type=weakref.ref)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):  # not made here: weights and the batch
                self._known.setdefault(leaf.untyped_storage(), 0)
        result = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size).atexit = False

    def _release(self, size: int) -> None:
        self.live -= size


def _step(
    module: nn.Module,
    batch: Batch,
    loss: Loss,
    precision: Literal["bf16", "fp32"],
    rounds: int,
) -> Step:
    """Run `rounds` micro-batches of one step and describe the last one."""
    module.zero_grad(set_to_none=True)
    storages = _Storages()
    for _ in range(rounds):
        storages.peak, storages.flops = storages.live, 0
        with storages, without_norm_warnings():
            with mixed_precision(precision, torch.device("cpu")):
                total = loss(batch)
            (total / rounds).backward()
            del total
    module.zero_grad(set_to_none=True)
    return Step(storages.peak, storages.flops)
