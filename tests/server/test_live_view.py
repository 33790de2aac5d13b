"""The live view under load: what it shows is what the engine does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from served_model import SMALL, RunningServer, serving

if TYPE_CHECKING:
    from browser import WebPage

    OpenPage = Callable[..., WebPage]

OUTLINES = "[...document.querySelectorAll('#charts svg')].map(svg => svg.innerHTML).join()"


def value(page: WebPage, label: str) -> str:
    return page.page.locator(".tile", has_text=label).locator(".value").inner_text()


def picture(page: WebPage, card: str) -> str:
    """What a screen reader says of a card's picture."""
    return page.page.get_by_role("region", name=card, exact=True).get_by_role("img").get_attribute("aria-label") or ""


def test_it_moves_under_load_and_rests_after_it(server: RunningServer, open_page: OpenPage) -> None:
    page = open_page(server, "/#/engine")
    page.page.get_by_text("Nothing runs and nothing waits.").wait_for()
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            server.complete([200] * 300, max_tokens=200, n=6, temperature=1, cache_salt=os.urandom(4).hex())

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        rows = page.page.get_by_role("region", name="Requests", exact=True).get_by_role("row")
        rows.nth(2).wait_for()  # the heads and both requests
        page.until(
            "[...document.querySelectorAll('.tile .value')].slice(0, 5).every(e => parseFloat(e.textContent) > 0)"
        )
        page.page.evaluate(f"window.before = {OUTLINES}")
        page.until(f"{OUTLINES} !== window.before")
        steps = page.page.get_by_role("region", name="Steps", exact=True)
        for layer in ("prefill", "decode"):
            assert (steps.locator(f"path.{layer}").get_attribute("d") or "").count("M") > 3
        assert " decode and " in picture(page, "Steps")
        assert "generated" in picture(page, "Tokens per second")
        assert not picture(page, "KV pages").startswith("0 used")
        for name in ("Time to first token", "Time between tokens"):
            page.page.get_by_role("region", name=name, exact=True).get_by_text("last minute").wait_for()
    finally:
        done.set()
        for worker in workers:
            worker.join()
    page.page.get_by_text("Nothing runs and nothing waits.").wait_for()
    page.until("document.querySelectorAll('.tile .value')[2].textContent === '0'")
    assert (value(page, "Running"), value(page, "Waiting")) == ("0", "0")
    assert picture(page, "KV pages").startswith("0 used")


def test_nothing_is_asked_while_nobody_looks(server: RunningServer, open_page: OpenPage) -> None:
    page = open_page(server, "/#/engine")
    page.page.get_by_text("steps,").wait_for()
    page.page.get_by_role("link", name="Chat").click()
    page.page.wait_for_timeout(100)
    looks = server.metric("http_requests_total", handler="/statistics")
    page.page.wait_for_timeout(1500)
    assert server.metric("http_requests_total", handler="/statistics") == looks


def test_it_tells_that_the_engine_died_and_came_back(tiny_model: Path, open_page: OpenPage) -> None:
    with serving(tiny_model, *SMALL) as server:
        page = open_page(server, "/#/engine")
        page.page.get_by_text("steps,").wait_for()
        page.page.evaluate(
            """() => {
                const place = document.getElementById("engine-trouble");
                window.told = "";
                new MutationObserver(() => { window.told += place.textContent; }).observe(place, { childList: true });
            }"""
        )
        os.kill(server.engine_pid(), signal.SIGKILL)
        page.page.get_by_text("started again once").wait_for()
        page.page.get_by_text("There is no engine now").wait_for(state="detached")
        assert "SIGKILL" in page.page.evaluate("window.told")
        page.page.get_by_role("link", name="Chat").click()
        page.set(Longest_answer="3")
        page.say("hello")
        page.page.get_by_text("3 tokens").wait_for()
