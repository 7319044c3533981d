"""The time of a decoded token by precision: who takes part, and what is printed."""

from __future__ import annotations

import pytest

from mmi_bench.decode import compare, line, main
from mmi_deploy.bundle.bundle import Bundle


def test_precisions_take_turns_and_decode_the_same_number_of_tokens(exported_once) -> None:
    bundle: Bundle = exported_once("paper").bundle
    portable, graph = bundle.graph_file("llm"), bundle.graphs["llm"]
    found = compare(portable, graph, ["int8"], tokens=3, threads=1, start=8)
    assert list(found) == ["fp32", "int8"]
    assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in found.values())
    assert not [path for path in portable.parent.iterdir() if path.is_dir()]  # nothing stays


def test_ratios_are_of_tokens_that_came_in_turn() -> None:
    """A machine that gets three times as slow halfway changes no ratio."""
    plain, other = [2.0, 2.0, 6.0, 6.0], [1.0, 1.0, 3.0, 3.0]
    assert "2.00 times as fast (2.00 to 2.00)" in line("int8", other, plain)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--precisions", "int9", "--start", "8"], "there is no precision 'int9'"),
        (["--start", "100000"], "no free slot after --start; expected --start of at most"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    exported_once, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    folder = str(exported_once("paper").bundle.folder)
    assert main([folder, *options]) == 2
    assert said in capsys.readouterr().err
