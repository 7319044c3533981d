"""The page with the real server and the tiny model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from exports import SHIPPED, Exported
from mmi_deploy.documents.document import Image
from mmi_deploy.documents.files import read_document

if TYPE_CHECKING:
    from playwright.sync_api import Page

Opener = Callable[..., "Page"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def real_server(
    exported_once: Callable[[str], Exported],
    repository: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """URL of `mmi serve` with the tiny bundle, in a process of its own."""
    bundle = exported_once(SHIPPED).bundle.folder
    paths = [str(repository / folder) for folder in ("", "plugins")]
    environment = {
        **os.environ,
        "HOME": str(tmp_path_factory.mktemp("home")),
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "mmi_deploy", "serve", str(bundle), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--name", "tiny"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    said, url = "", ""
    for line in process.stdout:
        said += line
        if found := re.search(r"Serving tiny at (http://\S+)", line):
            url = found[1]
            break
    assert url, said
    threading.Thread(target=process.stdout.read, daemon=True).start()  # the log must not block it
    yield url
    process.terminate()
    assert process.wait(60) == 0


KEEP_ANSWER = """() => {
  const own = window.fetch;
  window.fetch = async (...given) => {
    const response = await own(...given);
    if (response.url.endsWith("/v1/responses")) window.answer = response.clone().text();
    return response;
  };
}"""


ESCAPE_AT_A_PICTURE = """() => {
  new MutationObserver((_, observer) => {
    if (!document.querySelector(".picture.by-model")) return;
    observer.disconnect();
    document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", cancelable: true }));
  }).observe(document.body, { childList: true, subtree: true });
}"""


def begin(page: Page, example: str, seed: int, images: int) -> None:
    """Open an example, with settings of its turn."""
    page.click(f"[data-example={example}]")
    page.locator(".part").first.wait_for()
    page.click("#settings")
    page.fill("[name=seed]", str(seed))
    page.fill("[name=images]", str(images))
    page.click("text=Done")


def texts(page: Page) -> list[str]:
    found: list[str] = page.locator(".part.text .words").evaluate_all(
        "all => all.map(a => a.value)"
    )
    return found


def pixels(page: Page, part: int) -> str:
    found: str = (
        page.locator(".part img")
        .nth(part)
        .evaluate(
            """async (image) => {
          await image.decode();
          const canvas = document.createElement("canvas");
          [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
          canvas.getContext("2d").drawImage(image, 0, 0);
          return canvas.toDataURL();
        }"""
        )
    )
    return found


def test_a_story_with_previews_saved_and_read_by_mmi(
    open_page: Opener, real_server: str, tmp_path: Path
) -> None:
    page = open_page(real_server)
    begin(page, "story", 3, 2)
    page.focus("#draft")
    # A busy browser may get a preview and its picture at once, and then shows the picture alone.
    page.evaluate(KEEP_ANSWER)
    page.keyboard.press("Control+Enter")
    page.locator(".foot").wait_for()
    events = re.findall(r"event: (\S+)", page.evaluate("answer"))
    assert events.count("response.image_generation_call.partial_image") >= 2
    assert page.locator("#alert").text_content() == ""
    assert page.locator(".picture").count() == 3
    assert page.locator(".picture.by-model img").first.evaluate("i => i.naturalWidth") == 64
    assert "seed 3" in (page.locator(".foot").text_content() or "")
    said = page.locator("#status").text_content() or ""
    assert re.match(r"Finished: \d+ words?, 2 pictures; that is as many", said), said
    with page.expect_download() as download:
        page.click("#save")
    with zipfile.ZipFile(download.value.path()) as archive:
        archive.extractall(tmp_path)
    document = read_document(tmp_path / "story.md")
    shapes = [part.rgb.shape for part in document.parts if isinstance(part, Image)]
    assert shapes == [(64, 64, 3)] * 3


def test_stop_then_edit_and_fork(open_page: Opener, real_server: str) -> None:
    page = open_page(real_server)
    begin(page, "story", 5, 20)
    page.evaluate(ESCAPE_AT_A_PICTURE)  # a busy browser hears of a key too late from out here
    page.click("#go")
    page.locator(".foot").wait_for()
    assert (page.locator("#status").text_content() or "").startswith("Stopped: ")
    kept = page.locator(".picture").count()
    assert 2 <= kept < 21
    page.locator(".part.text .words").first.fill("the red square turns blue.")
    page.click("#settings")
    page.fill("[name=images]", "1")
    page.click("text=Done")
    page.locator(".part.text .more").first.focus()
    page.keyboard.press("Enter")
    page.get_by_role("menuitem", name="Continue from here").click()
    page.locator("#version-words", has_text="Version 2 of 2").wait_for()
    page.locator(".foot").wait_for()
    assert page.locator(".picture").count() == 2
    assert texts(page)[0] == "the red square turns blue."
    page.click("#version-back")
    page.locator("#version-words", has_text="Version 1 of 2").wait_for()
    assert page.locator(".picture").count() == kept


def test_seeds_side_by_side_and_the_same_seed_is_the_same(
    open_page: Opener, real_server: str
) -> None:
    page = open_page(real_server)
    begin(page, "draw", 7, 0)
    page.click("#go")
    page.locator(".foot").wait_for()
    first = pixels(page, 0)
    page.click("#settings")
    page.fill("[name=seed]", "8")
    page.click("text=Done")
    page.click("text=Another seed")
    page.locator(".take .foot").nth(1).wait_for()
    assert page.locator(".take > header h2").all_text_contents() == ["Seed 7", "Seed 8"]
    assert pixels(page, 0) == first != pixels(page, 1)
    page.locator(".take button", has_text="Keep this one").nth(1).click()
    page.click("#settings")
    page.fill("[name=seed]", "7")
    page.click("text=Done")
    page.click("text=Another seed")
    page.locator(".take .foot").nth(1).wait_for()
    assert pixels(page, 1) == first


def test_words_that_the_model_does_not_know(open_page: Opener, real_server: str) -> None:
    page = open_page(real_server)
    page.locator("#draft").fill("a zeppelin")
    page.keyboard.press("Control+Enter")
    page.locator(".error", has_text="does not know 'zeppelin'").wait_for()
