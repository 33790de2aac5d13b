"""`tokenmill chat`: turns, commands, several lines, interruption."""

from __future__ import annotations

import json

import pytest

from tokenmill.cli.conversation import Conversation, ConversationFileError


def test_turns_build_on_each_other(cli, fake_llm):
    fake_llm.answers = [["Hello"], ["Fine"]]
    result = cli("chat", "m", stdin="Hi\nHow are you?\n")
    assert (result.code, result.out) == (0, "Hello\nFine\n")
    assert fake_llm.prompts == ["<user>Hi", "<user>Hi<assistant>Hello<user>How are you?"]


def test_a_trailing_backslash_continues_the_message(cli, fake_llm):
    fake_llm.answers = [["x"]]
    cli("chat", "m", stdin="one\\\ntwo\n")
    assert fake_llm.prompts == ["<user>one\ntwo"]


def test_triple_quotes_hold_several_lines_and_commands(cli, fake_llm):
    fake_llm.answers = [["x"]]
    cli("chat", "m", stdin='"""\nfirst\n/quit\n\nlast\n"""\n')
    assert fake_llm.prompts == ["<user>first\n/quit\n\nlast"]


def test_empty_lines_are_not_messages(cli, fake_llm):
    assert cli("chat", "m", stdin="\n   \n").code == 0
    assert fake_llm.prompts == []


def test_quit_leaves_at_once(cli, fake_llm):
    fake_llm.answers = [["x"]]
    cli("chat", "m", stdin="Hi\n/quit\nmore\n")
    assert len(fake_llm.prompts) == 1
    assert fake_llm.closed


def test_reset_forgets_and_keeps_the_system_message(cli, fake_llm):
    fake_llm.answers = [["x"], ["y"]]
    cli("chat", "m", "--system", "S", stdin="one\n/reset\ntwo\n")
    assert fake_llm.prompts == ["<system>S<user>one", "<system>S<user>two"]


def test_system_can_be_changed(cli, fake_llm):
    fake_llm.answers = [["x"]]
    result = cli("chat", "m", stdin="/system Speak like a pirate\n/system\nHi\n")
    assert fake_llm.prompts == ["<system>Speak like a pirate<user>Hi"]
    assert result.err.count("system message: Speak like a pirate") == 2


def test_regenerate_answers_the_last_message_again(cli, fake_llm):
    fake_llm.answers = [["one"], ["two"], ["three"]]
    cli("chat", "m", stdin="Hi\n/regenerate\nAnd?\n")
    assert fake_llm.prompts == ["<user>Hi", "<user>Hi", "<user>Hi<assistant>two<user>And?"]


def test_regenerate_needs_a_message(cli, fake_llm):
    assert "nothing to answer" in cli("chat", "m", stdin="/regenerate\n").err
    assert fake_llm.prompts == []


def test_stats_count_all_answers(cli, fake_llm):
    fake_llm.answers = [["a", "b"], ["c"]]
    result = cli("chat", "m", stdin="/stats\nHi\nHo\n/stats\n")
    assert "no answers yet" in result.err
    assert "all 2 answers: 3 tokens" in result.err


def test_ctrl_c_stops_the_answer_and_not_the_program(cli, fake_llm):
    fake_llm.answers = [["begin ", KeyboardInterrupt()], ["again"]]
    result = cli("chat", "m", stdin="Hi\nGo on\n")
    assert (result.code, result.out) == (0, "begin \nagain\n")
    assert "[interrupted]" in result.err
    assert fake_llm.cancelled == 1
    assert fake_llm.prompts[1] == "<user>Hi<assistant>begin <user>Go on"


def test_a_failed_request_leaves_the_conversation_usable(cli, fake_llm):
    from tokenmill.errors import UsageError

    fake_llm.answers = [[UsageError("too long")], ["fine"]]
    result = cli("chat", "m", stdin="Hi\nHo\n")
    assert result.code == 0
    assert "error: too long" in result.err
    assert fake_llm.prompts[1] == "<user>Ho"


def test_a_failed_regenerate_keeps_the_message(cli, fake_llm):
    from tokenmill.errors import UsageError

    fake_llm.answers = [["one"], [UsageError("no")], ["two"]]
    cli("chat", "m", stdin="Hi\n/regenerate\n/regenerate\n")
    assert fake_llm.prompts[2] == "<user>Hi"


def test_help_and_unknown_commands(cli, fake_llm):
    result = cli("chat", "m", stdin="/help\n/dance\n")
    assert "/regenerate" in result.err
    assert "unknown command /dance" in result.err
    assert fake_llm.prompts == []


def test_a_model_without_template_is_refused(cli, fake_llm):
    fake_llm.tokenizer.chat_template = None
    result = cli("chat", "m")
    assert result.code == 2
    assert "tokenmill generate m PROMPT" in result.err


def test_save_and_load_go_on_where_they_were(cli, fake_llm, tmp_path):
    file = tmp_path / "talk.json"
    fake_llm.answers = [["Hello"], ["Again"]]
    cli("chat", "m", "--system", "S", stdin=f"Hi\n/save {file}\n")
    assert json.loads(file.read_text())["system"] == "S"
    cli("chat", "m", stdin=f"/load {file}\nYou?\n")
    assert fake_llm.prompts[1] == "<system>S<user>Hi<assistant>Hello<user>You?"


def test_commands_with_files_say_what_is_wrong(cli, fake_llm, tmp_path):
    result = cli(
        "chat", "m", stdin=f"/save\n/load\n/load {tmp_path}/absent\n/save ~nosuchuser99/x\n/save {tmp_path}/no/folder\n"
    )
    assert result.code == 0
    assert "/save needs a file name" in result.err
    assert "/load needs a file name" in result.err
    assert "absent cannot be read" in result.err
    assert "~nosuchuser99/x needs a home folder" in result.err
    assert "cannot be written" in result.err


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "robot", "content": "x"}]}',
        '{"system": 1}',
    ],
)
def test_only_saved_conversations_are_loaded(tmp_path, text):
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(ConversationFileError, match=r"other\.json is not a saved conversation"):
        Conversation.load(file)


def test_saving_leaves_no_partial_file(tmp_path):
    conversation = Conversation("S", [{"role": "user", "content": "ü"}])
    conversation.save(tmp_path / "a.json")
    conversation.save(tmp_path / "a.json")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert Conversation.load(tmp_path / "a.json") == conversation
