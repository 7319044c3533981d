"""Workloads: fixed prompts, which fit the tiny model, and a JSONL."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmi_bench.serve.workloads import SHAPES, describe, open_workload
from mmi_deploy.documents.document import Document, Draw, Image, Text, document_of, encode_document
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import ConfigError, DocumentError
from mmi_deploy.spec.presets import tiny


def contents(document: Document) -> list[str]:
    return [
        p.text if isinstance(p, Text) else p.rgb.tobytes().hex() if isinstance(p, Image) else "draw"
        for p in document.parts
    ]


@pytest.fixture(scope="module")
def tokenizer(repository: Path) -> Tokenizer:
    return Tokenizer.open(repository / "assets" / "tiny" / "tokenizer.json", tiny().tokens)


@pytest.mark.parametrize("name", SHAPES)
def test_prompts_are_fixed_new_in_each_request_and_fit_the_tiny_model(
    name: str, tokenizer: Tokenizer
) -> None:
    one, again = (open_workload([name], 3, 64, None) for _ in range(2))
    other = open_workload([name], 4, 64, None)
    seen = set()
    for number in (-2, -1, 0, 1, 2, 10_000_000):
        prompt = one.prompt(number)
        assert contents(prompt.document) == contents(again.prompt(number).document)
        assert prompt.options == again.prompt(number).options
        assert contents(prompt.document) != contents(other.prompt(number).document)
        seen.add((prompt.id, tuple(contents(prompt.document))))
        shape, options = SHAPES[name], prompt.options
        given = list(prompt.document.parts)
        for turn in prompt.more:  # what the model writes at most, as if it were words
            given += [Text(" red" * shape.tokens), *[Draw()] * shape.pictures, *turn]
        ids = len(encode_document(document_of(*given), tokenizer, tiny()).token_ids)
        turns = max(1, shape.pictures)
        assert ids + turns * shape.tokens + 17 * shape.pictures <= 512
        assert options.turn_tokens is not None or options.min_tokens == options.max_tokens
    assert len(seen) == 6 and one.distinct is None


def test_shapes_are_what_they_say() -> None:
    images = {name: open_workload([name], 0, 64, None).prompt(0).document.images for name in SHAPES}
    assert [len(images[f"question-{n}"]) for n in (1, 4, 8)] == [1, 4, 8]
    assert images["text"] == () and isinstance(images["text-to-image"][0], Draw)
    (given, drawn) = images["segmentation-to-image"]
    assert isinstance(given, Image) and isinstance(drawn, Draw)
    text = open_workload(["text"], 0, 64, None).prompt(0).document.parts[0]
    assert isinstance(text, Text) and len(text.text.split()) == 64
    assert len(open_workload(["conversation"], 0, 64, None).prompt(0).more) == 2


def test_repeated_prompts_are_labelled() -> None:
    few = open_workload(["story"], 0, 64, 2)
    assert few.prompt(0).id == few.prompt(2).id == few.prompt(-2).id != few.prompt(1).id
    assert describe(few)["prompts"] == "repeated" and describe(few)["distinct_prompts"] == 2
    assert describe(open_workload(["story"], 0, 64, None))["prompts"] == "new in each request"


def test_the_hash_is_of_contents() -> None:
    hashes = {
        describe(open_workload(names, seed, side, None))["sha256"]
        for names, seed, side in (
            (["story"], 0, 64),
            (["story"], 1, 64),
            (["story"], 0, 32),
            (["caption"], 0, 64),
            (["story", "caption"], 0, 64),
        )
    }
    assert len(hashes) == 5


def test_several_workloads_take_turns() -> None:
    mixed = open_workload(["text", "caption"], 0, 64, None)
    names = [mixed.prompt(number).id for number in (0, 1, 2, 3, -1, -2)]
    assert names == ["text-0", "caption-0", "text-1", "caption-1", "caption--1", "text--1"]


def test_a_jsonl_is_read_as_mmi_generate_reads_it(repository: Path) -> None:
    lines = open_workload([str(repository / "examples" / "documents.jsonl")], 0, 64, None)
    assert [lines.prompt(n).id for n in (0, 1, 2, 3)] == ["story", "draw", "question", "story"]
    draw, question = lines.prompt(1), lines.prompt(2)
    assert (draw.options.seed, draw.options.max_images) == (7, 0)
    assert question.options.temperature == 0
    assert isinstance(question.document.parts[0], Image)
    assert np.asarray(question.document.parts[0].rgb).shape == (64, 64, 3)
    assert describe(lines)["distinct_prompts"] == 3


def test_unknown_names_and_damaged_lines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown workload 'poem'"):
        open_workload(["poem"], 0, 64, None)
    path = tmp_path / "own.jsonl"
    path.write_text('{"parts": [{"text": "a"}]}\n{"parts": [{"text": "a"}], "seed": -1}\n')
    with pytest.raises(DocumentError, match="line 2 of .*seed"):
        open_workload([str(path)], 0, 64, None)
