"""The documents stage: targets, order, broken documents, and losses in context alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmi_deploy.documents.document import Text, document_of, encode_document
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import DocumentError
from mmi_deploy.spec.presets import tiny
from mmi_train.data.document_file import DocumentFile
from mmi_train.data.synthetic.vocabulary import build_tokenizer
from mmi_train.model.losses import IGNORE
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.training.stages.documents import DocumentsStage

CONFIG = replace(tiny(), vision=replace(tiny().vision, image_size=32))
TOKENS = CONFIG.tokens
TOKENIZER = Tokenizer(build_tokenizer(), TOKENS)


@pytest.fixture(scope="module")
def model() -> MMInterleaved:
    torch.manual_seed(0)
    return MMInterleaved(CONFIG).eval()


Make = Callable[..., DocumentsStage]


@pytest.fixture
def stage(model: MMInterleaved, tmp_path: Path) -> Make:
    for index in range(3):
        picture = np.random.default_rng(index).integers(0, 256, (80, 90, 3), np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{index}.png")

    def make(*documents: Any, per_batch: int = 2, **more: Any) -> DocumentsStage:
        path = tmp_path / "documents.jsonl"
        path.write_text("\n".join(json.dumps(document) for document in documents))
        return DocumentsStage(model, TOKENIZER, DocumentFile(path), per_batch, **more)

    return make


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_what_is_given_is_read_and_what_is_learned_is_a_target(stage: Make) -> None:
    document = [
        {"text": "a red circle.", "learn": False},
        {"image": "0.png", "learn": False},
        {"text": "a blue square."},
        {"image": "1.png"},
    ]
    made = stage(document).document(0)
    image = [TOKENS.boi] + [TOKENS.image] * CONFIG.visual_tokens
    given, learned = (TOKENIZER.encode(text) for text in ("a red circle.", "a blue square."))
    assert made.token_ids.tolist() == [TOKENS.bos, *given, *image, *learned, *image, TOKENS.eos]
    # The blue square, the token that announces the drawn picture, and the end after it.
    assert made.token_ids[made.weight > 0].tolist() == [*learned, TOKENS.boi, TOKENS.eos]
    assert made.drawn == (False, True) and made.encoded == (True, True)


def test_a_prompt_has_the_tokens_that_the_runtime_gives_it(stage: Make) -> None:
    document = [{"text": "a red circle.", "learn": False}, {"text": " a blue square."}]
    made = stage(document).document(0)
    prompt = encode_document(document_of(Text("a red circle.")), TOKENIZER, CONFIG).token_ids
    np.testing.assert_array_equal(made.token_ids[: len(prompt)], prompt)
    assert not made.weight[: len(prompt)].any() and made.weight[len(prompt) :].all()


def test_every_document_comes_once_an_epoch_whatever_the_batch(stage: Make) -> None:
    words = ["red", "blue", "green", "yellow", "purple", "cyan"]
    documents = [[{"text": f"a {word} circle."}] for word in words]
    seen = []
    for per_batch in (1, 2, 3):
        one = stage(*documents, per_batch=per_batch, seed=5)
        rows = [
            row
            for index in range(6 // per_batch)
            for row in one.batch(index, rng()).batch.token_ids.tolist()
        ]
        seen.append(sorted(tuple(row) for row in rows))
        assert len(set(seen[-1])) == 6
    assert seen[0] == seen[1] == seen[2]


def test_batches_depend_on_their_number_alone(stage: Make) -> None:
    documents = [[{"text": "a red circle."}, {"image": f"{k % 3}.png"}] for k in range(5)]
    one, other = stage(*documents), stage(*documents)
    for index in (7, 0, 7):
        a, b = one.batch(index, rng()).batch, other.batch(index, rng()).batch
        assert torch.equal(a.token_ids, b.token_ids)
        assert a.pixels is not None and b.pixels is not None and torch.equal(a.pixels, b.pixels)


def test_packed_documents_have_the_losses_that_they_have_alone(
    stage: Make, model: MMInterleaved
) -> None:
    """A long document, and two short ones that share a row."""
    short = [{"text": "a red circle."}], [{"text": "a blue square."}]
    long = [{"text": "a red circle. a blue square. a green circle. a red square."}]
    together = stage(*short, long, per_batch=3).batch(0, rng()).batch
    assert len(together.token_ids) == 2
    assert together.layout is not None and together.layout.rows.mask is not None

    def summed(batch: Any) -> tuple[float, int]:
        assert batch.layout is not None
        count = len(batch.layout.target_row)
        return float(model(batch).text) * count, count

    with torch.inference_mode():
        alone = [summed(stage(one, per_batch=1).batch(0, rng()).batch) for one in (*short, long)]
        total, count = summed(together)
    assert count == sum(one[1] for one in alone)
    assert total == pytest.approx(sum(one[0] for one in alone), rel=1e-5)


def test_broken_documents_are_reported_once_and_replaced(stage: Make) -> None:
    told: list[str] = []
    good = [{"text": "a red circle."}]
    one = stage(good, [{"image": "none.png"}], [{"text": "a zebra."}], good, on_broken=told.append)
    for index in range(6):  # three epochs
        made = one.batch(index, rng())
        ids = made.batch.token_ids
        assert (ids == TOKENS.bos).sum() == 2
        assert (made.batch.text_target != IGNORE).any()
        one.report(made.broken)
    assert len(told) == 2 and set(one.broken) == {1, 2}
    assert any("line 2" in line and "there is no picture" in line for line in told)
    assert any("line 3" in line and "does not know 'zebra'" in line for line in told)


def test_too_many_broken_documents_end_the_run(stage: Make) -> None:
    good, bad = [{"text": "a red circle."}], [{"text": "a zebra."}]
    one = stage(good, bad, bad, per_batch=3, max_bad=1)
    with pytest.raises(DocumentError, match=r"more than 1 documents cannot be read.*--max-bad"):
        one.report(one.batch(0, rng()).broken)
    with pytest.raises(DocumentError, match="documents in a row cannot be read.*zebra"):
        stage(bad, bad, max_bad=10**6).batch(0, rng())


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ([{"text": "a red circle. " * 1000}], "too long for the model; expected at most"),
        ([{"text": "a red circle.", "learn": False}], "nothing in the document is learned"),
        ([{"image": "0.png", "learn": False}], "nothing in the document is learned"),
        ([{"text": "<s>"}], "reserves for its own marks"),
    ],
)
def test_documents_that_teach_nothing_or_do_not_fit(stage: Make, document: Any, said: str) -> None:
    with pytest.raises(DocumentError, match=said):
        stage(document).document(0)
