"""The page for everyone: keyboard, screen readers, small windows, little motion, contrast."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from deploy.server.page.mock_server import MockServer, Scenario, drawn, png

if TYPE_CHECKING:
    from playwright.sync_api import Page


Opener = Callable[..., "Page"]

SLOW = Scenario(pictures=3, step=0.4, word=0.1)
REFUSED = Scenario(status=429, code="queue_full", retry_after=7)
SIZES = {"narrow": 320, "wide": 1280}


def empty(page: Page, server: MockServer) -> None:
    page.locator("#examples").wait_for()


def writing(page: Page, server: MockServer) -> None:
    picture = {"name": "a.png", "mimeType": "image/png", "buffer": png(drawn(1))}
    page.set_input_files("#picture-files", picture)
    page.locator(".picture").wait_for()
    page.click("#add-draw")
    page.locator("#draft").fill("some words of a story.")


def drawing(page: Page, server: MockServer) -> None:
    server.scenario = SLOW
    writing(page, server)
    page.keyboard.press("Control+Enter")
    page.locator(".draw[data-state=drawing] .frame img:not([hidden])").wait_for()


def error(page: Page, server: MockServer) -> None:
    server.scenario = Scenario(pictures=1)
    writing(page, server)
    page.keyboard.press("Control+Enter")
    page.locator(".foot").wait_for()
    server.scenario = REFUSED
    page.keyboard.press("Control+Enter")
    page.locator(".error").wait_for()


STATES = {"empty": empty, "writing": writing, "drawing": drawing, "error": error}


def violations(page: Page) -> list[str]:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(page).response["violations"]
    return [f"{one['id']}: {node['html'][:150]}" for one in found for node in one["nodes"]]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", STATES)
def test_axe_finds_nothing(
    open_page: Opener, server: MockServer, state: str, scheme: str, size: str
) -> None:
    page = open_page(server.url, SIZES[size], color_scheme=scheme)
    STATES[state](page, server)
    assert violations(page) == []
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= SIZES[size], f"the page is {width} pixels wide"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_in_panels(open_page: Opener, server: MockServer, scheme: str) -> None:
    page = open_page(server.url, color_scheme=scheme)
    error(page, server)
    for button in ("settings", "show-request", "documents", "show-help"):
        page.click(f"#{button}")
        page.locator("dialog[open]").wait_for()
        assert violations(page) == [], button
        page.keyboard.press("Escape")
        page.locator("dialog[open]").wait_for(state="detached")
        assert focused(page) == f"#{button}", "focus goes back"
    page.locator(".enlarge").first.click()
    assert violations(page) == []
    page.keyboard.press("Escape")
    server.scenario = Scenario(pictures=1)
    page.click("text=Another seed")
    page.locator(".take .foot").nth(1).wait_for()
    assert violations(page) == []


def test_nothing_is_wider_than_a_window_of_320_pixels(
    open_page: Opener, server: MockServer
) -> None:
    page = open_page(server.url, 320, 640)
    error(page, server)
    server.scenario = Scenario(pictures=2, sentences=("w" * 200, "https://example.com/" + "a" * 99))
    page.click("text=Another seed")
    page.locator(".take .foot").nth(1).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    for button in ("settings", "show-request", "documents", "show-help"):
        page.click(f"#{button}")
        box = page.locator("dialog[open]").bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= 320, button
        page.keyboard.press("Escape")


def test_targets_are_44_pixels(open_page: Opener, server: MockServer) -> None:
    for width in SIZES.values():
        page = open_page(server.url, width)
        error(page, server)
        small = page.locator("button:visible, input:visible, textarea:visible").evaluate_all(
            """all => all.map(e => [e.id || e.className, e.getBoundingClientRect()])
              .filter(([, box]) => box.height < 43 || box.width < 43).map(([name]) => name)"""
        )
        assert small == []


def focused(page: Page) -> str:
    found: str = page.evaluate(
        """(() => { const e = document.activeElement;
          return e.id ? `#${e.id}` : e.className ? `.${e.className}` : e.tagName; })()"""
    )
    return found


def test_all_of_it_by_keyboard(page: Page, server: MockServer) -> None:
    """From the skip link through a story, a menu, an enlarged picture and the settings."""
    server.scenario = Scenario(pictures=1)
    page.keyboard.press("Tab")
    assert focused(page) == ".skip"
    assert page.locator(".skip").bounding_box()["y"] >= 0  # type: ignore[index]
    page.keyboard.press("Enter")
    page.keyboard.press("Tab") if focused(page) != "#draft" else None
    assert focused(page) == "#draft"
    page.keyboard.type("a story.")
    page.keyboard.press("Control+Enter")
    page.locator(".foot").wait_for()
    assert focused(page) == "#draft"
    order = []
    page.locator("#title").focus()
    for _ in range(12):
        page.keyboard.press("Tab")
        order.append(focused(page))
    assert order[:8] == [
        ".words",
        ".icon more",
        ".words",
        ".icon more",
        ".enlarge",
        f"#{alt(page)}",
        ".icon more",
        "BUTTON",
    ], order
    # A menu: it opens, moves, and gives the focus back.
    page.locator(".more").nth(1).focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.textContent") == "Continue from here"
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.textContent") == "Another seed"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.textContent") == "Remove"
    page.keyboard.press("Escape")
    assert focused(page) == ".icon more"
    page.keyboard.press("Enter")
    page.keyboard.press("End")
    page.keyboard.press("Enter")  # removed: the focus is at the part that follows
    assert page.locator(".part").count() == 2
    assert focused(page) != "BODY"
    page.locator(".enlarge").focus()
    page.keyboard.press("Enter")
    page.locator("#picture-panel[open]").wait_for()
    page.keyboard.press("Escape")
    assert focused(page) == ".enlarge"


def alt(page: Page) -> str:
    return page.locator(".picture textarea").get_attribute("id") or ""


def test_focus_is_visible_everywhere(page: Page, server: MockServer) -> None:
    """Something of an element, its part or its row changes when it has the focus."""
    error(page, server)
    look = """(e) => [e, e.closest(".part, .composer")].filter(Boolean).map((one) => {
      const s = getComputedStyle(one);
      return [s.outlineStyle, s.boxShadow, s.borderBottomColor, s.backgroundColor].join();
    }).join()"""
    elements = page.locator("button:visible, input:visible, textarea:visible")
    for n in range(elements.count()):
        element = elements.nth(n)
        if element.is_disabled():
            continue
        page.evaluate("document.activeElement.blur()")
        before = element.evaluate(look)
        page.keyboard.press("Shift")  # the last input was a key
        element.focus()
        assert element.evaluate(look) != before, element.evaluate("e => e.outerHTML")


def test_new_text_does_not_steal_the_focus(page: Page, server: MockServer) -> None:
    """Neither from a text that is being edited above, nor from the field below."""
    page.locator("#draft").fill("first.")
    server.scenario = Scenario(pictures=1)
    page.keyboard.press("Control+Enter")
    page.locator(".foot").wait_for()
    server.scenario = Scenario(pictures=2, word=0.2, step=0.05)
    page.locator("#go").click()
    page.locator(".part.text .words").first.click()
    page.keyboard.press("End")
    page.locator(".draw[data-state=drawing]").wait_for()
    page.keyboard.type(" more words")
    page.locator(".foot").nth(1).wait_for()
    assert page.input_value(".part.text .words >> nth=0") == "first. more words"
    assert page.locator(".part.text .words").first.evaluate("e => e === document.activeElement")


def test_what_is_written_is_no_live_region_and_progress_is_said(
    page: Page, server: MockServer
) -> None:
    """Text grows busy and silent; a polite status says the few things that matter."""
    page.evaluate(
        """() => { window.said = []; const s = document.querySelector("#status");
          new MutationObserver(() => said.push([performance.now(), s.textContent]))
            .observe(s, { childList: true, characterData: true, subtree: true }); }"""
    )
    server.scenario = Scenario(pictures=2, word=0.1, step=0.35)
    page.locator("#draft").fill("one.")
    page.keyboard.press("Control+Enter")
    page.locator(".part[aria-busy=true]").first.wait_for()
    live = page.locator(".part").evaluate_all(
        "all => all.filter(e => e.closest('[aria-live], [role=status], [role=alert]')).length"
    )
    assert live == 0
    page.locator(".foot").wait_for()
    assert page.locator(".part[aria-busy=true]").count() == 0
    said = page.evaluate("said.filter(([, words]) => words)")
    words = [one for _, one in said]
    assert words[-1] == "Finished: 10 words, 2 pictures; that is as many pictures as it may draw."
    assert "Picture 1 finished." in words and "Picture 2 finished." in words
    drawing_said = [(at, one) for at, one in said if one.startswith("Drawing picture")]
    assert any("half done" in one or "quarter" in one for _, one in drawing_said), words
    gaps = [b - a for (a, _), (b, _) in zip(drawing_said, drawing_said[1:], strict=False)]
    assert all(gap >= 4900 for gap in gaps), gaps


def test_parts_are_articles_with_names(page: Page, server: MockServer) -> None:
    error(page, server)
    names = [
        page.get_by_role("article").nth(n).get_by_role("heading").text_content() for n in range(4)
    ]
    assert names == ["Picture 1, yours", "Picture 2, drawn", "Text 1, yours", "Text 2, by tiny"]
    for name in names:
        assert page.get_by_role("article", name=name, exact=True).count() == 1
        assert page.get_by_role("button", name=f"More for {name}").count() == 1


def test_little_motion_shows_start_middle_and_end(open_page: Opener, server: MockServer) -> None:
    server.scenario = Scenario(pictures=1, step=0.15)
    page = open_page(server.url, reduced_motion="reduce")
    page.locator("#draft").fill("one.")
    page.keyboard.press("Control+Enter")
    canvas = page.locator(".draw canvas")
    canvas.wait_for()
    frames = [
        canvas.evaluate("c => c.toDataURL()") for _ in range(4) if not page.wait_for_timeout(120)
    ]
    assert len(set(frames)) == 1, "the noise stands still"
    page.locator(".picture").wait_for()
    assert server.bodies[0]["tools"][0]["partial_images"] == 1
    moving = page.evaluate(
        "document.getAnimations().filter(a => a.effect.getTiming().duration > 1).length"
    )
    assert moving == 0


def test_the_noise_moves_otherwise(page: Page, server: MockServer) -> None:
    server.scenario = SLOW
    page.locator("#draft").fill("one.")
    page.keyboard.press("Control+Enter")
    canvas = page.locator(".draw canvas")
    canvas.wait_for()
    frames: list[Any] = []
    for _ in range(8):
        frames.append(canvas.evaluate("c => c.toDataURL()"))
        page.wait_for_timeout(120)
    assert len(set(frames)) > 2


def test_text_of_twice_the_size_fits(open_page: Opener, server: MockServer) -> None:
    """A zoom of 200 % of a window of 1280 is a window of 640."""
    page = open_page(server.url, 640, 450, device_scale_factor=2)
    error(page, server)
    assert page.evaluate("document.documentElement.scrollWidth") <= 640
