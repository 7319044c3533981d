"""Packing into rows of the context length, against rows that the published code made."""

from __future__ import annotations

import json

import pytest

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import TokenConfig
from mmi_train.data.packing import pack

TOKENS = TokenConfig(bos=1, eos=2, pad=0, boi=3, image=4)


def rows_of(case):
    tokens = TokenConfig(
        bos=case["bos"], eos=case["eos"], pad=0, boi=case["soi"], image=case["image"]
    )
    return list(
        pack(
            [(document["text_ids"], document["images"]) for document in case["input"]],
            tokens,
            length=case["num_total_token"],
            visual_tokens=case["num_img_token"],
            truncation={"image": "image", "sample": "document"}[case["truncation_level"]],
            max_images=case["max_num_images"] if case["max_num_images"] > 0 else None,
        )
    )


@pytest.mark.parametrize("index", range(4))
def test_rows_are_those_of_the_published_code(golden_file, index):
    case = json.loads(golden_file("data_and_metrics.json").read_text())["packing"][index]
    ours = rows_of(case)[: len(case["output"])]
    assert [row.token_ids.tolist() for row in ours] == [row["text_ids"] for row in case["output"]]
    assert [list(row.images) for row in ours] == [row["images"] for row in case["output"]]
    starts = [row["nearest_bos_idxs"] for row in case["output"]]
    assert [list(row.document_start) for row in ours] == starts


def packed(documents, **options):
    return [
        (row.token_ids.tolist(), row.images)
        for row in pack(documents, TOKENS, visual_tokens=2, **options)
    ]


def test_a_row_shorter_than_an_image_is_refused():
    with pytest.raises(ConfigError, match="shorter than one image"):
        packed([([1, 9, 3, 4, 4], "a")], length=2)
    assert packed([([3, 4, 4, 9], "a")], length=3) == [([3, 4, 4], ("a",))]


def test_an_image_is_never_cut_in_two():
    rows = packed([([1, 9, 9, 3, 4, 4, 9, 3, 4, 4, 9, 9, 9], "ab")], length=9)
    assert rows == [([1, 9, 9, 3, 4, 4, 9], ("a",))]


def test_whole_documents_move_to_the_next_row_when_their_image_does_not_fit():
    document = [1, 9, 3, 4, 4, 2]
    rows = packed(
        [(document, "a"), (document, "b"), (document, "c")], length=10, truncation="document"
    )
    assert rows[0] == (document, ("a",))


def test_rows_without_images_are_dropped():
    assert packed([([1] + [9] * 11 + [3, 4, 4], "a")], length=6) == []
    assert packed([([1] + [9] * 7 + [3, 4, 4, 9], "a")], length=6) == [([9, 9, 3, 4, 4, 9], ("a",))]
