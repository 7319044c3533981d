"""Training on data sets by their names: documents, samples left out by rule, squashed pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmi_deploy.cli.app import run
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import MmiError
from mmi_deploy.spec.presets import tiny
from mmi_train.data.document import ImagePart, TextPart
from mmi_train.data.document_file import DocumentFile
from mmi_train.data.readers.training import SetDocuments, documents_at
from mmi_train.data.synthetic.vocabulary import build_tokenizer
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.training.stages.documents import DocumentsStage
from train.data.readers.trees import lines, put

CONFIG = replace(tiny(), vision=replace(tiny().vision, image_size=32))


def pairs(folder: Path, captions: list[str], **more: Any) -> Path:
    content = lines(*({"image": f"{n}.jpg", "caption": text} for n, text in enumerate(captions)))
    files: dict[str, Any] = {f"{n}.jpg": 10 * n + 1 for n in range(len(captions))}
    return put(folder, {"0.txt": content} | files | more)


def test_a_set_is_read_as_a_file_of_documents_is(tmp_path: Path) -> None:
    tree = pairs(tmp_path / "cc", ["A red circle.", "A blue square."])
    found = documents_at(Path(f"cc12m:{tree}"))
    assert isinstance(found, SetDocuments) and len(found) == 2
    assert found.name(1) == f"sample 1 of cc12m, split train, in {tree}"
    parts = found.parts(1)
    assert {type(part) for part in parts} == {TextPart, ImagePart}
    assert found.sha256 == documents_at(Path(f"cc12m:{tree}")).sha256
    with (tree / "0.txt").open("a") as file:
        file.write(lines({"image": "0.jpg", "caption": "Another circle."}))
    assert documents_at(Path(f"cc12m:{tree}")).sha256 != found.sha256


def test_files_are_read_as_ever_and_wrong_names_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a:b.jsonl"
    path.write_text(json.dumps([{"text": "a"}]))
    assert isinstance(documents_at(path), DocumentFile)
    with pytest.raises(MmiError, match="The nearest is cc12m"):
        documents_at(Path(f"cc12:{tmp_path}"))
    with pytest.raises(MmiError, match="leave --images out"):
        documents_at(Path(f"cc12m:{tmp_path}"), tmp_path)
    with pytest.raises(MmiError, match="cannot read"):
        documents_at(tmp_path / "none.jsonl")


def test_samples_left_out_by_rule_are_not_counted_as_broken(tmp_path: Path) -> None:
    captions = ["too short", "A red circle.", "short", "A blue square."]
    tree = pairs(tmp_path, captions, **{"3.jpg": "not a picture"})
    torch.manual_seed(0)
    model = MMInterleaved(CONFIG).eval()
    tokenizer = Tokenizer(build_tokenizer(), CONFIG.tokens)
    told: list[str] = []
    stage = DocumentsStage(
        model, tokenizer, documents_at(Path(f"cc12m:{tree}")), 4, on_broken=told.append
    )
    batch = stage.batch(0, np.random.default_rng(0))
    stage.report(batch.broken)
    assert batch.batch.token_ids.shape[0] >= 1
    assert list(stage.broken) == [3] and "picture is broken" in told[0]


def test_pictures_of_regions_are_squashed_whole(tmp_path: Path) -> None:
    region = {"image": "a.jpg", "sent": "it", "bbox": [0, 0, 12, 8], "width": 12, "height": 8}
    tree = put(tmp_path, {"refcoco_train.jsonl": lines(region), "a.jpg": 5})
    picture, *_ = documents_at(Path(f"refcoco:{tree}")).parts(0)
    assert isinstance(picture, ImagePart) and picture.image.shape == (12, 12, 3)


def test_the_command_names_what_a_set_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    data = f"vqav2:{tmp_path}"
    assert run(["train", str(tmp_path), "--data", data, "-o", str(out)]) == 2
    assert "lacks v2_OpenEnded_mscoco_train2014_questions.json" in capsys.readouterr().err
