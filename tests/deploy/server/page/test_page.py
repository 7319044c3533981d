"""The page in a browser, with a server whose answers are recorded."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image as PillowImage

from deploy.server.page.mock_server import MockServer, Scenario, drawn, png
from mmi_deploy.documents.document import Draw, Image, Text
from mmi_deploy.documents.files import read_document

if TYPE_CHECKING:
    from playwright.sync_api import Page


Opener = Callable[..., "Page"]

SLOW = Scenario(pictures=3, step=0.2, word=0.1)


def write(page: Page, words: str) -> None:
    """Type words and let the model go on; returns at once."""
    page.locator("#draft").click()
    page.keyboard.type(words)
    page.keyboard.press("Control+Enter")


def finished(page: Page) -> None:
    page.locator("#go-words", has_text="Write").wait_for()
    page.locator(".foot").first.wait_for()


def becomes(page: Page, read: Callable[[], object], wanted: object) -> None:
    """Wait until the page shows something: what a key or a click changes may be a frame late."""
    for _ in range(100):
        if read() == wanted:
            return
        page.wait_for_timeout(50)
    assert read() == wanted


def texts(page: Page) -> list[str]:
    found: list[str] = page.locator(".part.text .words").evaluate_all(
        "all => all.map(a => a.value)"
    )
    return found


def kinds(page: Page) -> list[str]:
    found: list[str] = page.locator(".part").evaluate_all(
        "all => all.map(a => a.classList[1] + ' ' + a.classList[2])"
    )
    return found


def status(page: Page) -> str:
    return page.locator("#status").text_content() or ""


def menu(page: Page, part: int, item: str) -> None:
    """Choose an item of the menu of the `part`-th part."""
    page.locator(".part").nth(part).locator(".more").focus()
    page.keyboard.press("Enter")
    page.get_by_role("menuitem", name=item, exact=True).click()


def file(name: str, data: bytes, mime: str = "image/png") -> dict[str, Any]:
    return {"name": name, "mimeType": mime, "buffer": data}


def test_a_story_is_one_document_in_order(page: Page, server: MockServer) -> None:
    page.set_input_files("#picture-files", file("scene.png", png(drawn(3))))
    page.locator(".picture").wait_for()
    write(page, "the red square moves down.")
    finished(page)
    assert kinds(page) == [
        "picture by-you",
        "text by-you",
        *["text by-model", "picture by-model"] * 2,
    ]
    assert texts(page)[0] == "the red square moves down."
    assert status(page).startswith("Finished: 10 words, 2 pictures")
    (body,) = server.bodies
    content = body["input"][0]["content"]
    assert [part["type"] for part in content] == ["input_image", "input_text"]
    assert body["stream"] is True and body["mmi"]["image_transport"] == "url"
    assert body["tools"] == [
        {"type": "image_generation", "partial_images": 3, "output_format": "png"}
    ]
    # The pictures are those of the server, byte for byte.
    foot = page.locator(".foot").text_content() or ""
    assert f"seed {body['mmi']['seed']}" in foot and "20 steps" in foot and "guidance 3.5" in foot
    alts = page.locator(".picture img").evaluate_all("all => all.map(i => i.alt)")
    assert alts[1:] == ["the red square moves down.", "the red square turns blue."]


def test_words_and_previews_stream_into_a_frame_of_the_final_size(
    page: Page, server: MockServer
) -> None:
    server.scenario = SLOW
    write(page, "a story.")
    page.locator(".draw[data-state=drawing]").wait_for()
    frame = page.locator(".frame").bounding_box()
    page.locator(".draw .frame img:not([hidden])").wait_for()
    assert page.locator(".draw .kind").text_content() in [
        f"Picture 1 · step {n} of 20" for n in range(1, 21)
    ]
    assert page.locator(".draw").get_attribute("aria-busy") == "true"
    page.locator(".picture").first.wait_for()
    picture = page.locator(".enlarge").first.bounding_box()
    assert (
        frame
        and picture
        and (frame["width"], frame["height"])
        == (
            picture["width"],
            picture["height"],
        )
    )
    assert page.locator(".picture img").first.evaluate(
        "i => getComputedStyle(i).imageRendering"
    ) == ("pixelated")


def test_a_model_without_previews_is_not_asked_for_them(
    open_page: Opener, server: MockServer
) -> None:
    server.previews = False
    page = open_page(server.url)
    write(page, "a story.")
    finished(page)
    assert server.bodies[0]["tools"][0]["partial_images"] == 0
    assert page.locator(".picture").count() == 2


def test_stop_keeps_what_is_there(page: Page, server: MockServer) -> None:
    server.scenario = SLOW
    write(page, "a story.")
    page.locator(".draw .frame img:not([hidden])").wait_for()
    page.keyboard.press("Escape")
    page.locator(".draw[data-state=stopped]").wait_for()
    assert re.search(r"stopped at step \d+ of 20", page.locator(".draw .kind").text_content() or "")
    assert texts(page) == ["a story.", "the red square moves down."]
    assert status(page).startswith("Stopped: 5 words, 0 pictures")
    assert server.cancelled.wait(20), "the server sees that the client has left"
    # The picture that was not finished is drawn in its place by the next turn.
    server.scenario = Scenario(pictures=1)
    page.keyboard.press("Control+Enter")
    page.locator(".picture").wait_for()
    finished(page)
    assert server.bodies[1]["input"][0]["content"][-1] == {"type": "mmi.draw"}
    assert kinds(page)[:3] == ["text by-you", "text by-model", "picture by-model"]


def test_places_to_draw_are_filled(page: Page, server: MockServer) -> None:
    write_place = page.locator("#draft")
    write_place.fill("first")
    page.click("#add-draw")
    write_place.fill("second")
    page.click("#add-draw")
    page.keyboard.press("Control+Enter")
    finished(page)
    assert kinds(page)[:4] == [
        "text by-you",
        "picture by-model",
        "text by-you",
        "picture by-model",
    ]
    sent = [part["type"] for part in server.bodies[0]["input"][0]["content"]]
    assert sent == ["input_text", "mmi.draw", "input_text", "mmi.draw"]


def test_parts_are_edited_moved_removed_and_brought_back(page: Page, server: MockServer) -> None:
    write(page, "one.")
    finished(page)
    page.locator(".part.text .words").nth(1).fill("changed by hand.")
    menu(page, 1, "Move up")
    becomes(page, lambda: texts(page)[:2], ["changed by hand.", "one."])
    page.locator(".part.text .words").first.focus()
    page.keyboard.press("Alt+Shift+ArrowDown")
    becomes(page, lambda: texts(page)[:2], ["one.", "changed by hand."])
    second = page.locator(".part.text .words").nth(1)
    becomes(page, lambda: second.evaluate("a => a === document.activeElement"), True)
    menu(page, 2, "Remove")
    becomes(page, lambda: len(kinds(page)), 4)
    page.click("#note >> text=Undo")
    becomes(page, lambda: kinds(page)[2:3], ["picture by-model"])
    menu(page, 0, "Text after this")
    page.keyboard.type("in between.")
    page.keyboard.press("Control+Enter")
    becomes(page, lambda: len(server.bodies), 2)
    first = server.bodies[1]["input"][0]["content"][0]
    assert first["text"] == "one.\n\nin between.changed by hand."


def test_continue_from_here_keeps_both_versions(page: Page) -> None:
    write(page, "one.")
    finished(page)
    before = texts(page)
    menu(page, 1, "Continue from here")
    page.locator("#version-words", has_text="Version 2 of 2").wait_for()
    finished(page)
    assert texts(page)[:2] == before[:2]
    page.click("#version-back")
    page.locator("#version-words", has_text="Version 1 of 2").wait_for()
    assert texts(page) == before


def test_two_seeds_side_by_side(page: Page, server: MockServer) -> None:
    write(page, "one.")
    finished(page)
    page.click("text=Another seed")
    page.locator(".take .foot").nth(1).wait_for()
    heads = page.locator(".take > header h2").all_text_contents()
    seeds = [body["mmi"]["seed"] for body in server.bodies]
    assert heads == [f"Seed {seed}" for seed in seeds] and seeds[0] != seeds[1]
    assert server.bodies[0]["input"] == server.bodies[1]["input"]
    left, right = (page.locator(".take").nth(n).bounding_box() for n in (0, 1))
    assert left and right and left["y"] == right["y"] and left["x"] < right["x"]
    second = page.locator(".take").nth(1).locator("img").first.get_attribute("src")
    page.locator(".take button", has_text="Keep this one").nth(1).click()
    page.locator("#takes").wait_for(state="hidden")
    page.locator("#version-words", has_text="Version 1 of 2").wait_for()
    assert page.locator(".picture").count() == 2 and second
    assert f"seed {seeds[1]}" in (page.locator(".foot").text_content() or "")
    page.click("#version-forward")  # the ending that was not kept
    page.locator("#version-words", has_text="Version 2 of 2").wait_for()
    assert f"seed {seeds[0]}" in (page.locator(".foot").text_content() or "")


def test_the_document_is_there_after_a_reload(page: Page, server: MockServer) -> None:
    page.fill("#title", "My story")
    server.scenario = Scenario(pictures=1)
    write(page, "one.")
    finished(page)
    page.locator("#draft").fill("not sent yet")
    page.locator(".picture textarea").fill("an alt text")
    page.wait_for_timeout(1000)  # saving waits for a pause
    before = texts(page)
    page.reload()
    page.locator(".picture").wait_for()
    assert texts(page) == before
    assert page.input_value("#title") == "My story"
    assert page.input_value("#draft") == "not sent yet"
    assert page.locator(".picture img").get_attribute("alt") == "an alt text"
    assert page.locator(".picture img").evaluate("i => i.decode().then(() => i.naturalWidth)") == 64


def test_documents_are_listed_opened_and_deleted(page: Page) -> None:
    page.fill("#title", "First")
    page.locator("#draft").fill("some words")
    page.click("#new")
    becomes(page, lambda: page.input_value("#title"), "")
    page.fill("#title", "Second")
    page.locator("#draft").fill("other words")
    page.click("#documents")
    rows = page.locator("#documents-list .row b")
    rows.nth(1).wait_for()
    assert rows.all_text_contents() == ["Second", "First"]
    rows.nth(1).click()
    page.locator("#documents-panel").wait_for(state="hidden")
    becomes(page, lambda: page.input_value("#title"), "First")
    assert page.input_value("#draft") == "some words"
    page.click("#documents")
    page.click("[aria-label='Delete Second']")
    page.click("text=Delete?")
    rows.nth(1).wait_for(state="detached")
    assert rows.all_text_contents() == ["First"]


def saved(page: Page, folder: Path) -> Path:
    """Files of "Save all", unpacked."""
    with page.expect_download() as download:
        page.click("#save")
    path = folder / "saved.zip"
    download.value.save_as(path)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    return path


def test_save_all_is_read_by_mmi_and_opened_again(
    page: Page, server: MockServer, tmp_path: Path
) -> None:
    page.set_input_files("#picture-files", file("photo.jpg", jpeg(40, 30), "image/jpeg"))
    page.locator(".picture textarea").fill("a [photo] of `mine`")
    server.scenario = Scenario(pictures=1, sentences=("<b>words</b> ![ and ```.",))
    write(page, "```\none <img src=x> line\nand ![](b.png).")
    finished(page)
    page.click("#add-draw")
    page.locator("#draft").fill("the end.")
    path = saved(page, tmp_path)
    document = read_document(tmp_path / "story.md")
    given, drawn_one = (part for part in document.parts if isinstance(part, Image))
    assert given.alt == "a [photo] of `mine`"
    assert given.rgb.shape == (30, 40, 3)
    drawn_bytes = next(iter(server.pictures.values()))
    assert (tmp_path / "picture-02.png").read_bytes() == drawn_bytes
    written = "```\none <img src=x> line\nand ![](b.png).<b>words</b> ![ and ```."
    assert document.parts == (
        given,
        Text(written),
        drawn_one,
        Draw(),
        Text("the end."),
    )
    # The page opens what it saved: the same files come out again.
    page.click("#new")
    page.set_input_files("#document-files", str(path))
    page.locator(".picture").nth(1).wait_for()
    again = tmp_path / "again"
    again.mkdir()
    saved(page, again)
    for name in ("story.md", "picture-01.jpg", "picture-02.png"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_markdown_beside_its_pictures_is_opened(page: Page, repository: Path) -> None:
    examples = repository / "examples"
    chosen = [examples / "story.md", examples / "pictures" / "scene.png"]
    page.set_input_files("#document-files", [str(path) for path in chosen])
    page.locator(".picture").wait_for()
    assert kinds(page) == ["picture by-you", "text by-you", "draw by-you"]
    page.set_input_files("#document-files", str(examples / "story.md"))
    page.locator("#note", has_text="pictures/scene.png").wait_for()


def jpeg(width: int, height: int) -> bytes:
    data = io.BytesIO()
    PillowImage.effect_noise((width, height), 80).convert("RGB").save(data, "JPEG", quality=95)
    return data.getvalue()


def test_pictures_above_the_limit_are_scaled_down_and_it_is_said(
    open_page: Opener, server: MockServer
) -> None:
    server.limits = {"image_bytes": 60_000, "image_pixels": 90_000}
    page = open_page(server.url)
    page.set_input_files(
        "#picture-files", [file("large.jpg", jpeg(600, 400), "image/jpeg"), file("no.png", b"no")]
    )
    page.locator("#note", has_text="large.jpg (600 × 400").wait_for()
    said = page.locator("#note p").text_content() or ""
    assert "scaled down to 367 × 244" in said and "no.png cannot be read as a picture." in said
    write(page, "what is it?")
    finished(page)
    part = server.bodies[0]["input"][0]["content"][0]
    assert len(part["image_url"]) * 3 / 4 < 61_000


def test_pictures_are_pasted_at_the_caret_and_dropped(page: Page) -> None:
    page.locator("#draft").fill("one two")
    put = """([kind, target, bytes]) => {
      const transfer = new DataTransfer();
      transfer.items.add(new File([new Uint8Array(bytes)], "a.png", { type: "image/png" }));
      const element = document.querySelector(target);
      const event = kind === "paste" ? new ClipboardEvent("paste",
        { clipboardData: transfer, bubbles: true, cancelable: true })
        : new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
      if (kind === "paste") { element.focus(); element.setSelectionRange(3, 3); }
      element.dispatchEvent(event);
    }"""
    data = list(png(drawn(2)))
    page.evaluate(put, ["paste", "#draft", data])
    page.locator(".picture").wait_for()
    assert texts(page) == ["one"] and page.input_value("#draft") == "two"
    page.evaluate(put, ["drop", ".part.text", data])
    page.locator(".picture").nth(1).wait_for()
    assert kinds(page) == ["text by-you", "picture by-you", "picture by-you"]


REFUSALS = [
    (
        Scenario(status=429, code="queue_full", retry_after=7),
        "The server is busy",
        "7 seconds",
        True,
    ),
    (Scenario(status=503, code="draining", retry_after=5), "shutting down", "stays here", True),
    (Scenario(status=503, code="starting", retry_after=5), "starting", "loading the model", True),
    (
        Scenario(
            status=413, code="body_too_large", message="the body is too large; at most 9 bytes"
        ),
        "too large",
        "At most 9 bytes|at most 9 bytes",
        False,
    ),
    (
        Scenario(status=400, code="unknown_words", message="the model does not know 'Dog'"),
        "refused",
        "The model does not know 'Dog'.",
        False,
    ),
    (Scenario(status=500), "refused", "no reason", True),
]


@pytest.mark.parametrize(("scenario", "title", "words", "again"), REFUSALS)
def test_refusals_in_plain_words(
    page: Page, server: MockServer, scenario: Scenario, title: str, words: str, again: bool
) -> None:
    server.scenario = scenario
    write(page, "one.")
    alert = page.locator("#alert")
    alert.locator(".error").wait_for()
    said = alert.text_content() or ""
    assert title in said and re.search(words, said), said
    assert re.search(r"Request page-[0-9a-f]{24}", said)
    assert alert.get_attribute("role") == "alert"
    assert texts(page) == ["one."], "the words are kept"
    assert (alert.locator("button", has_text="Try again").count() == 1) is again
    server.scenario = Scenario(pictures=1)
    if again:
        alert.locator("button").click()
    else:
        page.keyboard.press("Control+Enter")
    finished(page)
    assert alert.text_content() == ""
    assert server.bodies[0]["input"] == server.bodies[1]["input"]


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        (Scenario(stop_after=12, ending="lost"), "The connection was lost"),
        (
            Scenario(stop_after=12, ending="failed", code="engine_died", message="x"),
            "The engine stopped",
        ),
        (
            Scenario(stop_after=12, ending="failed", code="deadline", message="x"),
            "time of one request",
        ),
    ],
    ids=["lost", "engine_died", "deadline"],
)
def test_what_came_before_a_failure_is_kept(
    page: Page, server: MockServer, scenario: Scenario, words: str
) -> None:
    server.scenario = scenario
    write(page, "one.")
    page.locator(".error", has_text=words).wait_for()
    assert texts(page) == ["one.", "the red square moves down."]
    assert page.locator(".draw").get_attribute("data-state") == "stopped"
    server.scenario = Scenario(pictures=1)
    page.click(".error >> text=Go on")
    page.locator(".picture").wait_for()
    assert server.bodies[1]["input"][0]["content"] == [
        {"type": "input_text", "text": "one.the red square moves down."},
        {"type": "mmi.draw"},
    ]


def test_a_server_that_is_gone_or_silent_is_noticed(open_page: Opener, server: MockServer) -> None:
    server.keep_alive = 1
    server.scenario = Scenario(stop_after=8, ending="silent")
    page = open_page(server.url)
    write(page, "one.")
    page.locator(".error", has_text="The server is silent").wait_for()
    page.click(".error >> text=Stop")
    page.locator("#go-words", has_text="Write").wait_for()
    page.context.set_offline(True)
    page.keyboard.press("Control+Enter")
    page.locator(".error", has_text="The server cannot be reached").wait_for()
    page.locator("#state[data-state=unreachable]").wait_for()
    page.context.set_offline(False)


def test_waiting_says_how_busy_the_server_is(page: Page, server: MockServer) -> None:
    server.scenario = Scenario(wait=6, pictures=1)
    server.documents = 9
    write(page, "one.")
    page.locator("#progress-words", has_text="9 documents at the server").wait_for()
    finished(page)


def test_a_draining_server_is_shown(open_page: Opener, server: MockServer) -> None:
    server.ready = "draining"
    page = open_page(server.url, ready=False)
    page.locator("#state[data-state=draining]", has_text="shutting down").wait_for()


def test_a_key_is_asked_for_and_kept_for_the_tab_only(
    open_page: Opener, server: MockServer
) -> None:
    server.key = "secret-key"
    page = open_page(server.url, ready=False)
    page.locator("#key-panel[open]").wait_for()
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    page.locator("#key-panel[open]").wait_for()
    page.fill("#key", "secret-key")
    page.keyboard.press("Enter")
    page.locator("#key-panel").wait_for(state="hidden")
    write(page, "one.")
    finished(page)
    assert page.locator(".picture").count() == 2, "pictures by URL need the key too"
    stores = page.evaluate("[JSON.stringify(sessionStorage), JSON.stringify(localStorage)]")
    assert "secret-key" in stores[0] and "secret-key" not in stores[1]
    assert "secret-key" not in page.url
    page.click("#show-request")
    assert "secret-key" not in (page.locator("#request-panel").text_content() or "")
    assert "$MMI_KEY" in (page.locator("#curl-text").text_content() or "")


HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>![x](http://example.com/a.png)"


def test_words_of_the_model_are_never_html(page: Page, server: MockServer) -> None:
    server.scenario = Scenario(pictures=1, sentences=(HOSTILE,))
    page.on("dialog", lambda dialog: pytest.fail(f"a dialog opened: {dialog.message}"))
    page.fill("#title", HOSTILE)
    write(page, HOSTILE)
    finished(page)
    page.locator(".picture").wait_for()
    assert texts(page) == [HOSTILE, HOSTILE]
    assert page.locator(".picture img").get_attribute("alt") == HOSTILE
    assert page.locator("img[src=x], .parts script").count() == 0
    page.click(".enlarge")
    assert HOSTILE in (page.locator("#large-words").text_content() or "")
    page.keyboard.press("Escape")
    page.click("#documents")
    page.locator("#documents-list .row").wait_for()
    page.keyboard.press("Escape")
    server.scenario = Scenario(status=400, code="x", message=HOSTILE)
    page.click("#go")
    page.locator(".error").wait_for()
    assert HOSTILE in (page.locator("#alert").text_content() or "")
    assert page.locator("img[src=x]").count() == 0


def test_settings_are_sent_kept_and_copied(page: Page, server: MockServer) -> None:
    page.click("#settings")
    fields = {
        "seed": "42",
        "images": "1",
        "tokens": "9",
        "guidance": "2.5",
        "fullEvery": "3",
        "temperature": "0.5",
        "topP": "0.8",
    }
    for name, value in fields.items():
        page.fill(f"[name={name}]", value)
    page.select_option("[name=sampler]", "ddim:50")
    page.click("text=Done")
    page.reload()
    write(page, "one.")
    finished(page)
    (body,) = server.bodies
    assert body["mmi"] == {
        "seed": 42,
        "max_images": 1,
        "guidance": 2.5,
        "schedule": "ddim:50",
        "full_every": 3,
        "image_transport": "url",
    }
    assert (body["max_output_tokens"], body["temperature"], body["top_p"]) == (9, 0.5, 0.8)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("text=Copy settings")
    page.locator("#status", has_text="Settings copied.").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == (
        "tiny · seed 42 · ddim · 50 steps · guidance 2.5 · whole U-Net every 3 steps · "
        "temperature 0.5 · top-p 0.8 · at most 9 tokens and 1 picture"
    )
    assert page.locator("#settings-words").text_content() == "1 picture · seed 42"


def test_pictures_are_enlarged_and_downloaded(page: Page, server: MockServer) -> None:
    write(page, "one.")
    finished(page)
    page.locator(".enlarge").first.click()
    large = page.locator("#large")
    assert (large.bounding_box() or {})["width"] > 500
    page.keyboard.press("ArrowRight")
    assert (page.locator("#large-words").text_content() or "").startswith("2 of 2")
    with page.expect_download() as download:
        page.click("#large-save")
    assert download.value.suggested_filename == "picture-02.png"
    assert Path(download.value.path()).read_bytes() == list(server.pictures.values())[1]


def test_another_tab_does_not_write_the_same_document(page: Page, server: MockServer) -> None:
    page.locator("#draft").fill("in the first tab")
    page.wait_for_timeout(1000)
    other = page.context.new_page()
    other.goto(server.url)
    other.locator("#state[data-state=ready]").wait_for()
    assert other.input_value("#draft") == ""
    other.click("#documents")
    other.click("#documents-list .row")
    other.locator("#note", has_text="open in another tab").wait_for()


# Frame times of a scroll through the document, in milliseconds.
SCROLL = """async () => {
  const times = [];
  let last = await new Promise(requestAnimationFrame);
  const end = document.documentElement.scrollHeight - innerHeight;
  for (let at = 0; at <= 120; at += 1) {
    scrollTo(0, (end * at) / 120);
    const now = await new Promise(requestAnimationFrame);
    times.push(now - last);
    last = now;
  }
  return times.sort((a, b) => a - b);
}"""


def test_two_hundred_parts_scroll(open_page: Opener, server: MockServer, tmp_path: Path) -> None:
    """The limit is generous: the machine of the tests draws without a GPU, and is shared."""
    archive = tmp_path / "long.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("a.png", png(drawn(1)))
        words = "a sentence of the story that is a little longer than a line of the column. " * 3
        zipped.writestr("story.md", f"{words}\n\n![a picture](a.png)\n\n" * 100)
    page = open_page(server.url)
    page.set_input_files("#document-files", str(archive))
    page.locator(".part").nth(199).wait_for()
    times = page.evaluate(SCROLL)
    assert times[len(times) // 2] < 50, times
    assert times[-len(times) // 20] < 250, times


def test_a_document_of_49_pictures_is_small(open_page: Opener, server: MockServer) -> None:
    """The page's memory, with pictures of 512 pixels, after all have come by their URLs."""
    server.scenario = Scenario(pictures=49, steps=4, step=0, word=0, side=512)
    page = open_page(server.url)
    page.click("#settings")
    page.fill("[name=images]", "49")
    page.click("text=Done")
    write(page, "one.")
    finished(page)
    assert page.locator(".picture").count() == 49
    used = page.evaluate("performance.memory.usedJSHeapSize")
    assert used < 100e6, f"{used / 1e6:.0f} MB"
    assert max(len(json.dumps(body)) for body in server.bodies) < 10_000
