"""The evaluation: an oracle is always right, blind means blind, grades are what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmi_deploy.spec.presets import tiny
from mmi_train.data.synthetic.tasks import TaskImage
from mmi_train.data.synthetic.vocabulary import build_tokenizer
from mmi_train.data.synthetic.world import easy, split_of
from mmi_train.evaluation.contact_sheet import contact_sheet
from mmi_train.evaluation.synthetic_tasks import (
    KINDS,
    Evaluation,
    Evaluator,
    Metrics,
    evaluate,
    metric_of,
    questions_of,
    without_mmfs,
)
from mmi_train.model.mm_interleaved import MMInterleaved


@pytest.fixture(scope="module")
def model() -> MMInterleaved:
    torch.manual_seed(0)
    return MMInterleaved(tiny()).eval()


class Oracle(Evaluator):
    """Gives the true answer to every question, or the true answer to another one."""

    def __init__(self, model: MMInterleaved, shift: int = 0) -> None:
        super().__init__(model, build_tokenizer())
        self.shift = shift

    def run(self, questions, metrics):
        self.truths = [question.part for question in questions]
        self.index = {id(question.prompt): i for i, question in enumerate(questions)}
        return super().run(questions, metrics)

    def _truth(self, prompt):
        return self.truths[(self.index[id(prompt)] + self.shift) % len(self.truths)]

    def write(self, prompts):
        return [self._truth(prompt).text for prompt in prompts]

    def draw(self, prompts):
        return [self._truth(prompt).image for prompt in prompts]


def graded(model: MMInterleaved, shift: int) -> Metrics:
    metrics = Metrics()
    oracle = Oracle(model, shift)
    for _, questions in questions_of(oracle, easy(), 8, seed=3):
        oracle.run(questions, metrics)
    return metrics


def test_true_answers_are_graded_right_everywhere(model):
    metrics = graded(model, shift=0)
    assert len(metrics.names()) > 20
    for name in metrics.names():
        value, count = metrics.mean(name)
        assert count > 0
        least = 0.8 if name == "box: mean IoU" else 1.0  # box tokens are two pixels apart
        assert value >= least, name


def test_answers_to_other_questions_are_graded_wrong(model):
    metrics = graded(model, shift=1)
    for name in ("caption: exact", "drawing: whole scene", "story: whole scene"):
        assert metrics.mean(name)[0] < 0.3, name
    assert metrics.mean("box: mean IoU")[0] < 0.5


def test_questions_are_held_out_and_the_same_every_time(model):
    evaluator = Evaluator(model, build_tokenizer())
    first, again = (list(questions_of(evaluator, easy(), 4, seed=1)) for _ in range(2))
    for (kind, questions), (_, others) in zip(first, again, strict=True):
        assert len(questions) == 4, kind
        for question, other in zip(questions, others, strict=True):
            assert split_of(question.scene) == "held_out"
            assert np.array_equal(question.prompt.token_ids, other.prompt.token_ids)


def test_a_prompt_stops_right_before_its_answer(model):
    evaluator = Evaluator(model, build_tokenizer())
    tokens = model.config.tokens
    for _, questions in questions_of(evaluator, easy(), 3, seed=2):
        for question in questions:
            last = question.prompt.token_ids[-1]
            if isinstance(question.part, TaskImage):
                assert last == tokens.boi
            else:
                assert evaluator.tokenizer.id_to_token(int(last)) in (":", "?", ".")


def test_switched_off_means_that_the_image_of_a_story_cannot_be_seen_by_mmfs(model):
    """With gates and convolutions at zero nothing but the visual tokens tells of an image."""
    blind = without_mmfs(model)
    features = torch.randn(1, 340, 128)
    tokens = torch.zeros(1, model.config.visual_tokens, model.config.llama.width)
    ids = torch.tensor([[1, 3, *[4] * model.config.visual_tokens, 20, 21]])
    slot = torch.zeros(1, 1, dtype=torch.int32)
    from mmi_train.model.mm_interleaved import EncodedImages

    seen = blind.read(ids, EncodedImages(tokens, features), slot)
    other = blind.read(ids, EncodedImages(tokens, -features), slot)
    assert torch.equal(seen, other)


def test_question_kinds_are_told_from_their_words():
    assert metric_of("how many shapes?") == "answer: count"
    assert metric_of("what is at top left?") == "answer: object"
    with pytest.raises(StopIteration):
        metric_of("why?")


def test_what_was_not_measured_is_not_in_the_table():
    """JSON has no number for it."""
    seeing, blind = Metrics(), Metrics()
    seeing.add("caption: exact", 1, 1.0)
    assert "without_mmfs" not in Evaluation(seeing, blind, ()).as_json()["caption: exact"]
    blind.add("caption: exact", 1, 0.0)
    assert Evaluation(seeing, blind, ()).as_json()["caption: exact"]["without_mmfs"] == 0.0


@pytest.mark.slow
def test_the_whole_evaluation_runs_and_its_sheet_can_be_drawn(model):
    told: list[tuple[str, int, int]] = []
    found = evaluate(
        model, build_tokenizer(), easy(), count=2, steps=2, progress=lambda *x: told.append(x)
    )
    assert told == [(f"{kind}, {m}", 0, 2) for m in ("with MMFS", "MMFS off") for kind in KINDS]
    table = found.as_json()
    assert {"caption: exact", "answer: all", "box: IoU > 0.5", "segmentation: mIoU"} <= set(table)
    for entry in table.values():
        assert 0 <= entry["value"] <= 1 and entry["count"] > 0
        assert 0 <= entry["without_mmfs"] <= 1
    sheet = contact_sheet(found.samples, columns=2)
    assert np.asarray(sheet).std() > 0
