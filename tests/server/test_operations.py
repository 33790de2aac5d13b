"""Health, models, tokens, keys, request ids, logs, TLS: what operators and tools rely on."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import openai
import pytest
from served_model import SMALL, RunningServer, serving

from tokenmill import __version__

COMPLETION = {"prompt": "hello secret", "max_tokens": 2, "temperature": 0}


def test_health_ready_version_load(server: RunningServer) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"status": "ready"}
    assert server.post("/ping").status_code == 200
    assert server.get("/version").json() == {"version": __version__}
    assert server.get("/load").json() == {"server_load": 0}


def test_models_are_listed_and_found(server: RunningServer) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("tiny", "tokenmill")
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_props_and_slots_describe_the_server(server: RunningServer) -> None:
    props = server.get("/props").json()
    assert props["default_generation_settings"]["n_ctx"] == 2048
    assert props["total_slots"] == 8
    assert props["eos_token"] == "<|im_end|>"
    assert "im_start" in props["chat_template"]
    assert server.get("/slots").json() == []


def test_tokens_and_back(server: RunningServer) -> None:
    text = "the ränge ☂ <|im_end|>"
    tokens = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert tokens["max_model_len"] == 2048
    assert server.post("/detokenize", {"tokens": tokens["tokens"]}).json()["prompt"] == text
    pieces = server.post("/tokenize", {"content": "the ☂", "with_pieces": True}).json()["tokens"]
    assert pieces[0]["piece"] == "the"
    assert b"".join(bytes(p["piece"]) if isinstance(p["piece"], list) else p["piece"].encode() for p in pieces) == (
        "the ☂".encode()
    )
    plain = server.post("/tokenize", {"content": "<|im_end|>", "parse_special": False}).json()["tokens"]
    assert len(plain) > 1
    assert server.post("/tokenize", {}).status_code == 400
    assert server.post("/detokenize", {"tokens": [10**6]}).status_code == 400
    info = server.get("/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"], info["vocab_size"]) == ("<|im_end|>", None, 320)


def test_the_prefix_cache_can_be_emptied(server: RunningServer) -> None:
    ids = list(range(150, 250))
    server.complete(ids)
    assert server.complete(ids).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 96
    assert server.post("/reset_prefix_cache").status_code == 200
    assert server.complete(ids).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_request_ids_go_in_and_out(server: RunningServer) -> None:
    answer = server.post("/v1/completions", COMPLETION, headers={"x-request-id": "my-id.7"})
    assert answer.headers["x-request-id"] == "my-id.7"
    assert answer.json()["id"] == "cmpl-my-id.7"
    odd = server.post("/v1/completions", COMPLETION, headers={"x-request-id": "no\tgood id"})
    assert odd.headers["x-request-id"] != "no\tgood id"
    assert server.post("/v1/completions", {**COMPLETION, "request_id": "mine"}).json()["id"] == "cmpl-mine"


def test_the_openapi_description_is_served_and_no_page_of_another_host(server: RunningServer) -> None:
    described = server.get("/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize", "/metrics"} <= set(described["paths"])
    assert server.get("/docs").status_code == 404


def test_keys_guard_every_route_but_health(tiny_model: Path) -> None:
    options = ("--api-key", "alpha", "--api-key", "beta", "--admin-api-key", "root")
    with serving(tiny_model, *SMALL, *options) as server:
        described = server.get("/openapi.json", headers={"authorization": "Bearer alpha"}).json()["paths"]
        for path, methods in described.items():
            for method in methods:
                for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic alpha"}):
                    status = server._client.request(method, server.url + path, headers=header).status_code
                    assert (status == 200) if path in ("/health", "/ready", "/ping") else (status == 401), (
                        method,
                        path,
                    )
        for header in ({"authorization": "Bearer alpha"}, {"authorization": "bearer beta"}, {"x-api-key": "beta"}):
            assert server.post("/v1/completions", COMPLETION, headers=header).status_code == 200
            assert server.post("/reset_prefix_cache", headers=header).status_code == 401
        admin = {"authorization": "Bearer root"}
        assert server.post("/reset_prefix_cache", headers=admin).status_code == 200
        assert server.post("/v1/completions", COMPLETION, headers=admin).status_code == 401
        assert "secret" not in "\n".join(server.log)
        assert "alpha" not in "\n".join(server.log)
        answer = server.get("/v1/models", headers={"origin": "https://evil.example", "authorization": "Bearer alpha"})
        assert "access-control-allow-origin" not in answer.headers


def test_admin_routes_are_closed_when_only_users_have_keys(tiny_model: Path) -> None:
    options = ("--api-key", "alpha", "--log-format", "json", "--log-prompts", "--cors-origin", "https://app.example")
    with serving(tiny_model, *SMALL, *options, "--screened-head", "auto") as server:
        key = {"authorization": "Bearer alpha"}
        assert server.post("/reset_prefix_cache", headers=key).status_code == 403
        answer = server.post("/v1/completions", COMPLETION, headers={**key, "x-request-id": "logged"})
        text = answer.json()["choices"][0]["text"]
        server.until(lambda: any('"logged"' in line for line in server.log), "the request is logged")
        (line,) = [json.loads(line) for line in server.log if '"logged"' in line]
        assert line["event"] == "request"
        assert (line["status"], line["prompt_tokens"], line["output_tokens"]) == (200, 12, 2)
        assert line["prompts"] == ["hello secret"]
        assert line["outputs"] == [text]
        assert 0 < line["first_token_s"] <= line["total_s"]
        allowed = server.get("/v1/models", headers={**key, "origin": "https://app.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command makes the certificate")
def test_tls_and_a_chat_template_of_ones_own(tiny_model: Path, tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ["-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run(
        ["openssl", "req", "-x509", *subject, "-keyout", key, "-out", certificate], check=True, capture_output=True
    )
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}{{ eos_token }}")
    options = ("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), "--chat-template", str(template))
    with serving(tiny_model, *SMALL, *options) as server:
        assert server.url.startswith("https://")
        messages = [{"role": "user", "content": "hi"}]
        rendered = server.post("/apply-template", {"messages": messages}).json()["prompt"]
        assert rendered == "[user:hi]<|im_end|>"
