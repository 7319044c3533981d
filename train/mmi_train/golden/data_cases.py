"""Golden cases of data: packing, readers, prompts and transforms against the published code's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mmi_deploy.spec.config import TokenConfig
from mmi_train.golden import document_cases, picture_cases, prompt_cases, scene_cases
from mmi_train.golden.differences import Case, differs


def _packing(case: Case) -> str | None:
    """Token documents -> rows. The published code writes a row out only when a document follows."""
    tokens = TokenConfig(
        bos=case["bos"], eos=case["eos"], pad=0, boi=case["soi"], image=case["image"]
    )
    rows = document_cases.packed(case, case, tokens, case["num_img_token"])
    ours = [document_cases.row_of(row) for row in rows]
    expected = [{key: row[key] for key in ours[0]} for row in case["output"]]
    return differs(ours[: len(expected)], expected, "rows")


CHECKS: Mapping[str, Callable[[Case], str | None]] = {
    "packing": _packing,
    **document_cases.CHECKS,
    **picture_cases.CHECKS,
    **prompt_cases.CHECKS,
    **scene_cases.CHECKS,
}
