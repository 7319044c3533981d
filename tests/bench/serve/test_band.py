"""The band of outputs: levels alone, or what a comparison of two files of answers measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmi_bench.serve.band import Band, parse_band
from mmi_bench.serve.records import RequestRecord
from mmi_bench.serve.reference import judge
from mmi_bench.serve.run import Kept
from mmi_deploy.cli.app import run
from mmi_deploy.errors import ConfigError


@pytest.fixture
def compared(tmp_path: Path) -> Callable[[int], Path]:
    """The file of `mmi evaluate --against` on 200 questions, so many of them answered otherwise."""

    def write(different: int) -> Path:
        asked = [{"imgname": "1.png", "query": "?", "label": "x"}] * 200
        (tmp_path / "test").mkdir(exist_ok=True)
        for kind in ("human", "augmented"):
            part = asked if kind == "human" else []
            (tmp_path / "test" / f"test_{kind}.json").write_text(json.dumps(part))
        for name, others in (("a", different), ("b", 0)):
            lines = [{"id": n, "text": "y" if n < others else "z"} for n in range(200)]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        out = tmp_path / f"band-{different}.json"
        words = ["--predictions", str(tmp_path / "a.jsonl"), "--against", str(tmp_path / "b.jsonl")]
        words += ["--benchmark", "chartqa", "--data", str(tmp_path), "-o", str(out)]
        assert run(["evaluate", *words]) == 0
        return out

    return write


def test_the_share_of_other_texts_is_that_of_the_comparison(
    compared: Callable[[int], Path],
) -> None:
    """Clopper and Pearson: 4 of 200 or fewer have a chance of 5 % at the upper bound."""
    same = parse_band(str(compared(0)))
    assert same.texts == pytest.approx(1 - 0.05 ** (1 / 200), abs=2e-6) and same.levels == 1
    band = parse_band(str(compared(4)))
    assert at_most(4, 200, band.texts) == pytest.approx(0.05, abs=1e-4)
    assert band.source.endswith("chartqa, test")
    allowed = band.allowed(20)
    assert at_most(allowed - 1, 20, band.texts) < 0.95 <= at_most(allowed, 20, band.texts)
    assert [band.allowed(n) for n in (0, 1)] == [0, 0]
    assert Band(3).allowed(10**4) == 0


def at_most(different: int, count: int, share: float) -> float:
    """Chance of at most so many, summed in whole numbers of ways."""
    return sum(comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(different + 1))


def outputs(texts: str, levels: int = 0) -> list[Kept]:
    """Requests that wrote one letter each and drew a picture."""
    kept = []
    for number, text in enumerate(texts):
        record: Any = RequestRecord(number, f"prompt-{number}", 0.0)
        record.reply.parts[:] = [text]
        kept.append(Kept(record, None, None))  # type: ignore[arg-type]
    return kept


def test_so_many_other_texts_are_valid_and_one_more_is_not() -> None:
    expected = [["a"] for _ in range(20)]
    band = Band(texts=0.0451)
    for others, valid in ((2, True), (4, False)):
        check = judge(outputs("b" * others + "a" * (20 - others)), expected, "r", band)
        assert check.valid is valid and check.texts == others
        assert check.to_json()["text_band"] == band.texts
        assert ("INVALID" in check.line()) is not valid
    assert not judge(outputs("b" + "a" * 19), expected, "r").valid
    picture = np.zeros((2, 2, 3), np.uint8)
    assert not judge(outputs("a"), [[picture]], "r", band).valid, "a picture is not another text"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[1]", "is no comparison of two files"),
        ('{"benchmark": "a"', "is no comparison of two files"),
        (None, "cannot read the band"),
    ],
)
def test_other_files_are_refused(content: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "band.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=says):
        parse_band(str(path))
    with pytest.raises(ConfigError, match="0 to 255 levels; got 256"):
        parse_band("256")


def test_a_difference_of_quality_is_no_band(compared: Callable[[int], Path]) -> None:
    path = compared(0)
    value = json.loads(path.read_text())
    value["against"]["differences"]["relaxed accuracy"]["verdict"] = "lower"
    path.write_text(json.dumps(value))
    with pytest.raises(ConfigError, match="differ in quality, relaxed accuracy is lower"):
        parse_band(str(path))
