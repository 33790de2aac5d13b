"""The playground, driven as a person would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from served_model import SMALL, RunningServer, serving

if TYPE_CHECKING:
    from browser import WebPage

    OpenPage = Callable[..., WebPage]

HOSTILE = """# A *heading* & <b>tag</b>

<img src=x onerror="window.hacked = 1"> <script>window.hacked = 2</script> <svg onload="window.hacked = 3">

<iframe src="javascript:window.hacked = 4"></iframe>

[a](javascript:window.hacked=5) [b](JaVaScRiPt:window.hacked=6) [c](data:text/html,<script>window.hacked=7</script>)
[d](vbscript:x) [good](https://example.org/?q="onmouseover="window.hacked=8) ![p](https://example.org/p.png)

- one **strong**
  1. two `<i>`

| a | b |
|---|--:|
| <u>1</u> | 2 |

```html
<script>window.hacked = 9</script> &amp;
```
"""


def test_an_answer_appears_while_it_is_made_and_is_what_the_model_says(
    real_server: RunningServer, open_page: OpenPage
) -> None:
    page = open_page(real_server)
    page.page.get_by_role("heading", name="Talk to smollm2-135m").wait_for()
    page.set(Temperature="0", Longest_answer="48")
    page.extra = {"ignore_eos": True}
    page.page.evaluate(
        """new MutationObserver(() => {
            const text = document.querySelector(".waits .body")?.textContent;
            if (text) window.partial ??= text;
        }).observe(document.getElementById("messages"), { childList: true, subtree: true })"""
    )
    page.say("hello there")
    text = page.until_answered()
    body = {**page.asked[0], "stream": False, "stream_options": None, "ignore_eos": True}
    assert text == real_server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    partial = page.page.evaluate("window.partial")
    assert 0 < len(partial) < len(page.answers.locator(".body").inner_text())
    assert "48 tokens" in page.answers.inner_text()
    assert page.page.get_by_role("status").text_content() == text  # what a screen reader says


def test_stop_keeps_what_has_come_and_takes_the_request_out_of_the_engine(
    real_server: RunningServer, open_page: OpenPage
) -> None:
    page = open_page(real_server)
    page.extra = {"ignore_eos": True, "max_tokens": 900}
    page.say("Count to a thousand.")
    page.page.locator(".waits .body p").first.wait_for()
    page.button("Stop").click()
    text = page.until_answered()
    assert 0 < len(text) < 2000
    assert "stopped" in page.answers.inner_text()
    assert page.message_box.evaluate("box => box === document.activeElement")
    real_server.until_idle()
    page.say("And on.")
    page.page.locator(".waits .body p").first.wait_for()
    page.page.keyboard.press("Escape")
    page.until_answered()
    assert [message["role"] for message in page.asked[1]["messages"]] == ["user", "assistant", "user"]
    assert page.asked[1]["messages"][1]["content"] == text
    real_server.until_idle()


def test_regenerate_and_edit_ask_again(server: RunningServer, open_page: OpenPage) -> None:
    page = open_page(server)
    page.set(Longest_answer="20", Temperature="1")
    for text in ("first", "second"):
        page.say(text)
        page.until_answered()
    page.button("Regenerate").click()
    page.until_answered()
    assert page.asked[2]["messages"] == page.asked[1]["messages"]
    assert page.answers.count() == 2
    page.page.get_by_role("article", name="You").first.hover()
    page.button("Edit").first.click()
    field = page.page.get_by_role("textbox", name="Your message")
    assert field.input_value() == "first"
    field.fill("changed")
    page.page.get_by_role("article", name="You").get_by_role("button", name="Send").click()
    page.until_answered()
    assert page.asked[3]["messages"] == [{"role": "user", "content": "changed"}]
    assert page.answers.count() == 1


def test_conversations_outlive_the_page(server: RunningServer, open_page: OpenPage) -> None:
    page = open_page(server)
    page.set(Longest_answer="10", System_prompt="Be brief.")
    page.say("about cats")
    page.until_answered()
    page.button("New conversation").click()
    assert page.answers.count() == 0
    page.set(System_prompt="Be long.")
    page.say("about dogs")
    page.until_answered()
    page.page.reload()
    assert page.conversations.all_inner_texts() == ["about dogs\n\u00d7", "about cats\n\u00d7"]
    page.button("about cats").click()
    assert page.page.get_by_role("article", name="You").locator(".body").inner_text() == "about cats"
    page.set()
    assert page.page.get_by_label("System prompt").input_value() == "Be brief."
    page.page.once("dialog", lambda dialog: dialog.accept())
    page.button("Delete: about cats").click()
    assert page.conversations.count() == 1
    page.page.reload()
    assert [conversation["messages"][0]["content"] for conversation in page.kept()] == ["about dogs"]


def test_settings_reach_the_request_and_what_is_empty_does_not(server: RunningServer, open_page: OpenPage) -> None:
    page = open_page(server)
    page.set(
        System_prompt="You are a mill.",
        Temperature="0.5",
        Longest_answer="5",
        Top_p="0.9",
        Top_k="40",
        Min_p="0.05",
        Repetition="1.1",
        Frequency="-0.5",
        Presence="0.25",
        Seed="7",
        Stop_at="\u2603\nend",
    )
    page.say("hello")
    page.until_answered()
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    messages = [{"role": "system", "content": "You are a mill."}, {"role": "user", "content": "hello"}]
    assert page.asked[0] == {
        **stream,
        "model": "tiny",
        "messages": messages,
        "temperature": 0.5,
        "max_tokens": 5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "frequency_penalty": -0.5,
        "presence_penalty": 0.25,
        "seed": 7,
        "stop": ["\u2603", "end"],
    }
    page.button("New conversation").click()
    page.button("Reset to defaults").click()
    page.set(Longest_answer="3")
    page.say("hello")
    page.until_answered()
    assert page.asked[1] == {**stream, "model": "tiny", "messages": messages[1:], "max_tokens": 3}


def test_what_a_model_writes_stays_text(server: RunningServer, open_page: OpenPage) -> None:
    page = open_page(server)
    page.reply = HOSTILE
    page.say("attack")
    assert page.until_answered() == HOSTILE
    answer = page.answers.locator(".body")
    tags = answer.evaluate("body => [...new Set([...body.querySelectorAll('*')].map(e => e.localName))].sort()")
    assert " ".join(tags) == (
        "a button code div em figcaption figure h2 li ol p pre span strong table tbody td th thead tr ul"
    )
    attributes = "body => [...body.querySelectorAll('*')].flatMap(e => e.getAttributeNames()).sort()"
    assert not [name for name in answer.evaluate(attributes) if name.startswith("on") or name in ("style", "src")]
    links = answer.get_by_role("link")
    assert {link.get_attribute("href", timeout=1000) for link in links.all()} == {
        'https://example.org/?q="onmouseover="window.hacked=8',
        "https://example.org/p.png",
    }
    assert {link.get_attribute("rel") for link in links.all()} == {"noopener noreferrer"}
    assert answer.locator("pre").inner_text() == "<script>window.hacked = 9</script> &amp;"
    assert answer.locator("h2").inner_text() == "A heading & <b>tag</b>"
    assert '<img src=x onerror="window.hacked = 1">' in answer.inner_text()
    page.open()
    page.button("attack").click()  # from the store too
    answer.locator("pre").wait_for()
    assert page.page.evaluate("window.hacked") is None


def test_reasoning_is_shown_apart_and_not_sent_back(server: RunningServer, open_page: OpenPage) -> None:
    page = open_page(server)
    page.reply, page.reasoning = "It is 4.", "2 + 2 <b>is</b>"
    page.say("2 + 2?")
    assert page.until_answered() == "It is 4."
    assert page.answers.locator(".body").inner_text() == "It is 4."
    page.answers.get_by_text("Reasoning").click()
    page.answers.get_by_text("2 + 2 <b>is</b>").wait_for()
    page.say("Sure?")
    page.until_answered()
    assert page.asked[1]["messages"][1] == {"role": "assistant", "content": "It is 4."}


def test_the_security_policy_holds_even_for_the_page_itself(server: RunningServer, open_page: OpenPage) -> None:
    page = open_page(server)
    refused = page.page.evaluate(
        """async () => {
            await new Promise((resolve) => setTimeout(resolve)); // what the test itself evaluates may do more
            const refused = [];
            for (const act of [
                () => { document.body.innerHTML += "<p>"; },
                () => { new Function("window.hacked = 1")(); },
            ]) {
                try { act(); } catch (error) { refused.push(error.name); }
            }
            const script = document.createElement("script");
            try { script.textContent = "window.hacked = 2"; } catch (error) { refused.push(error.name); }
            document.head.append(script);
            return refused;
        }"""
    )
    assert refused == ["TypeError", "EvalError", "TypeError"]
    assert page.page.evaluate("window.hacked") is None
    assert page.complaints
    page.complaints.clear()


def test_everything_can_be_done_with_the_keyboard(server: RunningServer, open_page: OpenPage) -> None:
    page = open_page(server)
    keyboard = page.page.keyboard
    focused = "document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent.trim()"

    def tab_to(name: str, key: str = "Tab") -> None:
        for _ in range(40):
            keyboard.press(key)
            if page.page.evaluate(focused) == name:
                return
        raise AssertionError(f"Tab does not lead to {name}")

    page.page.get_by_role("heading", name="Talk to tiny").wait_for()
    keyboard.press("Tab")
    assert page.page.evaluate(focused) == "Skip to the message box"
    tab_to("Settings")
    keyboard.press("Enter")
    tab_to("", "Tab")  # the number fields have neither label attribute nor text
    keyboard.type("12")
    keyboard.press("Escape")
    assert page.page.evaluate(focused) == "Settings"
    tab_to("Skip to the message box", "Shift+Tab")
    keyboard.press("Enter")
    keyboard.type("line one")
    keyboard.press("Shift+Enter")
    keyboard.type("line two")
    keyboard.press("Enter")
    page.until_answered()
    assert page.asked[0]["messages"][-1]["content"] == "line one\nline two"
    tab_to("Regenerate", "Shift+Tab")
    keyboard.press("Enter")
    page.until_answered()
    assert page.asked[1]["messages"] == page.asked[0]["messages"]
    tab_to("Engine", "Shift+Tab")
    keyboard.press("Enter")
    page.page.get_by_role("heading", name="KV pages").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_accessibility_rule_is_broken(server: RunningServer, open_page: OpenPage, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is not installed").Axe()
    page = open_page(server, color_scheme=scheme)

    def check(what: str) -> None:
        found = axe.run(page.page).response["violations"]
        assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found] == [], what

    page.page.get_by_role("heading", name="Talk to tiny").wait_for()
    check("an empty conversation")
    page.reply = HOSTILE
    page.say("hello")
    page.until_answered()
    page.set()
    check("a conversation and the settings")
    page.open("/#/engine")
    page.page.get_by_text("steps,").wait_for()
    check("the live view")


def test_dark_and_light_follow_the_system_until_they_are_chosen(server: RunningServer, open_page: OpenPage) -> None:
    page = open_page(server, color_scheme="dark")
    color = "getComputedStyle(document.documentElement).backgroundColor"
    dark = page.page.evaluate(color)
    page.page.emulate_media(color_scheme="light")
    light = page.page.evaluate(color)
    assert sum(map(int, light[4:-1].split(","))) > 600
    assert sum(map(int, dark[4:-1].split(","))) < 150
    page.button("Theme: as the system").click()
    page.button("Theme: light").click()
    assert page.page.evaluate(color) == dark
    page.page.reload()
    assert page.page.evaluate(color) == dark
    page.button("Theme: dark").click()
    assert page.page.evaluate(color) == light


def test_it_fits_a_phone(server: RunningServer, open_page: OpenPage) -> None:
    page = open_page(server, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    page.reply = HOSTILE + "x" * 200
    page.message_box.fill("wide\n" + "y" * 200)
    page.button("Send").tap()
    page.until_answered()
    too_wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.page.evaluate(too_wide) == 0
    panel = page.page.get_by_role("complementary", name="Conversations")
    assert not panel.is_visible()
    page.page.get_by_role("button", name="Conversations").tap()
    page.button("New conversation").tap()
    panel.wait_for(state="hidden")
    assert page.answers.count() == 0
    page.button("Settings").tap()
    assert page.page.get_by_label("Temperature").is_visible()
    page.open("/#/engine")
    page.page.get_by_text("steps,").wait_for()
    assert page.page.evaluate(too_wide) == 0
    assert page.page.locator("#engine").evaluate("view => view.scrollWidth - view.clientWidth") == 0


@pytest.fixture(scope="module")
def locked(tiny_model: Path) -> Iterator[RunningServer]:
    """A server that wants a key."""
    with serving(tiny_model, *SMALL, "--api-key", "alpha") as running:
        yield running


def unauthorized(page: WebPage) -> list[str]:
    """Takes the browser's notes of answers 401, which are due, from its complaints."""
    due = [text for text in page.complaints if "401" in text]
    page.complaints[:] = [text for text in page.complaints if "401" not in text]
    return due


def test_a_key_is_asked_for_and_kept_for_the_tab_only(locked: RunningServer, open_page: OpenPage) -> None:
    page = open_page(locked)
    dialog = page.page.get_by_role("dialog", name="API key")
    dialog.get_by_text("This server wants an API key.").wait_for()
    dialog.get_by_label("Key", exact=True).fill("wrong")
    page.page.keyboard.press("Enter")
    dialog.get_by_text("The server does not take this key.").wait_for()
    dialog.get_by_label("Key", exact=True).fill("alpha")
    page.button("Use this key").click()
    page.page.get_by_role("heading", name="Talk to tiny").wait_for()
    page.set(Longest_answer="5")
    page.say("hello")
    page.until_answered()
    assert "5 tokens" in page.answers.inner_text()
    assert "alpha" not in str(page.page.evaluate("[{...localStorage}, document.cookie]"))
    page.page.reload()  # the tab still has it
    page.page.get_by_role("heading", name="Talk to tiny").wait_for()
    assert len(unauthorized(page)) == 4  # twice two that came together
    page.open("/#/engine")
    page.page.get_by_text("steps,").wait_for()


def test_without_a_key_the_page_says_so_and_asks_again(locked: RunningServer, open_page: OpenPage) -> None:
    page = open_page(locked)
    page.button("Cancel").click()
    page.say("hello")
    page.page.get_by_role("dialog").wait_for()  # opens again once the server has refused
    page.page.keyboard.press("Escape")
    page.page.get_by_role("alert").get_by_text("Without a key").wait_for()
    page.button("Try again").click()
    page.page.get_by_label("Key", exact=True).fill("alpha")
    page.button("Use this key").click()
    page.page.get_by_role("heading", name="Talk to tiny").wait_for(state="detached")
    page.until_answered()
    assert unauthorized(page)


def test_errors_are_told_as_the_server_words_them(server: RunningServer, open_page: OpenPage) -> None:
    page = open_page(server)
    extra: dict[str, Any] = {"logit_bias": {"99999": 1}}
    page.extra = extra
    page.say("hello")
    page.page.get_by_role("alert").get_by_text("99999").wait_for()
    page.complaints[:] = [text for text in page.complaints if "400" not in text]
    page.extra = {"max_tokens": 3}
    page.button("Try again").click()
    page.page.get_by_text("3 tokens").wait_for()
