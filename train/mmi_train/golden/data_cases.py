"""Golden cases of data: packing, readers, prompts and transforms against the published code's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmi_deploy.spec.config import TokenConfig
from mmi_train.data.packing import PackedRow, Truncation, pack
from mmi_train.golden import picture_cases
from mmi_train.golden.differences import Case, differs

_TRUNCATION: Mapping[str, Truncation] = {"image": "image", "sample": "document"}


def _packed(case: Case, options: Case, tokens: TokenConfig, span: int) -> list[PackedRow[int]]:
    most = options["max_num_images"]
    return list(
        pack(
            [(document["text_ids"], document["images"]) for document in case["input"]],
            tokens,
            length=options["num_total_token"],
            visual_tokens=span,
            truncation=_TRUNCATION[options["truncation_level"]],
            max_images=most if most > 0 else None,
        )
    )


def _row(row: PackedRow[int]) -> dict[str, Any]:
    return {
        "text_ids": row.token_ids.tolist(),
        "images": list(row.images),
        "nearest_bos_idxs": list(row.document_start),
    }


def _packing(case: Case) -> str | None:
    """Token documents -> rows. The published code writes a row out only when a document follows."""
    tokens = TokenConfig(
        bos=case["bos"], eos=case["eos"], pad=0, boi=case["soi"], image=case["image"]
    )
    ours = [_row(row) for row in _packed(case, case, tokens, case["num_img_token"])]
    expected = [{key: row[key] for key in _row_keys(row)} for row in case["output"]]
    return differs(ours[: len(expected)], expected, "rows")


def _row_keys(row: Case) -> list[str]:
    return [key for key in ("text_ids", "images", "nearest_bos_idxs") if key in row]


CHECKS: Mapping[str, Callable[[Case], str | None]] = {
    "packing": _packing,
    **picture_cases.CHECKS,
}
