"""Measures of a request, against numbers computed by hand from synthetic times."""

from __future__ import annotations

import pytest

from mmi_bench.serve.goodput import parse_goodput
from mmi_bench.serve.measures import first_output, gaps_of, values_of
from mmi_bench.serve.records import RequestEvent, RequestRecord
from mmi_deploy.errors import ConfigError


def events(*entries: tuple[float, str] | tuple[float, str, int]) -> list[RequestEvent]:
    return [RequestEvent(e[0], e[1], *e[2:]) for e in entries]  # type: ignore[arg-type]


# Due at 10, sent at 10.5. Texts at 11, 11.1, 11.3; a picture from 11.4 to 12.4 in two steps with a
# preview; texts at 12.5, 12.6; two pictures whole at 13.6 and 14.6; a text at 15; end at 15.5.
STORY = RequestRecord(
    number=0,
    prompt="story-0",
    due=10.0,
    sent=10.5,
    tokens=6,
    server={"queue_seconds": 0.125},
    events=events(
        (11.0, "text"),
        (11.1, "text"),
        (11.3, "text"),
        (11.4, "image_start", 0),
        (11.8, "progress", 0),
        (11.9, "preview", 0),
        (12.2, "progress", 0),
        (12.4, "image", 0),
        (12.5, "text"),
        (12.6, "text"),
        (12.6, "image_start", 1),
        (12.9, "progress", 1),
        (13.6, "image", 1),
        (14.6, "image", 2),
        (15.0, "text"),
        (15.5, "end"),
    ),
)


def test_every_measure_of_a_story_is_what_its_definition_gives() -> None:
    assert values_of(STORY) == {
        "first_token": pytest.approx([1.0]),
        "first_image": pytest.approx([2.4]),
        "first_preview": pytest.approx([1.9]),
        "first_output": pytest.approx([1.0]),
        "text_gap": pytest.approx([0.1, 0.2, 0.1]),
        "picture_stall": pytest.approx([1.2, 2.4]),
        # 0.4 seconds of gaps over 6 tokens - 1 - 2 stalls.
        "time_per_token": pytest.approx([0.4 / 3]),
        "image_interval": pytest.approx([1.2, 1.0]),
        "drawing": pytest.approx([1.0, 1.0]),  # the start of the last picture is not known
        "step": pytest.approx([0.4]),
        "end_to_end": pytest.approx([5.5]),
        "queue": [0.125],
        "send_lag": pytest.approx([0.5]),
    }


def test_t0_of_a_closed_loop_is_the_time_of_sending() -> None:
    closed = RequestRecord(0, "p", sent=10.5, events=STORY.events)
    assert values_of(closed)["first_token"] == pytest.approx([0.5])
    assert "send_lag" not in values_of(closed)


def test_a_picture_is_never_part_of_a_text_gap() -> None:
    gaps, stalls = gaps_of(events((0, "text"), (5, "image", 0), (6, "text"), (7, "text")))
    assert (gaps, stalls) == ([1], [6])
    gaps, stalls = gaps_of(events((0, "text"), (1, "progress", 0), (6, "text")))
    assert (gaps, stalls) == ([], [6]), "a picture that was begun counts"


def test_a_reply_of_pictures_alone_has_no_text_measures() -> None:
    drawn = RequestRecord(0, "p", 0.0, events=events((2.0, "image", 0), (2.5, "end")))
    assert values_of(drawn) == {
        "first_image": [2.0],
        "first_output": [2.0],
        "end_to_end": [2.5],
    }
    assert first_output(drawn) == 2.0
    assert first_output(RequestRecord(0, "p", 0.0)) is None


def test_a_record_survives_its_json() -> None:
    again = RequestRecord.of_json(STORY.to_json())
    assert values_of(again) == values_of(STORY)


def test_goodput_limits_are_met_by_all_values_or_their_percentile() -> None:
    values = {"first_token": [0.2], "text_gap": [0.01] * 98 + [0.2, 0.3], "end_to_end": [5.0]}

    def meets(text: str) -> bool:
        return all(limit.meets(values) for limit in parse_goodput(text))

    assert meets("ttft=200ms,e2e=5s") and not meets("ttft=199ms") and not meets("e2e=4.999s")
    assert meets("gap_p98=10ms") and not meets("gap_p99=50ms") and not meets("gap=0.2s")
    assert meets("gap_p99=200ms") and meets("text_gap=0.3s")
    assert meets("image=1ms"), "a request without a picture has no limit of pictures"


@pytest.mark.parametrize(
    "text", ["ttft", "ttft=200", "ttft=ms", "speed=2s", "tokens_per_second=5s", "", "gap_p0=1s"]
)
def test_malformed_goodput_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--goodput is malformed"):
        parse_goodput(text)
