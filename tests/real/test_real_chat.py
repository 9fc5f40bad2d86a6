"""A conversation in the panel with a real model, gone on with after the panel was killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator

import pytest
from command_line import CommandLine, wait_until

from tests.real.conftest import command_line, model_config
from tests.tui.pty_terminal import Terminal

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def panel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """smollm2, awake."""
    made = command_line(tmp_path_factory.mktemp("chat"), {"smollm2": model_config("smollm2")})
    made("switch", "smollm2")
    yield made
    made.close()


def opened(panel: CommandLine) -> Terminal:
    environment = {
        **os.environ,
        "XDG_STATE_HOME": str(panel.state_home),
        "TERM": "xterm-256color",
        "COLORTERM": "truecolor",
    }
    command = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(panel.config)]
    terminal = Terminal(command, environment, 120, 40)
    terminal.wait_for("smollm2", "awake")
    return terminal


def ask(terminal: Terminal, question: str, *shown: str) -> None:
    terminal.press("c")
    terminal.wait_for("leave the input")
    terminal.press(question)
    terminal.wait_for(question[-3:])
    terminal.press("\r")
    terminal.wait_for(*shown)


def kept(panel: CommandLine) -> str:
    """The conversation as it is on disk; empty before there is one."""
    listed = panel("conversations", "list", "capital").split()
    return panel("conversations", "show", listed[0]) if listed else ""


def test_a_conversation_is_gone_on_with_after_the_panel_was_killed(panel: CommandLine) -> None:
    first = opened(panel)
    try:
        ask(first, "What is the capital of France?", "Paris", "TTFT", "ctx")
        # What is shown is written down a moment later.
        wait_until(lambda: "Paris" in kept(panel), seconds=30, what="the answer on disk")
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait()
    finally:
        first.close()
    second = opened(panel)
    try:
        second.wait_for("What is the capital of France?", "Paris")
        ask(second, "And what is <b>2+2</b>?", "<b>2+2</b>", "TTFT")
        second.process.terminate()
        assert second.end() == 0
    finally:
        second.close()
    wait_until(lambda: kept(panel).count("## smollm2") == 2, seconds=30, what="the second one")
    text = kept(panel)
    assert text.count("## You") == 2
    assert "What is the capital of France?" in text


def test_the_verb_tells_that_an_answer_of_a_real_server_was_cut(panel: CommandLine) -> None:
    done = panel.run("chat", "smollm2", "Tell a long story.", "--max-tokens", "5")
    assert done.returncode == 0, done.stderr
    assert "cut off: the token limit was reached" in done.stderr


def test_a_real_server_answers_as_it_is_asked(panel: CommandLine) -> None:
    city = {"type": "string", "maxLength": 12}
    schema = json.dumps({"type": "object", "properties": {"city": city}, "required": ["city"]})
    asked = ("--schema", schema, "--max-tokens", "60", "--seed", "1", "--logprobs", "2", "--json")
    answer = json.loads(panel("chat", "smollm2", "Name the capital of France.", *asked))
    assert set(json.loads(answer["text"])) >= {"city"}
    told = "".join(chance["token"] for chance in answer["logprobs"]).strip()
    assert told.removesuffix("<|im_end|>") == answer["text"].strip()  # its end is a token, and no word
    assert all(len(chance["top_logprobs"]) == 2 for chance in answer["logprobs"])
