"""The live view under load: what it shows is what the engine does."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from served_model import SMALL, RunningServer, serving

if TYPE_CHECKING:
    from browser import WebPage
    from playwright.sync_api import Route

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


def test_it_tells_that_there_is_no_engine(tiny_model: Path, tmp_path: Path, open_page: OpenPage) -> None:
    own_model = tmp_path / "own.gguf"
    own_model.write_bytes(tiny_model.read_bytes())
    with serving(own_model, *SMALL) as server:
        page = open_page(server, "/#/engine")
        page.page.get_by_text("steps,").wait_for()
        own_model.write_bytes(b"")  # no restart comes far with it
        os.kill(server.engine_pid(), signal.SIGKILL)
        page.page.get_by_role("alert").get_by_text("There is no engine now: the engine").wait_for()
        own_model.write_bytes(tiny_model.read_bytes())
        page.page.get_by_text("started again once").wait_for()
        page.page.get_by_text("There is no engine now").wait_for(state="detached")
        # Why it died, not what restarts failed with.
        assert "SIGKILL" in page.page.get_by_text("started again once").inner_text()
        page.close()  # before the server goes: it would look once more, and complain


def test_it_tells_of_a_death_between_two_looks(tiny_model: Path, open_page: OpenPage) -> None:
    with serving(tiny_model, *SMALL) as server:
        page = open_page(server, "/#/engine")
        page.page.get_by_text("steps,").wait_for()
        assert page.page.locator("#engine-restarts").inner_text() == ""
        looks: list[Route] = []

        def hold_up(look: Route) -> None:
            looks.append(look)

        page.page.route("**/statistics?*", hold_up)
        while not looks:
            page.page.wait_for_timeout(20)
        died = time.time()
        os.kill(server.engine_pid(), signal.SIGKILL)
        server.until(lambda: server.metric("tokenmill:engine_deaths_total") == 1, "it died")
        server.until(lambda: server.get("/health").status_code == 200, "it is back")
        death = server.get("/statistics").json()["engine"]["last_death"]
        assert "SIGKILL" in death["reason"]
        assert died - 1 < death["time"] < time.time() + 1
        page.page.unroute("**/statistics?*")
        looks[0].continue_()
        told = page.page.get_by_role("status").get_by_text("started again once")
        told.wait_for()
        assert "SIGKILL" in told.inner_text()
        assert str(datetime.fromtimestamp(death["time"]).year) in told.inner_text()
        assert page.page.locator("#engine-trouble").inner_text() == ""
        page.page.get_by_role("link", name="Chat").click()
        page.set(Longest_answer="3")
        page.say("hello")
        page.page.get_by_text("3 tokens").wait_for()
