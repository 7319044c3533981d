"""A session only appends, computes everything once, and gives what one full run would give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.runtime.fake_model import (
    LIMITS,
    Log,
    denoise_step,
    fake_config,
    fake_runtime,
    fake_schedule,
    picture,
    vae_decoder,
)
from deploy.runtime.tensorrt.fake_cuda import FakeCuda
from deploy.runtime.tensorrt.gpu_targets import add_target, fake_bundle, machine
from mmi_deploy.documents.images import to_rgb
from mmi_deploy.errors import DocumentError, EngineError
from mmi_deploy.runtime.keyed_random import first_latents, step_noise
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.session import Session, pad_images
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.graphs import DEEP, IMAGE_SLOT_PADDING, Limits
from mmi_deploy.spec.token_layout import image_positions, picture_positions


@pytest.fixture(autouse=True, params=["host", "gpu"])
def where(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Every claim here holds for a session on the host and for one on a GPU."""
    if request.param == "host":
        yield
        return
    gpus: list[FakeCuda] = []

    def on_gpu(config: ModelConfig | None = None, limits: Limits = LIMITS) -> tuple[Runtime, Log]:
        log, folder = Log(), tmp_path / str(len(gpus)) / "bundle"
        folder.parent.mkdir()
        bundle = fake_bundle(folder, config or fake_config(), limits)
        found = machine(bundle, add_target(bundle), log=log)
        gpus.append(found.cuda)
        return found.runtime, log

    monkeypatch.setattr(request.module, "fake_runtime", on_gpu)
    yield
    assert [gpu.faults for gpu in gpus] == [[]] * len(gpus)


TOKENS = fake_config().tokens
BOI, BOS = TOKENS.boi, TOKENS.bos
# Token runs and numbers of pictures; the middle text ends one document and begins another.
PARTS: list[list[int] | int] = [[BOS, 7, 8], 0, [9], 1, [10, 11, BOS, 12, 13], 2, [14, 15]]


def append(session: Session, part: list[int] | int) -> None:
    if isinstance(part, int):
        session.append_image(picture(part))
    else:
        session.append_text(part)


def full_document() -> tuple[Session, Log]:
    """All parts read in one run of the LLM."""
    runtime, log = fake_runtime()
    session = Session(runtime)
    for part in PARTS:
        append(session, part)
    session.next_logits()
    return session, log


def test_a_prompt_is_one_run_and_every_image_is_encoded_once() -> None:
    session, log = full_document()
    session.next_logits()
    assert log.counts() == {
        "vision_encoder": 1,
        "llm_values": 1,
        "llm": 1,
    }  # no picture: no values for it
    at_once = [len(call["pixels"]) for call in log.of("vision_encoder")]
    assert at_once == [3]
    assert session.images == 3 and session.room == LIMITS.context - len(session.token_ids)


@pytest.mark.parametrize("split", ["parts", "tokens"])
def test_growing_by_pieces_equals_one_run(split: str) -> None:
    """Logits, hidden states and the KV cache agree; each piece costs one run of its own length."""
    expected, _ = full_document()
    runtime, log = fake_runtime()
    session = Session(runtime)
    for part in PARTS:
        whole = split == "parts" or isinstance(part, int)
        pieces = [part] if whole else [[token] for token in part]
        for piece in pieces:
            append(session, piece)
            session.next_logits()
    lengths = [call["token_ids"].shape[1] for call in log.of("llm")]
    assert sum(lengths) == len(session.token_ids)
    assert lengths == (
        [3, 4, 1, 4, 5, 4, 2] if split == "parts" else [1, 1, 1, 4, 1, 4, *[1] * 5, 4, 1, 1]
    )
    np.testing.assert_allclose(session.next_logits(), expected.next_logits(), atol=1e-6)
    states, others = (
        one._hidden.tokens(0, len(session.token_ids)).read() for one in (session, expected)
    )
    np.testing.assert_allclose(states, others, atol=1e-6)
    for name, buffer in session._cache_rows.first(1).items():
        np.testing.assert_allclose(
            buffer.read(), expected._cache_rows.first(1)[name].read(), atol=1e-6
        )


@pytest.mark.parametrize("seen", [1, 2, 49])
def test_incremental_positions_equal_the_whole_row(seen: int) -> None:
    """Positions of images at each run of the LLM are a slice of `token_layout.image_positions`."""
    config = fake_config(llm_sees=seen)
    runtime, log = fake_runtime(config)
    session = Session(runtime)
    generator = np.random.default_rng(seen)
    for number in range(LIMITS.images):
        session.append_text([BOS] if generator.random() < 0.4 else [20, 21])
        if generator.random() < 0.5:
            session.next_logits()
        session.append_image(picture(number))
        session.append_text([22])
        session.next_logits()
    row = np.array([session.token_ids])
    whole = image_positions(row, TOKENS, LIMITS.images, seen)[0]  # [t, m]
    assert whole.any()
    for call in log.of("llm"):
        first, count = int(call["write_index"][0]), call["token_ids"].shape[1]
        told = np.zeros((count, LIMITS.images), np.int32)
        for slot, column in zip(call["image_slot"][0], call["image_position"][0].T, strict=True):
            told[:, slot] = np.maximum(told[:, slot], column)
        np.testing.assert_array_equal(told, whole[first : first + count])
        np.testing.assert_array_equal(call["position"][0], np.arange(first, first + count))


def test_visual_tokens_replace_image_tokens_in_order() -> None:
    _, log = full_document()
    (call,) = log.of("llm")
    index = call["visual_index"][0]
    assert index[call["token_ids"][0] == TOKENS.image].tolist() == list(range(9))
    assert (index[call["token_ids"][0] != TOKENS.image] == -1).all()
    assert call["visual_tokens"].shape == (9, 8)
    assert call["logit_index"].tolist() == [[len(index) - 1]]


def test_without_images_there_is_one_hidden_slot() -> None:
    """N >= 1 and M >= 1 always: rows of zeros, position 0."""
    runtime, log = fake_runtime()
    session = Session(runtime)
    session.append_text([BOS, 5])
    session.next_logits()
    session.append_text([6, BOI])
    session.draw()
    for call in (log.of("llm")[0], log.of("denoise_step")[0]):
        assert call["image_slot"].tolist() == [[0]] and not call["image_position"].any()
        pools = [array for name, array in call.items() if name.startswith(("llm_v", "unet_v"))]
        assert pools and not any(pool.any() for pool in pools)


def test_images_are_padded_to_few_shapes() -> None:
    for count in range(1, 50):
        slot, position = pad_images(
            np.arange(count, dtype=np.int32), np.ones((1, 2, count), np.int32), 49
        )
        assert slot.shape == (1, position.shape[2]) and slot.shape[1] in IMAGE_SLOT_PADDING
        assert slot.shape[1] < 2 * count or count == 1
        assert (position[..., :count] == 1).all() and not position[..., count:].any()
    assert pad_images(np.arange(5, dtype=np.int32), np.ones((1, 5), np.int32), 6)[0].shape == (1, 6)


def test_context_of_a_picture_is_its_document() -> None:
    """From the latest `<s>` to the begin-of-image token, both included; the latter has passed
    through the LLM before."""
    runtime, log = fake_runtime()
    session = Session(runtime)
    session.append_text([BOS, 5, 6, BOS, 7, 8, BOI])
    session.draw()
    assert log.calls[0][0] == "llm" and log.calls[1][0] == "image_condition"
    (call,) = log.of("image_condition")
    whole = fake_runtime()[0].engine("llm").run(log.of("llm")[0])["hidden"].read()[0]
    np.testing.assert_array_equal(call["context"][0], whole[3:7])
    assert call["context_length"].tolist() == [4]


def test_the_unet_sees_earlier_pictures_of_the_document_nearest_first() -> None:
    """As `token_layout.picture_positions` defines, with a ring buffer of as many rows as it may
    see."""
    runtime, log = fake_runtime()  # sees 2
    session = Session(runtime)
    session.append_text([BOS, 5])
    drawn = []
    for number in range(6):
        if number == 4:
            session.append_text([BOS])
        session.append_text([6, BOI])
        drawn.append(session.draw(seed=number))
    row = np.array([session.token_ids])
    whole = picture_positions(row, TOKENS, 6, 2)[0]
    assert whole.tolist()[3] == [0, 2, 1, 0, 0, 0] and whole.tolist()[5] == [0, 0, 0, 0, 1, 0]
    # Values are computed when a later picture of the document may see them; the last one is seen by
    # none.
    assert sum(len(call["features"]) for call in log.of("unet_values")) == 5
    firsts = [call for call in log.of("denoise_step") if call["step"].tolist() == [0]]
    for number, call in enumerate(firsts):
        told = {
            int(position): call["unet_value.00"][slot]
            for slot, position in zip(call["image_slot"][0], call["image_position"][0], strict=True)
            if position
        }
        expected = {int(position): k for k, position in enumerate(whole[number]) if position}
        assert told.keys() == expected.keys()
        for position, image in expected.items():
            fresh = fake_runtime()[0].engine("unet_values")
            seen = (
                fake_runtime()[0]
                .engine("vision_encoder")
                .run({"pixels": (drawn[image].transpose(2, 0, 1)[None] / 255).astype(np.float32)})
            )
            value = fresh.run({"features": seen["features"]})["unet_value.00"].read()[0]
            np.testing.assert_allclose(told[position], value, atol=1e-6)


@pytest.mark.parametrize("schedule", ["plain:4", "ancestral:4"])
def test_a_picture_is_the_schedule_applied_to_keyed_draws(schedule: str) -> None:
    """The whole trajectory again, by hand, from the inputs of the first step."""
    runtime, log = fake_runtime()
    session = Session(runtime)
    session.append_text([BOS, 5])
    session.append_image(picture(1))
    session.append_text([6, BOI])
    seen: list[tuple[int, int]] = []
    rgb = session.draw(schedule, 2.0, seed=11, on_step=lambda step, of: seen.append((step, of)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]

    shape, table = (1, 4, 4, 4), fake_schedule(schedule)
    inputs = dict(log.of("denoise_step")[0])
    assert inputs["guidance"] == 2.0
    state = first_latents(11, 1, shape) * np.float32(1.5)
    history = np.zeros((1, 3, *shape[1:]), np.float32)
    for step in range(4):
        noise = step_noise(11, 1, step, shape) if schedule == "ancestral:4" else np.zeros(shape)
        inputs |= {"latents": state, "history": history, "noise": noise, "step": np.array([step])}
        inputs |= {"coefficients": table.coefficients}
        out = denoise_step(runtime.config, inputs)
        state, history = out["next_latents"], out["next_history"]
    expected = to_rgb(vae_decoder(runtime.config, {"latents": state})["pixels"][0])
    assert rgb.shape == (16, 16, 3) and np.abs(rgb.astype(int) - expected).max() <= 1
    assert session.images == 2 and session.token_ids[-3:] == [TOKENS.image] * 3


def test_pictures_repeat_with_the_seed() -> None:
    def draw(seed: int) -> np.ndarray:
        session = Session(fake_runtime()[0])
        session.append_text([BOS, 5, BOI])
        return session.draw(seed=seed)

    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1) != draw(2)).any()


@pytest.mark.parametrize("full_every", [1, 2, 3, 9])
def test_steps_between_two_whole_ones_use_the_deep_features_of_the_last(full_every: int) -> None:
    runtime, log = fake_runtime()
    session = Session(runtime)
    session.append_text([BOS, 5, BOI])
    session.draw(full_every=full_every, guidance=2.0)
    whole, shallow = log.of("denoise_step"), log.of("denoise_shallow")
    assert [call["step"].item() for call in whole] == list(range(0, 4, full_every))
    assert [call["step"].item() for call in shallow] == [s for s in range(4) if s % full_every]
    for call in shallow:
        last = whole[call["step"].item() // full_every]
        made = denoise_step(runtime.config, last)[DEEP]
        np.testing.assert_allclose(call[DEEP], made, rtol=1e-6)


def test_an_abandoned_picture_changes_nothing() -> None:
    session = Session(fake_runtime()[0])
    session.append_text([BOS, 5, BOI])
    half = session.draw_steps(None, 1.0, 3)
    assert next(half) == (1, 4)
    half.close()
    again = Session(fake_runtime()[0])
    again.append_text([BOS, 5, BOI])
    np.testing.assert_array_equal(session.draw(seed=3), again.draw(seed=3))


def test_pictures_of_another_size_are_resized() -> None:
    runtime, log = fake_runtime()
    session = Session(runtime)
    session.append_text([BOS])
    session.append_image(picture(0, side=40))
    session.next_logits()
    assert log.of("vision_encoder")[0]["pixels"].shape == (1, 3, 16, 16)


def test_what_does_not_fit_is_refused() -> None:
    runtime, _ = fake_runtime(limits=Limits(context=12, images=2))
    session = Session(runtime)
    with pytest.raises(DocumentError, match="empty document"):
        session.next_logits()
    with pytest.raises(DocumentError, match="after a begin-of-image token"):
        session.draw()
    with pytest.raises(DocumentError, match="come from images alone"):
        session.append_text([TOKENS.image])
    session.append_text([BOS, BOI])
    with pytest.raises(DocumentError, match="must follow"):
        session.append_text([5])
    session.append_image(picture(0))
    session.append_image(picture(1))
    with pytest.raises(DocumentError, match="too many images; expected at most 2"):
        session.append_image(picture(2))
    with pytest.raises(DocumentError, match="too long; expected at most 12 tokens; got 13"):
        session.append_text([5, 5, 5, 5])
    assert len(session.token_ids) == 9


@pytest.mark.parametrize("graph", ["llm", "vae_decoder"])
def test_numbers_that_are_not_finite_are_an_error(graph: str) -> None:
    """SD 2.1 in fp16 has given black pictures: NaN must not pass for one, nor for a token."""
    runtime, _ = fake_runtime()
    engine, output = runtime.engine(graph), "logits" if graph == "llm" else "pixels"
    real = engine._execute

    def execute(inputs: Any, outputs: Any) -> None:
        real(inputs, outputs)
        spoiled = outputs[output].read().copy()
        spoiled.flat[-1] = np.nan
        outputs[output].write(spoiled)

    engine._execute = execute  # type: ignore[method-assign]
    session = Session(runtime)
    session.append_text([BOS, BOI])
    with pytest.raises(EngineError, match=f"the {output} .* are not finite"):
        if graph == "llm":
            session.next_logits()
        else:
            session.draw()


def test_sessions_that_take_turns_do_not_disturb_each_other() -> None:
    """One runtime, two documents: each has its own caches, whatever was bound before."""
    expected, _ = full_document()
    runtime, _ = fake_runtime()
    first, second = Session(runtime), Session(runtime)
    second.append_text([BOS, 30])
    for part in PARTS:
        append(first, part)
        first.next_logits()
        second.append_text([31])
        second.next_logits()
    np.testing.assert_allclose(first.next_logits(), expected.next_logits(), atol=1e-6)


def test_stages_are_timed() -> None:
    session = Session(fake_runtime()[0])
    session.append_text([BOS, 5])
    session.append_image(picture(0))
    session.append_text([6, BOI])
    session.draw()
    session.next_logits()
    session.append_text([7])
    session.next_logits()
    totals = {stage: count for stage, (_, count) in session.timings.totals().items()}
    assert totals == {
        "encode": 2,
        "prefill": 11,
        "decode": 1,
        "values": 1,
        "condition": 1,
        "denoise": 4,
        "vae": 1,
    }
    assert len(session.timings.seconds("denoise")) == 4
