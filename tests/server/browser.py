"""The web page in a real browser without a window, used as a person would, and watched for whatever it complains of."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, Route, sync_playwright
from served_model import RunningServer

SECONDS = 120
"""A machine may be slow and busy; a page that works needs a fraction of one."""
# No sandbox: containers rarely allow it. The others keep the browser from calling its maker.
_FLAGS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
]


def browser_path() -> str | None:
    """Chromium or Chrome as it is installed here; TOKENMILL_TEST_BROWSER names another one."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("TOKENMILL_TEST_BROWSER") or next(filter(None, map(shutil.which, names)), None)


@contextlib.contextmanager
def browsing(path: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_FLAGS)
        yield browser
        browser.close()


class WebPage:
    """The page in a browser profile of its own."""

    def __init__(self, browser: Browser, server: RunningServer, path: str = "/", **profile: Any) -> None:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **profile})
        context.set_default_timeout(SECONDS * 1000)
        self.page: Page = context.new_page()
        self.server = server
        self.complaints: list[str] = []
        """Errors on the console (violations of the security policy are among them), and requests to other hosts."""
        self.asked: list[dict[str, Any]] = []
        """Bodies of the requests for answers."""
        self.extra: dict[str, Any] = {}
        """Added to those requests on their way; unless there is a limit, answers end after a few tokens."""
        self.reply: str | None = None
        """Given in place of the model's answer, a few characters an event, after ``reasoning``."""
        self.reasoning = ""
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._check_host)
        self.page.route("**/v1/chat/completions", self._pass_on)
        self.open(path)

    def open(self, path: str = "/") -> None:
        self.page.goto(self.server.url + path)

    def close(self) -> None:
        self.page.context.close()

    # ---- what a person sees ----------------------------------------------------------------------------------------

    @property
    def message_box(self) -> Locator:
        return self.page.get_by_role("textbox", name="Message", exact=True)

    @property
    def answers(self) -> Locator:
        return self.page.get_by_role("article", name="Answer")

    @property
    def conversations(self) -> Locator:
        return self.page.get_by_role("complementary", name="Conversations").get_by_role("listitem")

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    # ---- what a person does ----------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        self.message_box.fill(text)
        self.message_box.press("Enter")

    def until_answered(self) -> str:
        """Waits for the end of the last answer and gives its text as it was kept."""
        self.answers.last.wait_for()
        self.page.locator(".waits").wait_for(state="detached")
        return str(self.kept()[0]["messages"][-1]["content"])

    def set(self, **settings: str) -> None:
        """Fills fields of the settings by their label."""
        if not self.page.get_by_role("complementary", name="Settings").is_visible():
            self.button("Settings").click()
        for label, value in settings.items():
            self.page.get_by_label(label.replace("_", " "), exact=True).fill(value)

    # ---- what the browser knows ------------------------------------------------------------------------------------

    def kept(self) -> list[dict[str, Any]]:
        """The conversations in the browser's store, the last used first."""
        store: dict[str, str] = self.page.evaluate("({...localStorage})")
        found = [json.loads(value) for key, value in store.items() if key.startswith("tokenmill.conversation.")]
        return sorted(found, key=lambda conversation: -conversation["updated"])

    def until(self, expression: str) -> None:
        """Waits until ``expression`` is true in the page. (Playwright's own waiting would evaluate strings in it.)"""
        deadline = time.monotonic() + SECONDS
        while not self.page.evaluate(expression):
            assert time.monotonic() < deadline, f"not within {SECONDS} s: {expression}"
            self.page.wait_for_timeout(20)

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _check_host(self, request: Request) -> None:
        if urlsplit(request.url).netloc != urlsplit(self.server.url).netloc:
            self.complaints.append(f"a request to {request.url}")

    def _pass_on(self, route: Route) -> None:
        body = json.loads(route.request.post_data or "")
        self.asked.append(body)
        if self.reply is None:
            route.continue_(post_data=json.dumps({"max_tokens": 12, **body, **self.extra}))
            return
        pieces = [self.reply[at : at + 7] for at in range(0, len(self.reply), 7)]
        deltas = [{"reasoning": self.reasoning}, *({"content": piece} for piece in pieces)]
        choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
        events = [json.dumps({"choices": [choice]}) for choice in choices] + ["[DONE]"]
        route.fulfill(content_type="text/event-stream", body="".join(f"data: {event}\n\n" for event in events))
