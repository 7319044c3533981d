"""The loop: what is reported, why it ends, and what options force."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from deploy.runtime.fake_model import VOCAB, Log, fake_config, fake_runtime, picture
from mmi_deploy.documents.document import Document, Draw, Image, Text, document_of
from mmi_deploy.errors import ConfigError, DocumentError
from mmi_deploy.runtime.events import (
    Event,
    Finished,
    ImageDone,
    ImageProgress,
    ImageStarted,
    TextDelta,
)
from mmi_deploy.runtime.generation import GenerationOptions, generate
from mmi_deploy.runtime.keyed_random import text_uniform
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.sampling import never_sampled, sample
from mmi_deploy.runtime.session import Session
from mmi_deploy.spec.graphs import Limits

TOKENS = fake_config().tokens
PROMPT = document_of(Text("w5 w6"))


def script(runtime: Runtime, *choices: int) -> None:
    """Make the LLM want these tokens, one at each run, the last one for ever. What it wants after
    a begin-of-image token, which runs before its picture is drawn, goes unheard."""
    llm = runtime.engine("llm")
    wanted = itertools.chain(choices, itertools.repeat(choices[-1]))
    real = llm._execute

    def execute(inputs: Any, outputs: Any) -> None:
        real(inputs, outputs)
        logits = outputs["logits"].read()
        logits[...] = -np.arange(VOCAB)
        logits[..., next(wanted)] = 10

    llm._execute = execute  # type: ignore[method-assign]


def run(
    *choices: int,
    document: Document = PROMPT,
    limits: Limits | None = None,
    cancelled: Any = lambda: False,
    **options: Any,
) -> tuple[list[Event], Log]:
    runtime, log = fake_runtime(limits=limits or Limits(context=64, images=6))
    if choices:
        script(runtime, *choices)
        options.setdefault("temperature", 0.0)
    events = list(generate(runtime, document, GenerationOptions(**options), cancelled=cancelled))
    return events, log


def story(events: list[Event]) -> list[str]:
    """Events as short words; neighbouring text together."""
    words: list[str] = []
    for event in events:
        match event:
            case TextDelta(text):
                if words and words[-1].startswith("text:"):
                    words[-1] += text
                else:
                    words.append("text:" + text)
            case ImageStarted(index, steps):
                words.append(f"start {index} of {steps}")
            case ImageProgress(index, step, of):
                words.append(f"{index}: {step}/{of}")
            case ImageDone(index, _):
                words.append(f"done {index}")
            case Finished(reason, tokens, images, _):
                words.append(f"{reason} {tokens} {images}")
    return words


def drawing(index: int) -> list[str]:
    return [f"start {index} of 4", *(f"{index}: {step}/4" for step in range(1, 5)), f"done {index}"]


def test_text_then_picture_then_text_then_end() -> None:
    events, log = run(10, 11, TOKENS.boi, 0, 12, TOKENS.eos)
    assert story(events) == ["text: w10 w11", *drawing(0), "text:w12", "end 3 1"]
    image = next(event for event in events if isinstance(event, ImageDone))
    assert image.rgb.dtype == np.uint8 and image.rgb.shape == (16, 16, 3)
    # The drawn picture was read: encoded once, its visual tokens went through the LLM.
    assert log.counts()["vision_encoder"] == 1
    np.testing.assert_array_equal(
        log.of("vision_encoder")[0]["pixels"][0],
        image.rgb.transpose(2, 0, 1).astype(np.float32) / 255,
    )
    lengths = [call["token_ids"].shape[1] for call in log.of("llm")]
    # prompt | w10 | w11, then the begin-of-image token, then its 3 tokens, then w12
    assert lengths == [3, 1, 1, 1, 3, 1]


def test_every_reason_to_end() -> None:
    assert story(run(10, max_tokens=3)[0])[-1] == "max_tokens 3 0"
    assert story(run(10, max_tokens=0)[0]) == ["max_tokens 0 0"]
    assert story(run(TOKENS.boi, max_images=0)[0]) == ["max_images 0 0"]
    assert story(run(TOKENS.boi, max_images=2)[0])[-1] == "max_images 0 2"
    small = Limits(context=8, images=6)
    assert story(run(10, limits=small)[0])[-1] == "context 5 0"
    assert story(run(10, 10, TOKENS.boi, limits=small)[0])[-1] == "context 2 0"
    assert story(run(TOKENS.boi, limits=Limits(context=64, images=1))[0])[-1] == "max_images 0 1"


def test_a_document_may_ask_for_pictures_in_its_midst() -> None:
    document = document_of(Text("w5"), Draw(), Image(picture(3)), Text("w6"), Draw())
    events, log = run(TOKENS.eos, document=document, max_images=0)
    assert story(events) == [*drawing(0), *drawing(2), "end 0 2"]
    (first, last) = (call for call in log.of("denoise_step") if call["step"].tolist() == [0])
    assert not first["image_position"].any()
    assert sorted(last["image_position"][0]) == [1, 2]


def test_draw_first_draws_before_any_text() -> None:
    events, _ = run(0, 10, TOKENS.eos, draw_first=True)
    assert story(events) == [*drawing(0), "text:w10", "end 1 1"]


def test_exact_turns_for_measuring() -> None:
    """Exactly n text tokens, then a picture, k times, whatever the model wants."""
    for wanted in (TOKENS.eos, TOKENS.boi, 10):
        events, log = run(wanted, turn_tokens=5, max_images=3)
        assert story(events)[-1] == "max_images 15 3"
        kinds = [type(event) for event in events if isinstance(event, ImageDone | TextDelta)]
        assert kinds.count(ImageDone) == 3 and kinds[-1] is ImageDone
        lengths = [call["token_ids"].shape[1] for call in log.of("llm")]
        # The prompt or a picture's tokens give the first token; the fifth runs with the
        # begin-of-image token that is forced after it.
        assert lengths == [3, *[1] * 4, 2, *[3, *[1] * 4, 2] * 2]


def test_a_turn_has_its_least_number_of_tokens() -> None:
    """min_tokens holds for each turn: neither an end nor a picture comes before."""
    events, _ = run(TOKENS.boi, min_tokens=2, max_images=1, max_tokens=9)
    # The greedy choice among what is allowed is the least id: `w5`.
    assert story(events) == ["text: w5 w5", *drawing(0), "text:w5 w5", "max_images 4 1"]


@pytest.mark.parametrize("token", [TOKENS.image, TOKENS.bos, TOKENS.pad])
def test_image_tokens_are_never_sampled(token: int) -> None:
    events, _ = run(token, max_tokens=4)
    assert TOKENS.eos < 5 and story(events) == ["end 0 0"]  # `</s>` is the next best


def test_stop_texts_end_and_are_not_given_out() -> None:
    assert story(run(10, 11, 12, 13, stop=("w12",))[0]) == ["text: w10 w11 ", "stop 3 0"]
    # It may begin in one token and end in the next; what only looked like it comes out.
    assert story(run(10, 11, 12, 13, stop=("1 w12",))[0]) == ["text: w10 w1", "stop 3 0"]
    assert story(run(10, 11, 12, stop=("w11", "w10"))[0]) == ["text: ", "stop 1 0"]
    assert story(run(10, 11, 12, stop=("1 w12", "w11 w12"))[0]) == ["text: w10 ", "stop 3 0"]
    assert story(run(10, 11, TOKENS.eos, stop=("w11 w9",))[0]) == ["text: w10 w11", "end 2 0"]


def test_cancelling_stops_at_the_next_token_or_step() -> None:
    asked = itertools.count()
    assert story(run(10, cancelled=lambda: next(asked) == 3)[0])[-1] == "cancelled 3 0"
    asked = itertools.count()
    events, log = run(TOKENS.boi, cancelled=lambda: next(asked) == 3)
    assert story(events) == ["start 0 of 4", "0: 1/4", "0: 2/4", "cancelled 0 0"]
    assert log.counts()["denoise_step"] == 2


def test_the_same_seed_repeats_everything_and_another_does_not() -> None:
    document = document_of(Image(picture(0)), Text("w7"))
    options = {
        "max_tokens": 12,
        "turn_tokens": 4,
        "max_images": 3,
        "temperature": 1.5,
        "top_p": 1.0,
    }

    def told(seed: int) -> tuple[list[str], list[Any]]:
        events, _ = run(document=document, seed=seed, **options)
        return story(events), [event.rgb for event in events if isinstance(event, ImageDone)]

    (words, images), (again, images_again), (others, _) = told(3), told(3), told(4)
    assert words == again and words != others
    assert all((a == b).all() for a, b in zip(images, images_again, strict=True))


def test_a_token_is_drawn_by_its_place_in_the_document() -> None:
    """So that the PyTorch path, which keeps no count of its own, draws the same."""
    runtime, log = fake_runtime()
    document = document_of(Image(picture(0)), Text("w7"))
    options = GenerationOptions(seed=9, max_tokens=1, temperature=2.0, top_p=1.0)
    text = next(e.text for e in generate(runtime, document, options) if isinstance(e, TextDelta))
    session = Session(runtime)
    session.append_text([TOKENS.bos])
    session.append_image(picture(0))
    session.append_text([7])
    token = sample(
        session.next_logits(),
        options.sampling,
        text_uniform(9, place=6),  # `<s>`, the image's four tokens and a word come before
        banned=never_sampled(TOKENS),
    )
    assert text == f" w{token}"


def test_the_penalty_counts_the_current_turn_alone() -> None:
    """With a strong penalty no word of a turn repeats; the next turn may use it again."""
    runtime, _ = fake_runtime()
    llm = runtime.engine("llm")
    real = llm._execute

    def execute(inputs: Any, outputs: Any) -> None:
        real(inputs, outputs)
        outputs["logits"].read()[...] = 40 - np.arange(VOCAB)

    llm._execute = execute  # type: ignore[method-assign]
    options = GenerationOptions(
        turn_tokens=3, max_images=2, temperature=0, repetition_penalty=100.0
    )
    words = story(list(generate(runtime, PROMPT, options)))
    assert [word for word in words if word.startswith("text")] == [
        "text: w5 w6 w7",
        "text:w5 w6 w7",
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": -1},
        {"guidance": -0.5},
        {"guidance": float("nan")},
        {"temperature": float("nan")},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_k": -2},
        {"repetition_penalty": 0.0},
        {"turn_tokens": -1},
        {"stop": ("",)},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GenerationOptions(**options)


def test_a_document_that_does_not_fit_is_refused_before_anything_runs() -> None:
    runtime, log = fake_runtime(limits=Limits(context=8, images=6))
    with pytest.raises(DocumentError, match="too long"):
        list(generate(runtime, document_of(Text("w5 " * 20))))
    runtime, log = fake_runtime(limits=Limits(context=64, images=1))
    with pytest.raises(DocumentError, match="too many pictures for the model; expected at most 1"):
        list(generate(runtime, document_of(Draw(), Draw())))
    assert not log.calls


@pytest.mark.parametrize("end", [TOKENS.eos, 9, TOKENS.bos])
def test_every_end_token_ends_a_text_and_none_before_its_least_length(end: int) -> None:
    config = fake_config()
    config = replace(config, tokens=replace(TOKENS, other_eos=(9, TOKENS.bos)))

    def run_it(*choices: int, **options: Any) -> list[str]:
        runtime, _ = fake_runtime(config, Limits(context=64, images=6))
        script(runtime, *choices)
        chosen = GenerationOptions(temperature=0.0, max_tokens=5, **options)
        return story(list(generate(runtime, PROMPT, chosen)))

    assert run_it(10, end, 11) == ["text: w10", "end 1 0"]
    # The least id that is allowed stands in for an end that comes too early.
    assert run_it(end, min_tokens=2) == ["text: w5 w5", "end 2 0"]


def test_a_user_does_not_write_an_end_token() -> None:
    config = fake_config()
    config = replace(config, tokens=replace(TOKENS, other_eos=(9,)))
    runtime, _ = fake_runtime(config)
    with pytest.raises(DocumentError, match="'w9', which the model reserves"):
        list(generate(runtime, document_of(Text("w8 w9")), GenerationOptions(max_tokens=1)))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"stop": "moves"}, "stop .*a tuple of strings.*; got str 'moves'"),
        ({"stop": ("a", 5)}, r"stop .*; got tuple \('a', 5\)"),
        ({"stop": None}, "stop .*; got NoneType None"),
        ({"seed": 1.5}, "seed .*expected a whole number; got float 1.5"),
        ({"seed": "1"}, "seed .*expected a whole number; got str '1'"),
        ({"seed": None}, "seed .*expected a whole number; got NoneType None"),
        ({"max_tokens": 2.0}, "max_tokens .*; got float 2.0"),
        ({"max_images": True}, "max_images .*; got bool True"),
        ({"turn_tokens": "3"}, "turn_tokens .*; got str '3'"),
        ({"draw_first": 1}, "draw_first .*expected True or False; got int 1"),
        ({"draw_first": "no"}, "draw_first .*; got str 'no'"),
        ({"temperature": "0"}, "temperature .*expected a number; got str '0'"),
        ({"top_k": 0.5}, "top_k .*expected a whole number; got float 0.5"),
        ({"guidance": 1j}, "guidance .*expected a number; got complex 1j"),
        ({"schedule": 20}, "schedule .*expected a string; got int 20"),
    ],
    ids=str,
)
def test_options_of_another_type_are_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=f"{line}$"):
        GenerationOptions(**options)


def test_options_take_lists_and_the_numbers_of_numpy() -> None:
    stop: Any = ["a", "b"]
    given = GenerationOptions(
        seed=np.int64(7), temperature=1, top_p=np.float32(0.5), stop=stop, draw_first=np.True_
    )
    assert given == GenerationOptions(
        seed=7, temperature=1.0, top_p=0.5, stop=("a", "b"), draw_first=True
    )
    assert type(given.seed) is int and type(given.draw_first) is bool


def test_a_session_takes_no_floats_for_a_picture() -> None:
    """Floats of the model's own size are no 8-bit levels; the session stays as it was."""
    session = Session(fake_runtime()[0])
    with pytest.raises(
        DocumentError, match=r"uint8 \[height, width, 3\] array.*; got float64 \[16, 16, 3\]"
    ):
        session.append_image(picture(3) / 255)
    assert session.images == 0 and not session.token_ids


def test_a_bias_beyond_the_vocabulary_is_refused_before_anything_runs() -> None:
    runtime, log = fake_runtime()
    options = GenerationOptions(logit_bias={VOCAB: 1.0})
    with pytest.raises(ConfigError, match=f"expected 0 to {VOCAB - 1}; got {VOCAB}"):
        generate(runtime, PROMPT, options)
    assert not log.calls


def test_presence_and_frequency_penalties_count_the_current_turn_alone() -> None:
    """Logits 0.5 apart: a penalty of 1 for each time gives way to the next words in turn."""
    runtime, _ = fake_runtime()
    llm = runtime.engine("llm")
    real = llm._execute

    def execute(inputs: Any, outputs: Any) -> None:
        real(inputs, outputs)
        outputs["logits"].read()[...] = 20 - np.arange(VOCAB) / 2

    llm._execute = execute  # type: ignore[method-assign]
    for penalty, words in (("presence", "w5 w6 w5 w5"), ("frequency", "w5 w6 w5 w7")):
        chosen: dict[str, Any] = {f"{penalty}_penalty": 0.75}
        options = GenerationOptions(turn_tokens=4, max_images=2, temperature=0, **chosen)
        events = story(list(generate(runtime, PROMPT, options)))
        texts = [event for event in events if event.startswith("text")]
        assert texts == [f"text: {words}", f"text:{words}"]


@pytest.mark.parametrize("count", [None, 0, 2])
def test_text_brings_the_log_probabilities_of_its_tokens_on_request(count: int | None) -> None:
    chosen = {"turn_tokens": 4, "max_images": 2, "seed": 3, "top_p": 1.0}
    events, _ = run(**chosen, logprobs=count)
    plain, _ = run(**chosen)
    deltas = [event for event in events if isinstance(event, TextDelta)]
    given = [sampled for delta in deltas for sampled in delta.logprobs]
    assert story(events) == story(plain)
    if count is None:
        assert given == []
        return
    words = "".join(f"{delta.text} " for delta in deltas).split()
    assert [f"w{sampled.token}" for sampled in given] == words and len(words) == 8
    for sampled in given:
        assert sampled.logprob is not None and sampled.logprob < 0
        assert len(sampled.top) == count
        assert all(best >= sampled.logprob for _, best in sampled.top[:1])


def test_text_counts_the_tokens_written_so_far() -> None:
    # "w12" may begin the stop text, so that its text waits for the next token.
    events, _ = run(10, 11, 12, 13, TOKENS.boi, 0, 14, TOKENS.eos, stop=("w12 w99",))
    deltas = [(event.text, event.tokens) for event in events if isinstance(event, TextDelta)]
    words = [delta for delta in deltas if delta[0].strip()]
    assert words == [(" w10", 1), (" w11", 2), ("w12 w13", 4), ("w14", 5)]
    assert [tokens for _, tokens in deltas] == sorted(tokens for _, tokens in deltas)
    assert events[-1].tokens == 5  # type: ignore[union-attr]
