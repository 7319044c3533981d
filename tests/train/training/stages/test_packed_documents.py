"""Packed rows of a mixture: caps, what is learned, and a stream that nothing but its places
decides."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmi_bench.paper_small.base_model import build_tokenizer, vocabulary
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import MmiError
from mmi_deploy.spec.presets import tiny
from mmi_train.data.document_file import DocumentFile
from mmi_train.data.readers.mixture import SetChoice, open_mixture
from mmi_train.data.synthetic.published_trees import Sizes, write_tree
from mmi_train.data.synthetic.world import easy
from mmi_train.model.losses import IGNORE
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.training.fine_tuning import FineTuning, stage_class
from mmi_train.training.loop import micro_batches
from mmi_train.training.stages.documents import DocumentsStage
from mmi_train.training.stages.packed_documents import PackedDocumentsStage

CONFIG = replace(tiny(), llama=replace(tiny().llama, context=160, vocab=len(vocabulary())))
TOKENS = CONFIG.tokens
CHOICES = {
    "mmc4": SetChoice(weight=2, rows=3, images=5, truncation="image"),
    "laion-en": SetChoice(weight=1, images=4, truncation="document"),
    "cc12m": SetChoice(weight=1, images=30, truncation="document"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    for name in CHOICES:
        write_tree(folder / name, name, easy(), Sizes(40, 1))
    return folder


@pytest.fixture(scope="module")
def model() -> MMInterleaved:
    torch.manual_seed(0)
    return MMInterleaved(CONFIG)


def stage(root: Path, model: MMInterleaved, **more: object) -> PackedDocumentsStage:
    tokenizer = Tokenizer(build_tokenizer(), TOKENS)
    mixture = open_mixture(root, CHOICES, rows=2)
    return PackedDocumentsStage(model, tokenizer, mixture, 1, **more)  # type: ignore[arg-type]


def test_a_micro_batch_is_of_one_source_with_its_rows_and_caps(
    root: Path, model: MMInterleaved
) -> None:
    made = stage(root, model)
    for source, (rows, images) in enumerate(((3, 5), (2, 4), (2, 30))):
        found, reader = made.rows(source, 1)
        assert len(found) == rows and not reader.broken
        for row in found:
            assert len(row.token_ids) <= 160 and 1 <= len(row.images) <= images
            assert (row.token_ids == TOKENS.boi).sum() == len(row.images)
        if source == 1:  # a row of pairs that has all its pictures ends where a pair does
            assert all(row.token_ids[-1] == TOKENS.eos for row in found)
    assert max(len(row.images) for row in made.rows(0, 1)[0]) == 5


def test_captions_of_laion_before_their_picture_are_not_learned(
    root: Path, model: MMInterleaved
) -> None:
    """As published; those of the other sets are."""
    made = stage(root, model)
    learned = {}
    for place in range(12):
        source, _ = made._order.turns[place]
        batch = made.batch(place, np.random.default_rng(0)).batch
        ids, target = batch.token_ids, batch.text_target
        assert target is not None
        first = (ids == TOKENS.boi).float().argmax(1)
        begins_with_text = first > 1
        before = torch.arange(ids.shape[1] - 1) < (first - 1)[:, None]
        learned.setdefault(source, 0)
        learned[source] += int((target != IGNORE)[before & begins_with_text[:, None]].sum())
    assert learned[1] == 0 and learned[2] > 0 and learned[0] > 0


def test_neither_ranks_nor_workers_nor_a_restart_change_the_stream(
    root: Path, model: MMInterleaved
) -> None:
    """(1 rank, 0 workers) = (4 ranks, 3 workers each), also when begun in the middle."""
    device = torch.device("cpu")

    def stream(numbers: range, workers: int) -> dict[int, torch.Tensor]:
        batches = micro_batches(stage(root, model, seed=3), 3, numbers, workers, device)
        return {index: made.batch.token_ids for index, made in batches}

    alone = stream(range(8), 0)
    shared = {}
    for rank in range(4):
        shared |= stream(range(rank, 8, 4), 3)
    resumed = stream(range(5, 8), 0)
    assert alone.keys() == shared.keys()
    assert all(torch.equal(alone[index], shared[index]) for index in alone)
    assert all(torch.equal(alone[index], resumed[index]) for index in resumed)


def test_turns_of_a_source_follow_each_other_through_its_documents(
    root: Path, model: MMInterleaved
) -> None:
    """A stride is the mean of what a micro-batch reads: in one epoch nearly every document is read,
    and few are read twice."""
    made = stage(root, model)
    seen: Counter[int] = Counter()
    for turn in range(40 // made.strides[2]):
        _, reader = made.rows(2, turn)
        seen.update(made.place(2, turn * made.strides[2] + step)[0] for step in range(reader.read))
    assert len(seen) > 0.8 * 40 and sum(seen.values()) < 1.5 * 40
    assert made.describe()["strides"] == made.strides == stage(root, model).strides


def test_broken_pictures_are_reported_and_many_end_the_run(
    root: Path, model: MMInterleaved, tmp_path: Path
) -> None:
    write_tree(tmp_path / "cc12m", "cc12m", easy(), Sizes(30, 1))
    (tmp_path / "cc12m" / "images" / "00000" / "000000003.jpg").write_text("no picture")
    tokenizer = Tokenizer(build_tokenizer(), TOKENS)
    told: list[str] = []
    mixture = open_mixture(tmp_path, {"cc12m": SetChoice(weight=1)}, rows=4)
    made = PackedDocumentsStage(model, tokenizer, mixture, 1, on_broken=told.append)
    for place in range(3):
        made.report(made.batch(place, np.random.default_rng(0)).broken)
    assert len(told) == 1 and "sample 3 of cc12m" in told[0] and "picture is broken" in told[0]
    for path in (tmp_path / "cc12m" / "images").rglob("*.jpg"):
        path.unlink()
    with pytest.raises(MmiError, match="200 documents in a row cannot be used.*cc12m.*missing"):
        made.batch(0, np.random.default_rng(0))


def test_documents_of_a_file_are_kept_apart(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('[{"text": "a"}]')
    packed = FineTuning(packed=True)
    assert stage_class(packed, DocumentFile(path)) is DocumentsStage
    assert stage_class(packed, open_mixture(root, CHOICES)) is PackedDocumentsStage
    assert stage_class(FineTuning(), open_mixture(root, CHOICES)) is DocumentsStage
