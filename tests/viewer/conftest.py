"""Headless Chromium, pages without console output, and predictions of clips with numbered frames."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from numbered_clip import write_clips

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
]
LOCAL = ("file:", "data:", "blob:")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A browser; tests that need it skip without one."""
    api = pytest.importorskip("playwright.sync_api")
    names = [os.environ.get("VAFLOW_TEST_CHROMIUM") or "chromium-headless-shell", "chromium", "google-chrome"]
    program = next(filter(None, map(shutil.which, names)), None)  # the shell takes half of a browser's processor time
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium-headless-shell")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Watched:
    """A page and its unexpected events."""

    page: Any
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


OpenPage = Callable[..., Any]


@pytest.fixture
def open_page(chromium: Any) -> Iterator[OpenPage]:
    """Open a file in a new page. Console messages, errors and network requests fail the test at its end."""
    watched: list[Watched] = []

    def open_(path: Path, fragment: str = "", **options: Any) -> Any:
        page = chromium.new_page(**{"viewport": {"width": 1300, "height": 1000}, **options})
        one = Watched(page)
        watched.append(one)
        page.on("console", lambda message: one.problems.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: one.problems.append(str(error)))
        page.on("dialog", lambda dialog: one.problems.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: one.requests.append(request.url))
        page.goto(path.resolve().as_uri() + fragment)
        return page

    yield open_
    for one in watched:
        one.page.close()
        assert not one.problems
        assert not [url for url in one.requests if not url.startswith(LOCAL)]


@pytest.fixture(scope="session")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR/media and DIR/predictions: `constant` at 25 frames/s, `variable` with intervals of 20 to 120 ms."""
    return write_clips(tmp_path_factory.mktemp("numbered"), 300, 251)
