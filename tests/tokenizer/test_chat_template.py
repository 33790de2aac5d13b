from __future__ import annotations

import multiprocessing
import resource
import threading
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from tokenmill.tokenizer import ChatTemplateError, ChatTemplates, Tokenizer, chat_rendering

USER = [{"role": "user", "content": "hi"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in <a city> — today & tomorrow",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
DOCUMENTS = [{"title": "Über uns", "text": "Wir mahlen <Korn>."}]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    USER,
    [{"role": "system", "content": "Be brief."}, *USER],
    [*USER, {"role": "assistant", "content": "Hello! 🙂"}, {"role": "user", "content": "<|im_end|> {{ 7 * 7 }}"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Köln?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}}],
        },
        {"role": "tool", "name": "get_weather", "content": '{"celsius": 21}'},
        {"role": "tool", "name": "get_weather", "content": "dry"},
    ],
]

# Everything that the templates of current models use.
RICH = """
{%- set ns = namespace(turn=0, system='') %}
{%- if messages[0].role == 'system' %}{% set ns.system = messages[0].content | trim %}{% endif %}
{{- bos_token }}
{%- macro header(role) -%}
<|{{ role }}|>
{%- endmacro %}
{% for tool in tools or [] %}
    {{ tool | tojson }}
    {{- tool.function | tojson(indent=2) }}
{% endfor %}
{%- for document in documents or [] -%}
[{{ loop.index }}/{{ loop.length }}] {{ document.title }}: {{ document['text'] }}
{% endfor -%}
{% for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.turn = ns.turn + 1 %}
{{ header(message.role) }} {{ ns.turn }}
{% generation %}{{ message.content if message.content is defined else 'nothing' }}{% endgeneration %}
{% for call in message.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}
    {%- if ns.turn >= 20 %}{% break %}{% endif %}
{% endfor %}
{{- ns.system.split(' ')[-1] ~ ('%s!' | format(mood | default('calm'))) }}{{ 2 ** 10 + 3 * 'ab' | length }}
{%- if add_generation_prompt %}{{ header('assistant') }}{% endif %}
"""


def reference(template: str, messages: list[dict[str, Any]], special: dict[str, str], **kwargs: Any) -> str:
    """What `transformers` renders: ``apply_chat_template`` after it has looked up the template."""
    from transformers.utils.chat_template_utils import render_jinja_template

    cleaned = [{key: value for key, value in message.items() if value is not None} for message in messages]
    rendered, _ = render_jinja_template(conversations=[cleaned], chat_template=template, **special, **kwargs)
    return rendered[0]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"add_generation_prompt": True},
        {"add_generation_prompt": False, "tools": TOOLS},
        {"add_generation_prompt": True, "tools": TOOLS, "documents": DOCUMENTS, "mood": "glad"},
    ],
)
def test_prompts_equal_transformers(messages: list[dict[str, Any]], options: dict[str, Any]) -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    rendered = ChatTemplates({"default": RICH}, special).render(messages, **options)
    assert rendered == reference(RICH, messages, special, **options)


@pytest.mark.parametrize("messages", CONVERSATIONS[:3])
def test_smollm2_prompts_equal_transformers(smollm2: Tokenizer, messages: list[dict[str, Any]]) -> None:
    template = smollm2.chat_template
    assert template is not None
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    for options in ({"add_generation_prompt": True}, {"add_generation_prompt": False, "tools": TOOLS}):
        assert smollm2.apply_chat_template(messages, **options) == reference(template, messages, special, **options)


def test_chat_ids_are_those_of_the_prompt(smollm2: Tokenizer) -> None:
    prompt = smollm2.apply_chat_template(USER)
    assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert smollm2.encode_chat(USER) == smollm2.encode(prompt)


def test_bos_comes_once_whether_or_not_the_template_writes_it(llama: Tokenizer) -> None:
    assert llama.apply_chat_template(USER).startswith("<s>")
    written = llama.encode_chat(USER)
    assert written[0] == 1
    assert written.count(1) == 1
    bare = ChatTemplates({"default": "{{ messages[0].content }}"}, {})
    llama._parts = type(llama._parts)(**{**_fields(llama), "chat_templates": bare})
    assert llama.encode_chat([{"role": "user", "content": "the"}]) == llama.encode("the")


def _fields(tokenizer: Tokenizer) -> dict[str, Any]:
    return {name: getattr(tokenizer._parts, name) for name in type(tokenizer._parts).__slots__}


def test_text_parts_are_joined_for_templates_that_read_strings(smollm2: Tokenizer) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert smollm2.apply_chat_template(parts) == smollm2.apply_chat_template([{"role": "user", "content": "a\nb"}])
    lines = ChatTemplates({"default": "{% for line in messages[0].content.split('\\n') %}<{{ line }}>{% endfor %}"}, {})
    assert lines.render(parts) == "<a><b>"
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(ChatTemplateError, match="message 0 has a content part of type 'image_url'"):
        smollm2.apply_chat_template(image)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% for part in m['content'] %}({{ part.type }} {{ part.text }}){% endfor %}"
        "{% endfor %}",
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"
        "{% endfor %}",
        "{% for m in messages %}{% set content = m.content %}{% if content is not string %}{{ content[0].text }}"
        "{% endif %}{% endfor %}",
    ],
)
def test_text_parts_reach_templates_that_read_them(template: str) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    rendered = ChatTemplates({"default": template}, {}).render(messages)
    assert rendered == reference(template, messages, {}, add_generation_prompt=True)


def test_named_templates() -> None:
    templates = ChatTemplates({"default": "D", "tool_use": "T", "rag": "R"}, {})
    assert templates.render(USER) == "D"
    assert templates.render(USER, tools=TOOLS) == "T"
    assert templates.render(USER, chat_template="rag") == "R"
    with pytest.raises(ChatTemplateError, match=r"'other'; this model has: default, rag, tool_use"):
        templates.render(USER, chat_template="other")


def test_a_model_without_template_says_so(llama: Tokenizer) -> None:
    llama._parts = type(llama._parts)(**{**_fields(llama), "chat_templates": None})
    assert llama.chat_template is None
    with pytest.raises(ChatTemplateError, match="no chat template"):
        llama.apply_chat_template(USER)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "does not parse: line 1"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the conversation: roles must alternate"),
        ("{{ messages[5].content.x }}", "refuses the conversation"),
        ("{{ 1 / 0 }}", "fails on the conversation: ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "fails on the conversation: TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails on the conversation: RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "refuses the conversation"),
        ("{{ messages.append(1) }}", "refuses the conversation"),
        ("{{ messages[0].update({'role': 'x'}) }}", "refuses the conversation"),
        ("{% include 'x' %}", "fails on the conversation"),
    ],
)
def test_template_errors_give_the_reason(template: str, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplates({"default": template}, {}).render(USER)


HOSTILE = [
    "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "{% for a in range(10 ** 9) %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ 'a' * 10 ** 12 }}",
    "{{ [0] * 10 ** 12 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ 'a'.ljust(10 ** 12) }}",
    "{{ 'a' | center(10 ** 12) }}",
    "{{ '%1000000000000d' % 7 }}",
    "{{ '%1000000000000d' | format(7) }}",
    "{{ '{:1000000000000}'.format(7) }}",
    "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s.replace('a', 'aa') %}{% endfor %}",
    "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s | replace('a', 'aa') %}{% endfor %}",
    "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
    "{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}",
]


def _render_hostile(templates: list[str]) -> list[str]:
    """The errors that ``templates`` end with, in a process of at most 2 GiB and, to be quick, a tenth of the steps."""
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    chat_rendering.MAX_STEPS //= 10
    errors = []
    for template in templates:
        try:
            ChatTemplates({"default": template}, {}).render(USER)
        except ChatTemplateError as error:
            errors.append(str(error))
        else:
            errors.append("rendered")
    return errors


def test_hostile_templates_end_before_they_take_the_machine() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        errors = pool.submit(_render_hostile, HOSTILE).result(timeout=120)
    assert len(errors) == len(HOSTILE)
    assert [error for error in errors if "rendered" in error or "MemoryError" in error] == []


def test_objects_do_not_reach_the_template() -> None:
    class Opener:
        def read(self) -> str:
            return "secret"

    with pytest.raises(ChatTemplateError, match="a Opener cannot be given to a chat template"):
        ChatTemplates({"default": "{{ opener.read() }}"}, {}).render(USER, opener=Opener())


@pytest.mark.parametrize(
    ("messages", "message"),
    [([], "conversation is empty"), ([{"content": "hi"}], "message 0"), (["hi"], "message 0")],
)
def test_broken_conversations_are_named(smollm2: Tokenizer, messages: Any, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message):
        smollm2.apply_chat_template(messages)


def test_content_too_deep_to_convert_is_an_error() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ChatTemplateError, match="RecursionError"):
        ChatTemplates({"default": "x"}, {}).render([{"role": "user", "content": deep}])


def test_rendering_leaves_the_conversation_alone_and_threads_apart(smollm2: Tokenizer) -> None:
    conversation = [{"role": "user", "content": None, "name": None}, *CONVERSATIONS[2]]
    copies = [dict(message) for message in conversation]
    templates = ChatTemplates({"default": RICH}, {})
    results: list[str] = []
    threads = [
        threading.Thread(target=lambda: results.extend(templates.render(conversation) for _ in range(20)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert len(set(results)) == 1
    assert conversation == copies
