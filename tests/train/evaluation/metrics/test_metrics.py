"""Metrics on cases worked out by hand; the published code's are in golden/test_metric_cases.py."""

from __future__ import annotations

import math
import random
import time

import numpy as np
import pytest

from mmi_train.evaluation.metrics import boxes, captions, mean_iou, ptb_tokens, vqa
from mmi_train.evaluation.metrics.anls import anls, edit_distance
from mmi_train.evaluation.metrics.caption_tokens import (
    TOKENIZER,
    java_archive,
    tokenizer,
    without_punctuation,
)
from mmi_train.evaluation.metrics.ndcg import ndcg, ranks_of
from mmi_train.evaluation.metrics.relaxed_accuracy import relaxed_match


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The two Dogs.", "2 dogs"),
        ("T-shirt", "t shirt"),
        ("1,500,000", "1500000"),
        ("dont", "don't"),
        ("mightntve", "mightntve"),
        ("mightn'tve", "mightn't've"),
        ("A.B." * 30, "ab" * 30),
    ],
)
def test_answers_are_normalised(text: str, plain: str) -> None:
    assert vqa.normalised(text) == plain


def test_flags_of_the_published_code_are_off_by_default() -> None:
    same = ["Blue"] * 10
    assert vqa.accuracy("blue.", same) == 1
    assert vqa.accuracy("blue.", same, raw_when_unanimous=True) == 0
    people = ["red"] * 4 + ["a car"] * 6
    assert vqa.accuracy("red", people) == pytest.approx(1.0)
    assert vqa.accuracy("red", people, equal_answers_together=True) == pytest.approx(0.6)
    assert vqa.accuracy("car", people, raw_answers=True) == 0
    long = "x." * 40
    assert "." not in vqa.normalised(long)
    assert vqa.normalised(long, few_full_stops=True).count(".") == 8
    assert vqa.normalised("isnt", apostrophe="’") == "isn’t"


def test_three_equal_answers_of_others_are_enough() -> None:
    """With three equal answers among ten, each of those three people has two others."""
    assert vqa.accuracy("cup", ["cup"] * 3 + ["mug"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)


def test_anls_is_the_nearest_answer_above_one_half() -> None:
    assert anls("Graveyard", ["grave yard", "x"]) == pytest.approx(0.9)
    assert anls("abc", ["abcdef"]) == 0  # a distance of exactly one half
    assert anls("abcd", ["abcdefg"]) == pytest.approx(4 / 7)
    assert anls("anything", []) == 0 and anls("", [""]) == 1
    assert anls("page " * 100_000, ["page"]) == 0  # at once
    assert edit_distance("kitten", "sitting") == 3


def distance_by_table(a: str, b: str) -> int:
    before = list(range(len(b) + 1))
    for row, x in enumerate(a, 1):
        now = [row]
        for column, y in enumerate(b, 1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (x != y)))
        before = now
    return before[-1]


def test_the_edit_distance_is_that_of_the_table() -> None:
    rng = random.Random(0)
    for _ in range(300):
        a, b = ("".join(rng.choices("abé ", k=rng.randint(0, 70))) for _ in range(2))
        assert edit_distance(a, b) == distance_by_table(a, b), (a, b)


@pytest.mark.timing
def test_pages_of_30_000_letters_take_a_second() -> None:
    """The table would take minutes."""
    rng = random.Random(0)
    a, b = ("".join(rng.choices("abcdefgh ", k=30_000)) for _ in range(2))
    begun = time.process_time()
    assert edit_distance(a, b) > 15_000
    assert time.process_time() - begun < 5


def test_numbers_are_relaxed_and_texts_are_not() -> None:
    assert relaxed_match("52.5", "50") and not relaxed_match("52.51", "50")
    assert relaxed_match(" 3.1e2 ", "300") and not relaxed_match("0.001", "0")
    assert relaxed_match("NaN", "nan") and not relaxed_match("inf", "3")
    assert not relaxed_match("reds", "red")


def test_boxes_overlap() -> None:
    assert boxes.iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert boxes.counts(boxes.iou((0, 0, 1, 1), (0, 0, 1, 0.5)))
    assert math.isnan(boxes.iou(boxes.NO_BOX, boxes.NO_BOX)) and not boxes.counts(math.nan)
    assert boxes.in_pixels((0, 999, 999, 111), 640, 333) == pytest.approx((0, 333, 640, 37))


def test_ndcg_counts_as_many_ranks_as_there_are_relevant_options() -> None:
    assert ranks_of([0.1, 3.0, 0.1, 2.0]) == [3, 1, 4, 2]
    assert ndcg([1, 2, 3], [0.0, 1.0, 0.0]) == 0
    found = ndcg([2, 1, 3], [1.0, 0.5, 0.0])
    assert found == pytest.approx((0.5 + 1 / np.log2(3)) / (1 + 0.5 / np.log2(3)))
    assert ndcg([1, 2], [0.0, 0.0]) is None


def test_mean_iou_leaves_out_absent_classes() -> None:
    label, prediction = np.array([[1, 1, 2, 0]]), np.array([[0, 1, 1, 3]])
    both, union = mean_iou.overlaps(prediction, label, 5)
    assert both.tolist() == [1, 1, 0, 0, 0] and union.tolist() == [2, 2, 0, 0, 0]
    assert mean_iou.mean_iou(both, union) == pytest.approx(0.5)
    assert mean_iou.mean_iou(both, union, absent_classes_as_zero=True) == pytest.approx(0.2)


def test_colours_of_ade20k_are_read_back_with_noise() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 151, (30, 40))
    noise = rng.integers(-20, 21, (30, 40, 3))  # half of the distance between colours is 21
    colours = (mean_iou.colours_of(labels).astype(int) + noise).clip(0, 255).astype(np.uint8)
    assert (mean_iou.labels_of(colours) == labels).all()
    with pytest.raises(IndexError):
        mean_iou.colours_of(np.array([[-1]]))


def common_by_table(a: list[str], b: list[str]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else best
    return table[-1][-1]


def test_the_common_subsequence_is_that_of_the_table() -> None:
    rng = random.Random(0)
    for _ in range(200):
        a, b = (rng.choices("abcd", k=rng.randint(1, 12)) for _ in range(2))
        assert captions.common_length(a, b) == common_by_table(a, b)


def test_scores_of_captions_by_hand() -> None:
    """Two words of three match, one pair of two, in the order of the reference."""
    terms = np.array([captions.bleu_terms("the red kite", ["the red boat"])], np.float64)
    assert float(captions.bleu(terms, 1)[0]) == pytest.approx(2 / 3)
    assert float(captions.bleu(terms, 2)[0]) == pytest.approx(math.sqrt(2 / 3 * 1 / 2))
    assert captions.rouge_l("the red kite", ["the red boat"]) == pytest.approx(2 / 3)
    short = np.array([captions.bleu_terms("red kite", ["the red kite here"])], np.float64)
    assert float(captions.bleu(short, 1)[0]) == pytest.approx(math.exp(1 - 2))
    # A caption that equals its only reference, whose words no other picture has, scores 10.
    texts = ["a b c d e", "v w x y z"]
    assert captions.cider_values(texts, [[text] for text in texts]) == pytest.approx([10, 10])
    assert captions.cider_values(["v w x y z"] * 2, [[t] for t in texts]) == pytest.approx([0, 10])


SENTENCES = (
    "A man's dog isn't far, is it? It's over there!",
    "He can't (or won't) pay $3.50 at 5:30 p.m. -- nobody cannot.",
    "Two-story house w/ a red/white awning; the kids' bikes... 1,000 of them",
    "“Quoted” ‘text’ — Mr. & Mrs. O'Neil's 90's T-shirt, 'twas 12-inch",
)


def test_punctuation_does_not_count() -> None:
    line = ptb_tokens.token_lines(['Well (yes)!!! It isn\'t -- "so".'])[0]
    assert without_punctuation(line) == "well yes it is n't so"
    kept = without_punctuation(line, brackets_stay=True)
    assert kept == "well -lrb- yes -rrb- !!! it is n't so"


@pytest.mark.skipif(java_archive(TOKENIZER) is None, reason="needs Java and pycocoevalcap")
def test_the_python_tokenizer_agrees_with_the_java_one() -> None:
    tokenize, said = tokenizer()
    assert said == ""
    ours = [without_punctuation(line) for line in ptb_tokens.token_lines(SENTENCES)]
    assert tokenize(SENTENCES) == ours
    assert tokenize(["", "a\u2028b\r\nc", "you're"]) == ["", "a b c", "you 're"]


def test_without_java_scores_have_a_name_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    tokenize, said = tokenizer()
    assert said == "python tokens" and tokenize(["A dog."]) == ["a dog"]
