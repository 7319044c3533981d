"""Messages between the processes: what goes in comes out, and hostile lengths are refused."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest

from deploy.server.requests import picture
from mmi_deploy.batching.job import JobStats
from mmi_deploy.documents.document import Document, Draw, Image, Text
from mmi_deploy.errors import (
    BundleError,
    BusyError,
    ConfigError,
    DocumentError,
    EngineError,
    MmiError,
    WeightsError,
)
from mmi_deploy.runtime.events import (
    Event,
    Finished,
    ImageDone,
    ImageProgress,
    ImageStarted,
    TextDelta,
)
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.sampling import Sampled
from mmi_deploy.runtime.timings import Timing, Timings
from mmi_deploy.server.engine.messages import (
    LENGTHS,
    MOST_BYTES,
    Arrays,
    lengths,
    pack,
    pack_document,
    pack_event,
    pack_options,
    unpack,
    unpack_document,
    unpack_event,
    unpack_options,
)

STATS = JobStats(queued=0.5, first=None, total=2.25, given=7, cached=3)


def sent(
    header: dict[str, object], arrays: Arrays | None = None
) -> tuple[dict[str, object], Arrays]:
    """A message as the other process reads it."""
    message = pack(header, arrays)
    text, data = lengths(message[: LENGTHS.size])
    assert len(message) == LENGTHS.size + text + data
    body = message[LENGTHS.size :]
    return unpack(body[:text], body[text:])


def test_a_document_arrives_as_it_was() -> None:
    rgb = [picture(1), picture(2, 8)[:, :5], np.asfortranarray(picture(3, 6))]
    parts = (
        Text("the red\u2028\x00square \U0001f600"),
        Image(rgb[0], "alt"),
        Draw(),
        Image(rgb[1]),
        Image(rgb[2]),
        Text(""),
    )
    arrays = Arrays()
    header, read = sent({"parts": pack_document(Document(parts), arrays)}, arrays)
    document = unpack_document(header["parts"], read)
    assert [type(part) for part in document.parts] == [type(part) for part in parts]
    assert document.parts[0] == parts[0] and document.parts[5] == parts[5]
    for place, original in ((1, rgb[0]), (3, rgb[1]), (4, rgb[2])):
        found = document.parts[place]
        assert isinstance(found, Image)
        np.testing.assert_array_equal(found.rgb, original)
        assert found.rgb.flags.writeable
    assert document.parts[1].alt == "alt" and document.parts[3].alt == ""


OPTIONS = {
    "seed": 2**64 - 1,
    "max_tokens": 5,
    "min_tokens": 2,
    "max_images": 3,
    "draw_first": True,
    "turn_tokens": 4,
    "stop": (".", "\u2028"),
    "temperature": 0.1 + 0.2,
    "top_k": 9,
    "top_p": 0.75,
    "repetition_penalty": 1.25,
    "min_p": 0.125,
    "presence_penalty": -1.5,
    "frequency_penalty": 0.5,
    "logit_bias": ((3, -100.0), (4, 0.1)),
    "logprobs": 2,
    "schedule": "unipc:20",
    "guidance": 1 / 3,
    "full_every": 2,
    "previews": 3,
}

# Of a search, which is greedy.
BEAMS = {
    "beams": 3,
    "length_penalty": -0.5,
    "early_stopping": True,
    "temperature": 0.0,
}


def test_every_option_arrives_as_it_was() -> None:
    assert {*OPTIONS, *BEAMS} == {field.name for field in fields(GenerationOptions)}
    for chosen in ({}, OPTIONS, BEAMS, *({name: value} for name, value in OPTIONS.items())):
        options = GenerationOptions(**chosen)
        header, _ = sent({"options": pack_options(options)})
        assert unpack_options(header["options"]) == options
        assert hash(unpack_options(header["options"])) == hash(options)


SAMPLED = (
    Sampled(5, -0.125, ((5, -0.125), (6, -2.1))),
    Sampled(6, -math.inf, ()),
)


@pytest.mark.parametrize(
    "event",
    [
        TextDelta("one\u2028", (), 1),
        TextDelta("", SAMPLED, 2),
        ImageStarted(3, 20),
        ImageProgress(3, 1, 20),
        ImageProgress(3, 2, 20, picture(1, 8)),
        ImageDone(4, picture(2)),
    ],
    ids=lambda event: type(event).__name__,
)
def test_an_event_arrives_as_it_was(event: Event) -> None:
    arrays = Arrays()
    arrays.put(picture(9))  # of another document, in the same message
    header, read = sent({"event": pack_event(event, None, arrays)}, arrays)
    found, stats, last = unpack_event(header["event"], read)
    assert (stats, last) == (None, False)
    assert type(found) is type(event)
    for field in fields(event):
        value, other = getattr(event, field.name), getattr(found, field.name)
        assert np.array_equal(value, other) if isinstance(value, np.ndarray) else value == other


@pytest.mark.parametrize("stats", [STATS, None])
def test_the_end_arrives_with_timings_and_statistics(stats: JobStats | None) -> None:
    timings = Timings(
        [Timing("denoise", 0.5, 4), Timing("decode", 0.25, 1), Timing("denoise", 1, 2)]
    )
    header, read = sent({"e": pack_event(Finished("max_images", 7, 2, timings), stats, Arrays())})
    found, told, last = unpack_event(header["e"], read)
    assert last and told == stats
    assert isinstance(found, Finished)
    assert (found.reason, found.tokens, found.images) == ("max_images", 7, 2)
    assert found.timings.totals() == timings.totals()


@pytest.mark.parametrize(
    "kind", [BundleError, BusyError, ConfigError, DocumentError, EngineError, WeightsError]
)
def test_an_error_of_ours_keeps_its_class_and_words(kind: type[MmiError]) -> None:
    header, read = sent({"e": pack_event(kind("it does not fit"), STATS, Arrays())})
    error, stats, last = unpack_event(header["e"], read)
    assert type(error) is kind and "it does not fit" in str(error)
    assert last and stats == STATS


def test_other_errors_lose_their_words() -> None:
    """They may hold anything, also what a client sent."""
    header, read = sent({"e": pack_event(ValueError("/usr/secret 0xdeadbeef"), None, Arrays())})
    error, _, last = unpack_event(header["e"], read)
    assert type(error) is EngineError and last
    assert "secret" not in str(error) and "0x" not in str(error)


@pytest.mark.parametrize("head", [(2**32 - 1, 0), (0, 2**32 - 1), (MOST_BYTES, 1)])
def test_impossible_lengths_are_refused_before_they_are_read(head: tuple[int, int]) -> None:
    with pytest.raises(EngineError):
        lengths(LENGTHS.pack(*head))


@pytest.mark.parametrize("place", [[0, [64, 64, 3]], [8, [1]], [-4, [4]], [0, [9]]])
def test_a_place_outside_of_the_arrays_is_an_error(place: list[object]) -> None:
    with pytest.raises((ValueError, EngineError)):
        Arrays(bytes(8)).get(place)
