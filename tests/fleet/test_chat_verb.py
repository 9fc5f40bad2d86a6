"""The chat verb from a shell: stdin and prompt, conversations that go on, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import CommandLine
from tests.tui.pty_terminal import Terminal
from tests.tui.talker import talker
from vllm_sleep_tui.cli.demo import write_demo

COMMAND = [sys.executable, "-m", "vllm_sleep_tui"]
PRESETS = """
presets:
  short: {max_tokens: 2}
  tools:
    tools:
      - type: function
        function:
          name: get_weather
          parameters: {type: object, properties: {city: {type: string}, days: {type: integer}}}
"""


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """The demo with one model awake."""
    folder = tmp_path_factory.mktemp("chat")
    config = write_demo(folder, 1000)
    config.write_text(config.read_text() + PRESETS)
    made = CommandLine(config, folder / "state")
    made("start", "qwen")
    yield made
    made.close()


def shell(line: CommandLine, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "--config", str(line.config), *arguments],
        env=line.environment | {"XDG_STATE_HOME": str(line.state_home)},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_what_stands_on_stdin_follows_the_prompt(line: CommandLine) -> None:
    done = shell(line, "chat", "qwen", "Summarise:", stdin="the <b>file</b>\n")
    assert done.returncode == 0, done.stderr
    assert "You asked: “Summarise: the <b>file</b>”" in done.stdout


def test_a_model_that_is_not_awake_is_left_so_if_told(line: CommandLine) -> None:
    done = shell(line, "chat", "phi", "hi", "--no-switch")
    assert done.returncode == 1
    assert done.stderr.startswith("phi is stopped, and --no-switch leaves it so.\n")
    assert line.status()["phi"]["state"] == "stopped"


def test_a_conversation_goes_on_and_is_listed_shown_exported_and_deleted(
    line: CommandLine, tmp_path: Path
) -> None:
    alone = shell(line, "chat", "qwen", "not kept")
    assert alone.returncode == 0
    assert line("conversations", "list") == ""
    shell(line, "chat", "qwen", "-c", "first question")
    second = json.loads(shell(line, "chat", "qwen", "-c", "second question", "--json").stdout)
    first = json.loads(shell(line, "chat", "qwen", "second question", "--json").stdout)
    assert second["prompt_tokens"] > first["prompt_tokens"]  # the model was told of the first one
    found = json.loads(line("conversations", "list", "--json"))["conversations"]
    assert [(kept["title"], kept["turns"]) for kept in found] == [("first question", 2)]
    number = str(found[0]["id"])
    assert "## You\n\nsecond question" in line("conversations", "show", number)
    file = tmp_path / "one.json"
    file.write_text(line("conversations", "show", number, "--json"))
    assert line("conversations", "import", str(file)).endswith(": first question\n")
    line("conversations", "rename", number, "Another")
    assert line("conversations", "list", "another").count("\n") == 1
    line("conversations", "delete", number)
    assert line.run("conversations", "show", number).stderr.startswith(
        f"There is no conversation {number}.\n"
    )


def test_parameters_reach_the_server(line: CommandLine) -> None:
    answer = json.loads(shell(line, "chat", "qwen", "hi", "--max-tokens", "3", "--json").stdout)
    assert (answer["finish_reason"], answer["completion_tokens"]) == ("length", 3)
    done = shell(line, "chat", "qwen", "hi", "--max-tokens", "3")
    assert done.returncode == 0
    assert "cut off: the token limit was reached" in done.stderr


def test_how_a_model_is_asked_comes_from_options_and_presets_and_stays_with_the_conversation(
    line: CommandLine, tmp_path: Path
) -> None:
    done = shell(
        line, "chat", "qwen", "-c", "hi", "--preset", "short", "--seed", "1", "--logprobs", "2", "--json"
    )
    answer = json.loads(done.stdout)
    assert answer["completion_tokens"] == 2
    assert [len(chance["top_logprobs"]) for chance in answer["logprobs"]] == [2, 2]
    found = json.loads(line("conversations", "list", "hi", "--json"))["conversations"]
    kept = json.loads(line("conversations", "show", str(found[0]["id"]), "--json"))
    assert kept["parameters"] == {"max_tokens": 2, "seed": 1, "logprobs": 2}
    assert len(kept["turns"][-1]["chances"]) == 2
    again = json.loads(shell(line, "chat", "qwen", "-c", "more", "--json").stdout)
    assert again["completion_tokens"] == 2
    line("conversations", "delete", str(found[0]["id"]))
    for wrong, words in (
        (["--temperature", "-1"], "temperature must be a number from 0 to 100"),
        (["--schema", str(tmp_path / "none")], "schema cannot be read"),
        (["--preset", "none"], "There is no preset 'none'.\nThere are: short, tools.\n"),
    ):
        done = shell(line, "chat", "qwen", "hi", *wrong)
        assert done.returncode == 2
        assert words in done.stderr
        assert done.stderr.count("\n") == 2


def test_what_a_model_calls_is_written_and_a_cut_call_too(line: CommandLine) -> None:
    whole = json.loads(shell(line, "chat", "qwen", "the weather", "--preset", "tools", "--json").stdout)
    assert (whole["finish_reason"], whole["text"]) == ("tool_calls", "")
    (call,) = whole["tool_calls"]
    assert (call["name"], json.loads(call["arguments"])) == (
        "get_weather",
        {"city": "the weather", "days": 2},
    )
    cut = shell(line, "chat", "qwen", "the weather", "--preset", "tools", "--max-tokens", "3")
    assert cut.stdout == '⚙ get_weather {"city": "the\n'
    assert "cut off: the token limit" in cut.stderr


def test_ctrl_c_stops_an_answer_and_not_the_conversation(line: CommandLine, tmp_path: Path) -> None:
    with talker() as url:
        config = tmp_path / "far.yaml"
        config.write_text(f"models: {{far: {{url: '{url}'}}}}\n")
        environment = line.environment | {"XDG_STATE_HOME": str(tmp_path / "state")}
        terminal = Terminal(
            [*COMMAND, "--config", str(config), "chat", "far"], environment, 80, 24, controlling=True
        )
        try:
            terminal.wait_for("far>")
            for _ in range(2):
                terminal.press("hello\r")
                terminal.wait_for("word1")
                terminal.press("\x03")
                terminal.wait_for("Stopped.", "far>")
            terminal.press("\x04")
            assert terminal.end() == 0
        finally:
            terminal.close()
        kept = CommandLine(config, tmp_path / "state")("conversations", "list", "word1")
        assert kept.endswith("far  hello\n")


def test_the_line_editor_takes_pastes_long_lines_and_earlier_questions(line: CommandLine) -> None:
    """Three pasted lines are one question, 6,004 characters stay 6,004, and what was typed is not lost."""
    command = [*COMMAND, "--config", str(line.config), "chat", "qwen"]
    environment = line.environment | {"XDG_STATE_HOME": str(line.state_home), "TERM": "xterm-256color"}

    def asked_of(terminal: Terminal, keys: str, shown: str) -> None:
        terminal.press(keys)
        terminal.wait_for(shown, "tok/s")

    terminal = Terminal(command, environment, 80, 24, controlling=True)
    try:
        terminal.wait_for("qwen>")
        asked_of(terminal, "\x1b[200~one\rtwo\rthree\x1b[201~\r", "“one two three”")
        asked_of(terminal, "first\nsecond\x1b\rthird\r", "“first second third”")
        asked_of(terminal, "a" * 6004 + "\r", "aaaa”")
        terminal.press("not this\x03")
        asked_of(terminal, "this\r", "“this”")
        terminal.press("\x04")
        assert terminal.end() == 0
    finally:
        terminal.close()
    terminal = Terminal([*command, "-c"], environment, 80, 24, controlling=True)
    try:
        terminal.wait_for("qwen>")
        asked_of(terminal, "\x1b[A\x1b[A\x15again\r", "again”")  # two back, and its end put away
        terminal.press("\x04")
        assert terminal.end() == 0
    finally:
        terminal.close()
    number = line("conversations", "list").split()[0]
    turns = json.loads(line("conversations", "show", number, "--json"))["turns"]
    asked = [turn["text"] for turn in turns if turn["role"] == "user"]
    assert asked == ["one\ntwo\nthree", "first\nsecond\nthird", "a" * 6004, "this", "again"]
