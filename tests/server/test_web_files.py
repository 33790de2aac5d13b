"""The page's files and the numbers behind the live view, over plain HTTP."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files

import pytest
from served_model import SMALL, RunningServer, serving

KEY = {"authorization": "Bearer alpha"}


@pytest.fixture(scope="module")
def locked(tiny_model) -> Iterator[RunningServer]:
    """A server that wants a key."""
    with serving(tiny_model, *SMALL, "--api-key", "alpha") as running:
        yield running


def names_in(text: str) -> set[str]:
    """Files that a page or a module of it loads."""
    return set(re.findall(r'(?:src|href)="(web/[^"#]+)"', text)) | {
        f"web/{name}" for name in re.findall(r'from "\./([^"]+)"', text)
    }


def test_the_page_and_every_file_that_it_loads_need_no_key(locked: RunningServer) -> None:
    page = locked.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    todo, seen = names_in(page.text), set()
    while todo:
        name = todo.pop()
        seen.add(name)
        answer = locked.get("/" + name)
        assert answer.status_code == 200, name
        kind = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "svg": "image/svg+xml"}
        assert answer.headers["content-type"] == kind[name.rpartition(".")[2]]
        todo |= names_in(answer.text) - seen
    shipped = {f"web/{path.name}" for path in (files("tokenmill.server") / "web").iterdir() if path.is_file()}
    assert seen >= shipped - {"web/index.html"}, "a file is shipped that nothing loads"
    assert "web/vendor/marked.js" in seen
    assert "MIT" in locked.get("/web/vendor/marked.LICENSE").text


def test_head_and_get_of_the_page_are_open_and_everything_that_knows_something_is_not(locked: RunningServer) -> None:
    head = locked._client.head(locked.url + "/")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(locked.get("/").content))
    for path in ("/statistics", "/slots", "/props", "/v1/models", "/metrics", "/openapi.json"):
        assert locked.get(path).status_code == 401, path
        assert locked.get(path, headers=KEY).status_code == 200, path
    assert locked.post("/", headers=KEY).status_code == 405
    assert not {path for path in locked.get("/openapi.json", headers=KEY).json()["paths"] if path.startswith("/web")}
    assert "/" not in locked.get("/openapi.json", headers=KEY).json()["paths"]


@pytest.mark.parametrize(
    "path", ["/web/", "/web/none.js", "/web/../app.py", "/web/%2e%2e/app.py", "/web/vendor", "/web//"]
)
def test_other_paths_give_no_file(locked: RunningServer, path: str) -> None:
    assert locked.get(path).status_code == 401
    assert locked.get(path, headers=KEY).status_code == 404


def test_a_browser_may_run_nothing_but_the_servers_own_files(locked: RunningServer) -> None:
    page = locked.get("/")
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in page.headers["content-security-policy"]
    assert (page.headers["x-content-type-options"], page.headers["referrer-policy"]) == ("nosniff", "no-referrer")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|//(?!www\.w3\.org)", page.text)


def test_a_browser_asks_whether_its_copy_is_good(locked: RunningServer) -> None:
    first = locked.get("/web/app.js")
    assert first.headers["cache-control"] == "no-cache"
    again = locked.get("/web/app.js", headers={"if-none-match": f'W/"other", {first.headers["etag"]}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert locked.get("/web/app.js", headers={"if-none-match": '"other"'}).status_code == 200


def test_statistics_tell_each_step_once(server: RunningServer) -> None:
    before = server.get("/statistics").json()
    server.complete("hello", max_tokens=9)
    server.until(lambda: server.get("/statistics").json()["running"] == 0, "the last report has come")
    known = before["steps"]["count"]
    after = server.get("/statistics", params={"after": known}).json()
    steps = after["steps"]["latest"]
    assert len(steps) == after["steps"]["count"] - known == 9
    assert [(step["prompt_tokens"], step["decoded"], step["sampled"]) for step in steps] == [(5, 0, 1)] + [
        (0, 1, 1)
    ] * 8
    assert all(before["time"] < step["begin"] < after["time"] for step in steps)
    assert all(0 < step["forward"] < after["time"] - before["time"] for step in steps)
    assert server.get("/statistics", params={"after": after["steps"]["count"]}).json()["steps"]["latest"] == []
    assert server.get("/statistics", params={"after": 10**9}).json()["steps"]["latest"] != []  # another server's count
    assert server.get("/statistics", params={"after": -1}).status_code == 400


def test_statistics_add_up(server: RunningServer) -> None:
    before = server.get("/statistics").json()
    server.complete("hello", max_tokens=7, n=2, temperature=1)
    server.until(lambda: server.get("/statistics").json()["running"] == 0, "the last report has come")
    after = server.get("/statistics").json()

    def gained(*path: str) -> int:
        one, other = before, after
        for name in path:
            one, other = one[name], other[name]
        return (sum(other) - sum(one)) if isinstance(one, list) else other - one

    assert (gained("tokens", "prompt"), gained("tokens", "generated")) == (5, 14)
    assert gained("latency", "first_token", "counts") == 2
    assert gained("latency", "between_tokens", "counts") == 12
    assert gained("prefix_cache", "queries") == 5
    (group,) = after["kv"]["groups"]
    assert group["free"] + group["used"] + group["cached"] == group["total"]
    assert (after["engine"]["state"], after["waiting"], after["requests"]) == ("running", 0, [])
    assert after["memory"]["weights"] + after["memory"]["kv"] < after["memory"]["budget"] == 600_000_000
