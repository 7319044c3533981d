"""Chromium, and pages that are watched: every test of a page ends with their log looked at."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from deploy.server.page.mock_server import MockServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()

# Chromium says this of every answer that is not 200, and of none: files of the page are looked at
# apart.
REFUSED = "Failed to load resource: "

WATCH = """
window.violations = [];
addEventListener("securitypolicyviolation", (e) => violations.push(e.violatedDirective));
"""


@dataclass
class Watched:
    """A page and what the browser said of it. requests: URLs that left the page."""

    page: Page
    url: str
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def look_at(self, url: str, status: int) -> None:
        """Files of the page are always there."""
        if url.startswith(f"{self.url}/page/") and status not in (200, 304):
            self.problems.append(f"{url}: {status}")

    def check(self) -> None:
        """No error in the console, no violation of the policy, no request to anywhere else."""
        problems = [one for one in self.problems if REFUSED not in one]
        assert problems == []
        assert self.page.evaluate("violations") == []
        schemes = (f"{self.url}/", "blob:", "data:")
        assert [one for one in self.requests if not one.startswith(schemes)] == []


@pytest.fixture(scope="module")  # its event loop must not outlive the tests that need it
def browser() -> Iterator[Browser]:
    """Chromium of this machine."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
    if path is None:
        pytest.skip("there is no chromium on this machine")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[MockServer]:
    """A mock server."""
    with MockServer() as server:
        yield server


Opener = Callable[..., "Page"]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Opener]:
    """`open_page(url, width=1280, ...)`: a page in a context of its own, ready to write."""
    watched: list[Watched] = []

    def open_page(
        url: str, width: int = 1280, height: int = 900, ready: bool = True, **options: Any
    ) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.add_init_script(WATCH)
        page = context.new_page()
        page.set_default_timeout(60_000)  # the machine may be busy
        one = Watched(page, url)
        watched.append(one)
        page.on("pageerror", lambda error: one.problems.append(f"{error}"))
        page.on("console", lambda m: one.problems.append(m.text) if m.type == "error" else None)
        page.on("response", lambda response: one.look_at(response.url, response.status))
        page.on("request", lambda request: one.requests.append(request.url))
        page.goto(url)
        if ready:
            page.locator("#state[data-state=ready]").wait_for()
        return page

    yield open_page
    for one in watched:
        one.check()
        one.page.context.close()


@pytest.fixture
def page(open_page: Opener, server: MockServer) -> Page:
    """An empty document, with the mock server behind it."""
    return open_page(server.url)
