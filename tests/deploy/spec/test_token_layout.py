"""Token layout against plain loops and against the published code."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mmi_deploy.errors import DocumentError
from mmi_deploy.spec import token_layout
from mmi_deploy.spec.config import TokenConfig

TOKENS = TokenConfig(bos=1, eos=2, pad=0, boi=3, image=4)
S, B, V, T = TOKENS.bos, TOKENS.boi, TOKENS.image, 9


def random_rows(seed: int, rows: int = 4, length: int = 40) -> np.ndarray:
    """Rows with several documents and images of two tokens, some starting in mid-document."""
    rng = np.random.default_rng(seed)
    made = np.full((rows, length), TOKENS.pad)
    for row in made:
        ids: list[int] = [S] if rng.random() < 0.7 else []
        while len(ids) < length:
            ids += [[S], [T], [B, V, V]][rng.choice(3, p=(0.15, 0.6, 0.25))]
        row[:] = ids[:length]
        if row[-1] in (B, V) and list(row[-3:]) != [B, V, V]:
            row[-3:] = T
    return made


def images_of(row: np.ndarray) -> list[int]:
    return [column for column, token in enumerate(row) if token == B]


def start_of(row: np.ndarray, column: int) -> int:
    """The latest `<s>` at or before the column, -1 if none."""
    return max((c for c in range(column + 1) if row[c] == S), default=-1)


@pytest.mark.parametrize("seen", [1, 2, 49])
@pytest.mark.parametrize("seed", range(4))
def test_a_token_sees_the_nearest_images_of_its_document_counted_backwards(
    seed: int, seen: int
) -> None:
    """Published rule: image k is visible to token i iff its BoI + 1 <= i and that is after the
    latest `<s>` at or before i; the nearest has position 1."""
    ids = random_rows(seed)
    images = token_layout.image_count(ids, TOKENS)
    expected = np.zeros((*ids.shape, images), np.int32)
    for r, row in enumerate(ids):
        for i in range(len(row)):
            after = [k for k, c in enumerate(images_of(row)) if start_of(row, i) < c + 1 <= i]
            for back, k in enumerate(reversed(after), start=1):
                expected[r, i, k] = back if back <= seen else 0
    np.testing.assert_array_equal(token_layout.image_positions(ids, TOKENS, images, seen), expected)
    assert expected.max() >= min(seen, 2)


@pytest.mark.parametrize("seen", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_a_picture_looks_back_at_the_images_before_it_in_its_document(seed: int, seen: int) -> None:
    ids = random_rows(seed)
    images = token_layout.image_count(ids, TOKENS)
    expected = np.zeros((len(ids), images, images), np.int32)
    for r, row in enumerate(ids):
        columns = images_of(row)
        for i, column in enumerate(columns):
            for k in range(i):
                if columns[k] > start_of(row, column) and i - k <= seen:
                    expected[r, i, k] = i - k
    np.testing.assert_array_equal(
        token_layout.picture_positions(ids, TOKENS, images, seen), expected
    )


@pytest.mark.parametrize("seed", range(4))
def test_context_reaches_from_the_document_start_to_the_begin_of_image_token(seed: int) -> None:
    ids = random_rows(seed)
    images = token_layout.image_count(ids, TOKENS)
    expected = np.zeros((len(ids), images, 2), np.int64)
    for r, row in enumerate(ids):
        for k, column in enumerate(images_of(row)):
            expected[r, k] = max(start_of(row, column), 0), column + 1
    np.testing.assert_array_equal(token_layout.context_ranges(ids, TOKENS, images), expected)


def test_layout_of_the_published_forward_pass(golden: Callable) -> None:
    run = golden("full_forward")
    given, out = run.part("in"), run.part("out")
    tokens = TokenConfig(bos=1, eos=2, pad=511, boi=512, image=513)
    ids = given["text_ids"]
    seen = token_layout.image_positions(ids, tokens, images=3, seen=49)
    real = given["attention_mask"].astype(bool)
    np.testing.assert_array_equal((seen > 0)[real], out["cross_attention_mask"][real] > 0)

    present = np.arange(3) < given["num_image_per_seq"][:, None]
    before = token_layout.picture_positions(ids, tokens, images=3, seen=1)[present]
    np.testing.assert_array_equal(before.max(axis=1, keepdims=True), out["imgdec_mmfs_mask"])
    ranges = token_layout.context_ranges(ids, tokens, images=3)[present]
    np.testing.assert_array_equal(ranges[:, 0], given["nearest_bos_idxs"])
    lengths = out["context_attention_mask"].sum(axis=1)
    np.testing.assert_array_equal(ranges[:, 1] - ranges[:, 0], lengths)


def test_visual_tokens_stand_right_after_their_begin_of_image_token() -> None:
    ids = np.array([[S, B, V, V, T, B, V, V], [S, B, V, V, T, T, B, 0]])
    slot = np.array([[1, 0], [1, -1]])  # image 1 twice; the last picture is only drawn
    expected = [[-1, -1, 2, 3, -1, -1, 0, 1], [-1, -1, 2, 3, -1, -1, -1, -1]]
    np.testing.assert_array_equal(token_layout.visual_index(ids, TOKENS, slot, 2), expected)


@pytest.mark.parametrize(
    "row",
    [
        [S, B, V, T, T],  # one image token too few
        [S, B, V, V, V],  # one too many
        [S, B, T, V, V],  # not right after
        [S, T, T, B, V],  # cut off
        [S, T, V, V, T],  # no begin-of-image token
    ],
)
def test_image_tokens_that_do_not_fit_their_images_are_refused(row: list[int]) -> None:
    with pytest.raises(DocumentError, match="2 image tokens right after"):
        token_layout.visual_index(np.array([row]), TOKENS, np.array([[0]]), 2)


def test_more_images_than_columns_are_refused() -> None:
    with pytest.raises(DocumentError, match="at most 1; got 2"):
        token_layout.image_positions(np.array([[S, B, T, B]]), TOKENS, images=1, seen=9)


def test_only_seen_drops_images_and_changes_nothing_else() -> None:
    """Every (row, query) keeps the same pairs of slot and position."""
    rng = np.random.default_rng(0)
    slot = rng.integers(0, 9, (5, 6))
    position = rng.integers(1, 4, (5, 3, 6)) * (rng.random((5, 1, 6)) < 0.4)
    position[:, :, 0] = 0
    kept_slot, kept = token_layout.only_seen(slot, position)
    assert kept_slot.shape[1] == (position.any(axis=1)).sum(axis=1).max() < 6
    for r in range(5):
        for q in range(3):
            before = sorted((s, p) for s, p in zip(slot[r], position[r, q], strict=True) if p)
            after = sorted((s, p) for s, p in zip(kept_slot[r], kept[r, q], strict=True) if p)
            assert before == after


def test_only_seen_keeps_one_column_when_nobody_sees_anything() -> None:
    slot, position = token_layout.only_seen(np.array([[3, 1]]), np.zeros((1, 4, 2), np.int32))
    assert slot.shape == (1, 1) and position.shape == (1, 4, 1) and not position.any()
