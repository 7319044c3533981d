"""`python -m mmi_bench.text_divergence`: its measures against PyTorch's, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from exports import SHIPPED, Exported
from mmi_bench.text_divergence import CHUNK, chunks, compare, run
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import DocumentError

WORDS = "the red circle moves left. a small blue square is on the right. "


def test_measures_are_those_of_pytorch() -> None:
    draw = np.random.default_rng(0)
    given = [draw.integers(0, 50, 7).tolist(), draw.integers(0, 50, 5).tolist()]
    ours, theirs = ([draw.normal(size=(len(ids), 50)) for ids in given] for _ in range(2))
    found = compare("x", ours, theirs, given)
    a, b = (torch.from_numpy(np.concatenate(one)) for one in (ours, theirs))
    divergence = F.kl_div(
        a.log_softmax(1), b.log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert found.divergence == pytest.approx(float(divergence))
    losses = [
        F.cross_entropy(torch.from_numpy(logits[:-1]), torch.tensor(ids[1:]), reduction="none")
        for logits, ids in zip(ours, given, strict=True)
    ]
    assert found.entropy == pytest.approx(float(torch.cat(losses).mean()))
    assert found.error == pytest.approx(float((a - b).norm() / b.norm()))
    assert found.same == float((a.argmax(1) == b.argmax(1)).float().mean())


@pytest.mark.slow
def test_precisions_of_the_shipped_model_are_in_their_order(
    exported_once: Callable[[str], Exported], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = exported_once(SHIPPED).bundle.folder
    (tmp_path / "a.txt").write_text(WORDS * 20)
    (tmp_path / "b.txt").write_text("a large green ring turns. the white bar grows. " * 30)
    options = ["--measure", str(tmp_path / "b.txt"), "--calibrate", str(tmp_path / "a.txt")]
    options += ["--tokens", "128", "--calibration-tokens", "128", "--json"]
    assert run([str(bundle), *options]) == 0
    portable, int8, int4, awq = json.loads(capsys.readouterr().out)
    assert portable["error"] == portable["divergence"] == 0 and portable["same"] == 1
    assert 0 < int8["divergence"] < int4["divergence"] < 1
    assert awq["precision"] == "int4-awq" and awq["error"] != int4["error"]


def test_a_file_that_is_too_short_is_refused(
    exported_once: Callable[[str], Exported], tmp_path: Path
) -> None:
    bundle = exported_once(SHIPPED).bundle
    tokenizer = Tokenizer.open(bundle.tokenizer, bundle.config.tokens)
    path = tmp_path / "a.txt"
    path.write_text(WORDS * 20)
    made = list(chunks([path, path], tokenizer, 1, 2 * (CHUNK - 1)))
    assert [len(ids) for ids in made] == [CHUNK] * 2 and {ids[0] for ids in made} == {1}
    path.write_text(WORDS)
    with pytest.raises(DocumentError, match="a.txt is too short; expected at least 128 tokens"):
        list(chunks([path], tokenizer, 1, CHUNK - 1))
