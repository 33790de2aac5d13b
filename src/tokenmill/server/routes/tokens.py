"""Routes about tokens: text to ids and back, conversations to prompts, what the tokenizer is."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Response
from pydantic import Field

from tokenmill.server.answers import token_text
from tokenmill.server.conversation import encode_rendered, render
from tokenmill.server.errors import ApiError
from tokenmill.server.requests import Name, StrictBody
from tokenmill.server.routes.access import Served, new_router
from tokenmill.server.routes.chat import Messages, Tools
from tokenmill.server.streams import json_response

router = new_router()


class TokenizeBody(StrictBody):
    """vLLM's names (``prompt`` or ``messages``) and llama.cpp's (``content``)."""

    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None
    content: str | None = None
    tools: Tools | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, served: Served) -> Response:
    """Token ids of a text or a conversation."""
    served.check_name(body.model)
    if sum(given is not None for given in (body.prompt, body.messages, body.content)) != 1:
        raise ApiError("give one of prompt, messages and content", param="prompt")
    if body.content is not None:
        ids = await served.encode(body.content, add_special=body.add_special, parse_special=body.parse_special)
        if body.with_pieces:
            return json_response({"tokens": [{"id": i, "piece": _piece(served.tokenizer.token_bytes(i))} for i in ids]})
        return json_response({"tokens": ids})
    if body.messages is not None:
        text = await render(
            served,
            body.messages,
            tools=body.tools,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            template_arguments=body.chat_template_kwargs,
        )
        ids = await encode_rendered(served, text)
    else:
        ids = await served.encode(body.prompt or "", add_special=body.add_special_tokens is not False)
    strings = [token_text(served.tokenizer, i) for i in ids] if body.return_token_strs else None
    return json_response(
        {"count": len(ids), "max_model_len": served.max_model_len, "tokens": ids, "token_strs": strings}
    )


class DetokenizeBody(StrictBody):
    model: Name | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=4_000_000)]


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, served: Served) -> Response:
    """The text of token ids, under vLLM's name and llama.cpp's."""
    served.check_name(body.model)
    most = served.ready.vocab_size - 1
    wrong = next((token for token in body.tokens if token > most), None)
    if wrong is not None:
        raise ApiError(f"tokens holds {wrong}, outside of the vocabulary 0..{most}", param="tokens")
    text = served.tokenizer.decode(body.tokens, skip_special=False)
    return json_response({"prompt": text, "content": text})


class TemplateBody(StrictBody):
    messages: Messages
    model: Name | None = None
    tools: Tools | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


@router.post("/apply-template")
async def apply_template(body: TemplateBody, served: Served) -> Response:
    """The prompt text of a conversation."""
    served.check_name(body.model)
    text = await render(
        served,
        body.messages,
        tools=body.tools,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template_arguments=body.chat_template_kwargs,
    )
    return json_response({"prompt": text})


@router.get("/tokenizer_info")
async def tokenizer_info(served: Served) -> Response:
    """What a client needs to prepare prompts itself, in the names of ``tokenizer_config.json``."""
    tokenizer = served.tokenizer
    special = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
        "pad_token": tokenizer.pad_id,
        "unk_token": tokenizer.unk_id,
    }
    names = {name: None if i is None else token_text(tokenizer, i) for name, i in special.items()}
    return json_response(
        {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": served.max_model_len,
            "chat_template": tokenizer.chat_template,
            **names,
            "eos_token_ids": sorted(tokenizer.eos_ids),
        }
    )


def _piece(data: bytes) -> str | list[int]:
    """llama.cpp's form: text, or bytes where it is none."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)
