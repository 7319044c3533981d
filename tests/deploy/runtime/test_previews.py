"""Previews: the pictures out of the noise that a generation shows while it draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from deploy.runtime.fake_model import PREVIEW_MAP, fake_runtime, picture
from exports import SHIPPED
from mmi_deploy.batching.batch_engine import BatchEngine
from mmi_deploy.documents.document import Document, Draw, Image, Text, document_of
from mmi_deploy.documents.images import Rgb, to_rgb
from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.runtime.events import Event, ImageDone, ImageProgress
from mmi_deploy.runtime.generation import generate, preview_steps
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.session import Session
from mmi_deploy.runtime.work import Condition, Denoise, Picture
from mmi_deploy.spec.preview_map import PreviewMap

if TYPE_CHECKING:
    from exports import Exported

DOCUMENT = document_of(Text("w5 w6"), Image(picture(1)), Draw(), Text("w7"))


def written(runtime: Runtime, document: Document = DOCUMENT, **options: Any) -> list[Event]:
    options = {"max_images": 1, "turn_tokens": 3, "schedule": "ancestral:4", **options}
    return list(generate(runtime, document, GenerationOptions(**options)))


def shown(events: list[Event]) -> dict[tuple[int, int], Rgb]:
    """Previews by picture and step."""
    return {
        (event.index, event.step): event.preview
        for event in events
        if isinstance(event, ImageProgress) and event.preview is not None
    }


def comparable(events: list[Event]) -> Iterator[Any]:
    """Events without previews and timings."""
    for event in events[:-1]:
        match event:
            case ImageDone(index, rgb):
                yield index, rgb.tobytes()
            case ImageProgress():
                yield replace(event, preview=None)
            case _:
                yield event


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20, 50, 999])
def test_previews_are_spread_over_the_steps(steps: int) -> None:
    for previews in (0, 1, 2, 3, 7, steps - 1, steps, 10**6):
        chosen = sorted(preview_steps(steps, previews))
        assert len(chosen) == min(previews, steps - 1)
        assert all(1 <= step < steps for step in chosen), "the picture itself follows the last step"
        gaps = np.diff([0, *chosen, steps])
        assert gaps.max() - gaps.min() <= 1
    assert sorted(preview_steps(20, 3)) == [5, 10, 15]


@pytest.mark.parametrize("full_every", [1, 3])
@pytest.mark.parametrize("previews", [1, 2, 3, 99])
def test_previews_change_nothing_else(previews: int, full_every: int) -> None:
    plain = written(fake_runtime()[0], full_every=full_every)
    events = written(fake_runtime()[0], full_every=full_every, previews=previews)
    assert [*comparable(events)] == [*comparable(plain)]
    assert not shown(plain)
    steps = preview_steps(4, previews)
    assert {*shown(events)} == {(index, step) for index in (1, 2) for step in steps}
    for rgb in shown(events).values():
        assert rgb.shape == (4, 4, 3) and rgb.dtype == np.uint8 and rgb.flags.owndata
    repeated = shown(written(fake_runtime()[0], full_every=full_every, previews=previews))
    assert all((shown(events)[key] == rgb).all() for key, rgb in repeated.items())


@pytest.mark.parametrize("full_every", [1, 2])
def test_a_preview_is_the_data_prediction_of_its_step(full_every: int) -> None:
    runtime, log = fake_runtime()
    previews = shown(written(runtime, full_every=full_every, previews=3))
    steps = [call for name, call in log.calls if name in ("denoise_step", "denoise_shallow")]
    assert len(steps) == 2 * 4 and len(previews) == 2 * 3
    for (index, step), rgb in previews.items():
        # The last data prediction goes into the next step as the middle one of the history.
        data = steps[4 * (index - 1) + step]["history"][0, 1]
        colours = np.einsum("cz,zyx->yxc", PREVIEW_MAP.weights, data) + PREVIEW_MAP.bias
        wanted = np.rint(colours.clip(0, 1) * 255)
        assert np.abs(rgb - wanted).max() <= 1 and np.ptp(wanted)  # float32 against float64


def test_a_bundle_without_a_map_shows_none() -> None:
    runtime, _ = fake_runtime()
    runtime._preview_map = None
    assert not shown(written(runtime))
    with pytest.raises(ConfigError, match="no map for previews.*mmi export"):
        written(runtime, previews=1)
    with (
        BatchEngine(runtime, slots=1, warm_up=False) as engine,
        pytest.raises(ConfigError, match="no map for previews.*mmi export"),
    ):
        engine.submit(DOCUMENT, GenerationOptions(previews=1))


@pytest.mark.parametrize("wrong", [-1, 1.5, "2"])
def test_the_number_of_previews_is_checked(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="previews"):
        GenerationOptions(previews=wrong)


def test_a_preview_of_nan_ends_the_document() -> None:
    runtime, _ = fake_runtime()
    session = Session(runtime)
    session.append_text([1, 3])
    drawn = Picture(0)
    session.do(Condition(drawn))
    assert session.do(Denoise(drawn, 0)) is None
    assert session.do(Denoise(drawn, 1, preview=True)).shape == (4, 4, 3)
    history = session._picture_rows()._state["history"]
    history.read()[0, 1, 2, 3, 3] = np.nan
    with pytest.raises(EngineError, match="preview of picture 0 are not finite"):
        session.preview(drawn)


def test_documents_together_show_what_they_show_alone() -> None:
    """Also those whose neighbour wants none, and whose neighbour leaves its row between steps."""
    runtime, _ = fake_runtime()
    asked = [
        (document_of(Text(f"w{5 + seed}"), Draw()), {"seed": seed, "previews": seed % 4})
        for seed in range(6)
    ]
    asked[2] = (document_of(Text("w9"), *[Draw()] * 3), {"seed": 2, "previews": 2})
    options = [GenerationOptions(max_tokens=2, max_images=0, **more) for _, more in asked]
    with BatchEngine(runtime, slots=5, warm_up=False) as engine:
        streams = [
            engine.submit(document, one) for (document, _), one in zip(asked, options, strict=True)
        ]
        together = [[*stream] for stream in streams]
        stats = engine.stats()
    assert stats.rows["denoise"] > stats.runs["denoise"], "no run was shared"
    for (document, _), one, events in zip(asked, options, together, strict=True):
        alone = list(generate(fake_runtime()[0], document, one))
        assert [*comparable(events)] == [*comparable(alone)]
        assert shown(events).keys() == shown(alone).keys()
        for key, rgb in shown(alone).items():
            np.testing.assert_array_equal(rgb, shown(events)[key])


def test_the_map_is_linear_in_each_cell() -> None:
    map_ = PreviewMap(((1.0, 0.0), (0.0, 2.0), (0.5, 0.5)), (0.0, 0.25, -1.0), 0.1, "nothing")
    latents = np.array([[[0.1, 0.2]], [[0.3, -0.4]]], np.float32)  # [2, 1, 2]
    wanted = [[[0.1, 0.2]], [[0.85, -0.55]], [[-0.8, -1.1]]]
    np.testing.assert_allclose(map_.pixels(latents), wanted, atol=1e-6)
    np.testing.assert_array_equal(to_rgb(map_.pixels(latents))[0, 0], [26, 217, 0])


def test_previews_come_closer_to_the_picture(exported_once: Callable[[str], Exported]) -> None:
    """Errors of the shipped model's previews fall from the first to the last."""
    exported = exported_once(SHIPPED)
    runtime = Runtime.open(exported.bundle)
    if exported.folder.name != "tiny":
        pytest.skip("the trained model is not here")
    words = document_of(Text("a red square at top center and a blue cross at bottom right"), Draw())
    mean = np.zeros(4)
    for seed in range(3):
        options = GenerationOptions(
            seed=seed, max_tokens=0, max_images=0, schedule="unipc:20", previews=4
        )
        events = list(generate(runtime, words, options))
        (done,) = (event for event in events if isinstance(event, ImageDone))
        mean += [error(rgb, done.rgb) for rgb in shown(events).values()]
    assert (np.diff(mean) < 0).all(), mean / 3


def error(preview: Rgb, rgb: Rgb) -> float:
    """Mean absolute error of a preview that is scaled to the picture's size."""
    scale = len(rgb) // len(preview)
    large = preview.repeat(scale, axis=0).repeat(scale, axis=1)
    return float(np.abs(large.astype(float) - rgb).mean())
