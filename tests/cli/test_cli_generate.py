"""`tokenmill generate`: the text alone on standard output."""

from __future__ import annotations


def test_the_text_alone_is_on_standard_output(cli, fake_llm):
    fake_llm.answers = [["Par", "is", "."]]
    result = cli("generate", "m", "Capital?")
    assert (result.code, result.out) == (0, "Paris.\n")
    assert "3 tokens" in result.err
    assert fake_llm.closed


def test_quiet_says_nothing_else(cli, fake_llm):
    fake_llm.answers = [["Paris"]]
    assert cli("generate", "m", "Capital?", "--quiet") == (0, "Paris\n", "")


def test_a_chat_model_gets_its_template(cli, fake_llm):
    fake_llm.answers = [["x"]]
    cli("generate", "m", "Hi", "--system", "Be brief")
    assert fake_llm.prompts == ["<system>Be brief<user>Hi"]


def test_raw_continues_the_prompt_as_it_is(cli, fake_llm):
    fake_llm.answers = [["x"]]
    cli("generate", "m", "Hi", "--raw")
    assert fake_llm.prompts == ["Hi"]


def test_a_model_without_template_continues_the_prompt(cli, fake_llm):
    fake_llm.tokenizer.chat_template = None
    fake_llm.answers = [["x"]]
    cli("generate", "m", "Hi")
    assert fake_llm.prompts == ["Hi"]


def test_chat_and_system_need_a_template(cli, fake_llm):
    fake_llm.tokenizer.chat_template = None
    assert cli("generate", "m", "Hi", "--chat").code == 2
    assert cli("generate", "m", "Hi", "--system", "s").code == 2
    assert fake_llm.prompts == []


def test_a_dash_reads_the_prompt_from_standard_input(cli, fake_llm):
    fake_llm.answers = [["x"]]
    assert cli("generate", "m", "-", "--raw", stdin="zwei\nZeilen ü\n").code == 0
    assert fake_llm.prompts == ["zwei\nZeilen ü\n"]


def test_standard_input_must_be_text(cli, fake_llm):
    result = cli("generate", "m", "-", stdin=b"\xff\xfe")
    assert result.code == 2
    assert "UTF-8" in result.err


def test_options_reach_the_sampling_parameters(cli, fake_llm):
    fake_llm.answers = [["x"]]
    options = ["--max-tokens", "5", "--temperature", "0.5", "--top-p", "0.9", "--top-k", "40", "--seed", "7"]
    assert cli("generate", "m", "Hi", *options, "--stop", "END", "--stop", "\n\n").code == 0
    params = fake_llm.params[0]
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.seed) == (5, 0.5, 0.9, 40, 7)
    assert params.stop_strings == ("END", "\n\n")


def test_the_models_defaults_hold_unless_overridden(cli, fake_llm):
    fake_llm.generation_defaults = {"temperature": 0.2, "top_k": 10}
    fake_llm.answers = [["x"]]
    cli("generate", "m", "Hi", "--top-k", "3")
    assert (fake_llm.params[0].temperature, fake_llm.params[0].top_k) == (0.2, 3)


def test_an_invalid_parameter_is_usage(cli, fake_llm):
    result = cli("generate", "m", "Hi", "--top-p", "7")
    assert result.code == 2
    assert "top_p" in result.err


def test_ctrl_c_cancels_and_is_exit_code_130(cli, fake_llm):
    fake_llm.answers = [["one ", "two ", KeyboardInterrupt()]]
    result = cli("generate", "m", "Hi")
    assert (result.code, result.out) == (130, "one two \n")
    assert fake_llm.cancelled == 1
    assert fake_llm.closed
    assert "Traceback" not in result.err
