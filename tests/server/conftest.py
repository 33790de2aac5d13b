"""Servers that tests share. Whoever harms a server starts one of their own with ``serving``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from served_model import SMALL, RunningServer, serving
from tiny_gguf import write_speaking_model

if TYPE_CHECKING:
    from browser import WebPage
    from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speaking_model(tmp_path_factory.mktemp("served") / "tiny.gguf")


@pytest.fixture(scope="session")
def shared_server(tiny_model: Path) -> Iterator[RunningServer]:
    with serving(tiny_model, *SMALL) as running:
        yield running


@pytest.fixture
def server(shared_server: RunningServer) -> Iterator[RunningServer]:
    """The shared server; a test that leaves anything running in it fails."""
    yield shared_server
    shared_server.until_idle()


@pytest.fixture(scope="session")
def real_server(smollm2_path: Path) -> Iterator[RunningServer]:
    """The real default model."""
    with serving(smollm2_path, "--max-model-len", "1024", "--max-num-seqs", "8", name="smollm2-135m") as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium without a window. Not for the whole session: while it runs, no other event loop can."""
    pytest.importorskip("playwright", reason="the browser is driven with playwright: pip install 'tokenmill[test]'")
    from browser import browser_path, browsing

    path = browser_path()
    if path is None:
        pytest.skip("no Chromium or Chrome is installed here; TOKENMILL_TEST_BROWSER=path names another place")
    with browsing(path) as running:
        yield running


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., WebPage]]:
    """Opens the page of a server, as WebPage. A test that leaves complaints of the browser behind fails."""
    from browser import WebPage

    opened: list[WebPage] = []

    def open_page(server: RunningServer, path: str = "/", **profile: Any) -> WebPage:
        opened.append(WebPage(browser, server, path, **profile))
        return opened[-1]

    yield open_page
    for page in opened:
        page.close()
    assert [complaint for page in opened for complaint in page.complaints] == []
