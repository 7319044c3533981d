"""Measurements of training: what they print, on small sizes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mmi_bench.training import adapter_memory, pictures, recall
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.spec.presets import tiny
from mmi_train.data.synthetic.vocabulary import build_tokenizer


def test_pictures_a_second_are_printed_for_each_pair_of_sizes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert pictures.run(["--count", "2", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("JPEG, 640 x 480") and len(lines) == 1 + len(pictures.SIDES)
    assert all(float(re.findall(r": (\d+) pictures/s", line)[0]) > 0 for line in lines[1:])


@pytest.mark.timing
def test_memory_of_adapters_is_printed_beside_the_weights(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert adapter_memory.run(["--layers", "1"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "parameters" in line]
    billions, ratio = (
        float(number) for number in re.findall(r"^([\d.]+) B.*, ([\d.]+) times", line)[0]
    )
    assert billions == pytest.approx(0.2, abs=0.05) and 0.8 < ratio < 6


def test_what_came_back_is_counted_by_answers_and_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recall.run(["write", str(tmp_path / "made")]) == 0
    made = recall.pairs()
    assert len(dict(made)) == recall.DOCUMENTS
    tokenizer = Tokenizer(build_tokenizer(), tiny().tokens)
    for question, answer in made:
        tokenizer.encode(f"{question} {answer}")  # every word is known
    results = tmp_path / "results.jsonl"
    lines = []
    for number, (question, answer) in enumerate(made):
        said = answer if number else answer.replace("moves", "turns")
        parts = [
            {"text": question, "generated": False},
            {"text": f" {said}", "generated": True},
        ]
        lines.append(json.dumps({"id": number, "parts": parts}))
    results.write_text("\n".join(lines))
    capsys.readouterr()
    assert recall.run(["score", str(results)]) == 0
    assert capsys.readouterr().out == "199 of 200 answers, 1199 of 1200 words\n"
    results.write_text(lines[0])
    assert recall.run(["score", str(results)]) == 2
    assert "does not answer these questions" in capsys.readouterr().err
