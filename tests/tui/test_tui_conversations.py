"""The chat as a client: conversations that last, the input, and what is asked before anything is done."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pty_terminal import PANEL, Terminal
from screen_text import lines_of, panel, text_of, until, until_seen
from scripted_fleet import ScriptedFleet
from talker import talker
from test_tui_chat import answer, ask
from textual.events import Paste

from tests.command_line import CommandLine
from vllm_sleep_tui.cli.demo import write_demo
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.fleet.snapshot import ChatEvent
from vllm_sleep_tui.fleet.states import State


async def test_the_next_panel_goes_on_where_this_one_ended_and_ctrl_n_begins_anew(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = [
        ChatEvent(model="qwen", reasoning="Hm."),
        *answer("qwen", "I am <b>qwen</b>.", ttft=0.026),
    ]
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "one")
        await until_seen(pilot, "I am <b>qwen</b>.", "TTFT 26 ms")
    async with panel(fleet, tmp_path) as pilot:
        await until_seen(pilot, "one", "thought for", "I am <b>qwen</b>.", "TTFT 26 ms")
        await ask(pilot, "two")
        await until(pilot, lambda: len(fleet.asked) == 2, "the second question")
        assert [turn["content"] for turn in fleet.asked[1][1]] == ["one", "I am <b>qwen</b>.", "two"]
        await pilot.press("ctrl+n")
        await until_seen(pilot, "Nothing said yet.")
        await pilot.press(*"three", "enter")
        await until(pilot, lambda: len(fleet.asked) == 3, "the third question")
        assert [turn["content"] for turn in fleet.asked[2][1]] == ["three"]


async def test_again_and_edit_replace_the_last_question_and_keep_what_was_said(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = answer("qwen", "first answer")
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "q1")
        await until_seen(pilot, "first answer")
        fleet.answers["qwen"] = answer("qwen", "second answer")
        await pilot.press("ctrl+r")
        await until_seen(pilot, "second answer")
        assert "first answer" not in text_of(pilot.app)
        assert fleet.asked[1][1] == [{"role": "user", "content": "q1"}]
        await pilot.press("ctrl+t")
        await until_seen(pilot, "That answer was not cut.")
        fleet.answers["qwen"] = [
            ChatEvent(model="qwen", text="third answer"),
            ChatEvent(model="qwen", finish_reason="length"),
        ]
        await pilot.press("ctrl+l")
        await until_seen(pilot, "⏎ replace the last question")
        await pilot.press("x", "enter")
        await until_seen(pilot, "q1x", "third answer", "⏎ send")
        assert fleet.asked[2][1] == [{"role": "user", "content": "q1x"}]
        fleet.answers["qwen"] = answer("qwen", "more")
        await pilot.press("ctrl+t")
        await until(pilot, lambda: len(fleet.asked) == 4, "the question to go on")
        assert [turn["role"] for turn in fleet.asked[3][1]] == ["user", "assistant", "user"]
        store = pilot.app.conversations  # type: ignore[attr-defined]
        kept = store.latest("qwen").result()
        texts = [turn.text for turn in store.turns(kept.id).result()]
        assert texts[:6] == ["q1", "first answer", "q1", "second answer", "q1x", "third answer"]
        assert kept.turns == 2  # q1x, and to go on: what was replaced is none


async def test_an_answer_stays_where_the_person_does_not_agree_to_what_asking_again_costs(
    tmp_path: Path,
) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = answer("qwen", "first answer")
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "q1")
        await until_seen(pilot, "first answer")
        fleet.change("qwen", state=State.ASLEEP, level=1)
        fleet.change("phi", state=State.AWAKE)
        await pilot.press("ctrl+r")
        await until_seen(pilot, "Switch to qwen?")
        await pilot.press("escape")
        await until_seen(pilot, "first answer")
        assert len(fleet.asked) == 1
        await pilot.press("ctrl+r")
        await until_seen(pilot, "Switch to qwen?")
        await pilot.press("y")
        await until(pilot, lambda: len(fleet.asked) == 2, "the question again")
        assert fleet.asked[1][1] == [{"role": "user", "content": "q1"}]


async def test_an_edited_question_that_was_not_asked_still_replaces_the_last(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = answer("qwen", "first answer")
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "q1")
        await until_seen(pilot, "first answer")
        fleet.change("qwen", state=State.ASLEEP, level=1)
        fleet.change("phi", state=State.AWAKE)
        await pilot.press("ctrl+l", "x", "enter")
        for _ in range(2):
            await until_seen(pilot, "Switch to qwen?")
            await pilot.press("escape")
            await until_seen(pilot, "⏎ replace the last question", "first answer")
            await pilot.press("enter")
        await until_seen(pilot, "Switch to qwen?")
        await pilot.press("y")
        await until(pilot, lambda: len(fleet.asked) == 2, "the edited question")
        assert fleet.asked[1][1] == [{"role": "user", "content": "q1x"}]


async def test_what_cannot_be_kept_is_told(tmp_path: Path) -> None:
    (tmp_path / "conversations.db").mkdir()
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = answer("qwen", "an answer all the same")
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "q1")
        await until_seen(pilot, "an answer all the same", "Conversations cannot be kept")


async def test_lines_earlier_questions_and_a_long_paste(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = answer("qwen", "ok")
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("c", *"ab", "ctrl+j", *"cd", "alt+enter", *"ef", "enter")
        await until(pilot, lambda: fleet.asked, "the question")
        assert fleet.asked[0][1][0]["content"] == "ab\ncd\nef"
        long = "line of a pasted file\n" * 5000
        pilot.app.post_message(Paste(long))
        await until(pilot, lambda: "pasted file" in text_of(pilot.app), "the paste")
        await pilot.press("enter")
        await until(pilot, lambda: len(fleet.asked) == 2, "the long question")
        assert fleet.asked[1][1][-1]["content"] == long.strip()
        await pilot.press(*"draft", "up", "up", "up")
        await until(pilot, lambda: pilot.app.screen.query_one("#question").text != "draft", "an earlier one")  # type: ignore[attr-defined]


async def test_the_line_above_the_input_says_what_an_answer_costs_before_it_is_asked(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    async with panel(fleet, tmp_path) as pilot:
        await until_seen(pilot, "qwen ● awake")
        await pilot.press("down")
        await until_seen(pilot, "phi ◐ asleep", "about 0.53 s, puts qwen to sleep")
        await pilot.press("end")
        await until_seen(pilot, "vision ○ stopped", "about 52 s, puts qwen to sleep")
        await ask(pilot, "hi")
        await until_seen(pilot, "Start vision?")
        await pilot.press("escape")
        await until(pilot, lambda: "Start vision?" not in text_of(pilot.app), "the end of the question")
        assert fleet.asked == []
        await until(pilot, lambda: any("hi" in line for line in lines_of(pilot.app)[-6:]), "it in the input")


async def test_an_eviction_that_was_agreed_to_is_not_asked_about_again(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["phi"] = answer("phi", "done")
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("down")
        await until_seen(pilot, "Chat with phi")
        await ask(pilot, "a")
        await until_seen(pilot, "Switch to phi?")
        await pilot.press("y")
        await until(pilot, lambda: len(fleet.asked) == 1, "the first question")
        await until_seen(pilot, "done")
        await pilot.press(*"b", "enter")
        await until(pilot, lambda: len(fleet.asked) == 2, "the second one, without being asked")


async def test_a_full_context_is_a_choice_and_no_dead_end(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = [
        ChatEvent(model="qwen", text="word " * 40, prompt_tokens=400, completion_tokens=100),
        ChatEvent(model="qwen", finish_reason="stop"),
        ChatEvent(model="qwen", context_tokens=1000),
    ]
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "q1")
        await until_seen(pilot, "ctx 500/1.0k")
        fleet.answers["qwen"][0] = ChatEvent(
            model="qwen", text="word " * 40, prompt_tokens=800, completion_tokens=100
        )
        await pilot.press(*"q2", "enter")
        await until_seen(pilot, "ctx 900/1.0k")
        await pilot.press(*"q3", "enter")
        await until_seen(pilot, "The context is full")
        await pilot.press("d")
        await until(pilot, lambda: len(fleet.asked) == 3, "the question without the oldest")
        assert [turn["content"] for turn in fleet.asked[2][1] if turn["role"] == "user"] == ["q2", "q3"]
        await until(pilot, lambda: not pilot.app.dashboard.is_answering, "the answer")  # type: ignore[attr-defined]
        await pilot.press(*"q4", "enter")
        await until_seen(pilot, "The context is full")
        await pilot.press("n")
        await until(pilot, lambda: len(fleet.asked) == 4, "the question in a new conversation")
        assert [turn["content"] for turn in fleet.asked[3][1]] == ["q4"]


async def test_a_refused_question_goes_back_into_the_input(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = [OperationError("The prompt is too long.", "Shorten it.")]
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "my question")
        await until_seen(pilot, "The prompt is too long.")
        text = pilot.app.screen.query_one("#question").text  # type: ignore[attr-defined]
        assert text == "my question"


async def test_z_gives_the_chat_the_whole_screen_and_the_input_scrolls_it(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = answer("qwen", *(f"line {number}\n\n" for number in range(200)))
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("z")
        await until(pilot, lambda: "Models" not in text_of(pilot.app), "the zoom")
        await ask(pilot, "q")
        await until_seen(pilot, "line 199")
        await pilot.press("pageup", "pageup", "x")
        await until(pilot, lambda: "line 199" not in text_of(pilot.app), "what was said before")
        await until_seen(pilot, "x", "─ new ^n ─")
        await pilot.press("escape", "z")
        await until_seen(pilot, "Models", "Chat with qwen", "─ new ^n · all h · ask p · zoom z ─")


async def test_at_80_by_24_a_death_is_told_in_the_chat_too(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = answer("qwen", "hello")
    async with panel(fleet, tmp_path, size=(80, 24)) as pilot:
        await ask(pilot, "q")
        await until_seen(pilot, "hello")
        fleet.change("qwen", state=State.FAILED, reason="CUDA ran out of memory.", cure="Restart it (r).")
        await until_seen(pilot, "qwen: failed; key n says why", "qwen ✗ failed")


async def test_a_model_that_others_use_all_night_does_not_bury_what_was_said(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = answer("qwen", "hello")
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "q")
        await until_seen(pilot, "hello")
        for level in (0, 1, 2):
            fleet.change("qwen", state=State.ASLEEP, level=level)
            await until_seen(pilot, f"qwen: asleep L{level}")
            fleet.change("qwen", state=State.AWAKE, level=None)
            await until_seen(pilot, "qwen ● awake")
        assert text_of(pilot.app).count("qwen: asleep") == 1


def test_keys_typed_right_after_c_are_a_question_and_put_nobody_to_sleep(tmp_path: Path) -> None:
    config = write_demo(tmp_path / "demo", 1000)
    line = CommandLine(config, tmp_path / "state")
    environment = {
        **os.environ,
        **line.environment,
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "TERM": "xterm-256color",
        "COLORTERM": "truecolor",
    }
    line("start", "qwen")
    for width, height in ((120, 40), (80, 24)):
        terminal = Terminal([*PANEL, "--config", str(config)], environment, width, height)
        try:
            terminal.wait_for("qwen", "awake")
            terminal.press("cs0x1ws\x1b\rnext")
            terminal.wait_for("cs0x1ws"[1:], "next")
            terminal.process.terminate()
            assert terminal.end() == 0
        finally:
            terminal.close()
        assert line.status()["qwen"]["state"] == "awake"
    line("stop", "qwen")
    line.close()


async def test_conversations_are_found_gone_on_with_renamed_exported_and_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fleet = ScriptedFleet()
    fleet.answers = {"qwen": answer("qwen", "The sea is <blue>."), "phi": answer("phi", "I am phi.")}
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "sea?")
        await until_seen(pilot, "The sea is <blue>.")
        fleet.answers["qwen"] = answer("qwen", "Something else.")
        await pilot.press("ctrl+n", *"other", "enter")
        await until(pilot, lambda: len(fleet.asked) == 2, "the other question")
        await until(pilot, lambda: not pilot.app.dashboard.is_answering, "its answer")  # type: ignore[attr-defined]
        await pilot.press("escape", "h")
        await until_seen(pilot, "Conversations", "sea?", "other · 1", "x delete  e export  J as JSON ─")
        await pilot.resize_terminal(60, 20)
        await until_seen(pilot, "─ esc back  ⏎ open  / find  r rename  x delete ─")  # whole keys
        await pilot.resize_terminal(120, 40)
        await pilot.press("slash", *"blue")
        await until(pilot, lambda: not any("other · 1" in line for line in lines_of(pilot.app)), "the search")
        await until_seen(pilot, "/ blue")
        await pilot.press("enter", "e")
        await until_seen(pilot, "Exported as")
        assert "## qwen\n\nThe sea is <blue>." in (tmp_path / "sea.md").read_text()
        assert (tmp_path / "sea.md").stat().st_mode & 0o777 == 0o600
        await pilot.press("J")
        await until(pilot, lambda: (tmp_path / "sea.json").exists(), "the export as JSON")
        await pilot.press("r", "end", "x")
        await until_seen(pilot, "title sea?x")
        await pilot.press("enter")
        await until_seen(pilot, "sea?x · 1")  # in the list, the input being left
        await pilot.press("enter")
        await until_seen(pilot, "Chat with qwen", "The sea is <blue>.")
        await pilot.press("h")
        await until_seen(pilot, "sea?x", "other")
        await pilot.press("home", "x")
        await until_seen(pilot, "Delete this conversation?")
        await pilot.press("y")
        await until(pilot, lambda: len(pilot.app.conversations.listed().result()) == 1, "it is gone")  # type: ignore[attr-defined]


def test_a_question_is_written_in_the_persons_editor_and_the_panel_comes_back(tmp_path: Path) -> None:
    with talker() as url:
        config = tmp_path / "c.yaml"
        config.write_text(f"models: {{far: {{url: '{url}'}}}}\n")
        editor = tmp_path / "editor"
        editor.write_text('#!/bin/sh\necho "from the editor" >> "$1"\n')
        editor.chmod(0o755)
        environment = {
            **os.environ,
            "XDG_STATE_HOME": str(tmp_path / "state"),
            "EDITOR": str(editor),
            "TERM": "xterm-256color",
        }
        environment.pop("VISUAL", None)
        terminal = Terminal([*PANEL, "--config", str(config)], environment, 100, 30)
        try:
            terminal.wait_for("far", "awake")
            terminal.press("c")
            terminal.wait_for("leave the input")
            terminal.press("typed ")
            terminal.wait_for("typed")
            terminal.press("\x07")
            terminal.wait_for("from the editor", "Chat with")
            terminal.press("\r")
            terminal.wait_for("word1")
            terminal.process.terminate()
            assert terminal.end() == 0
        finally:
            terminal.close()


def test_an_editor_that_fails_leaves_the_panel_and_the_question_as_they_were(tmp_path: Path) -> None:
    with talker() as url:
        config = tmp_path / "c.yaml"
        config.write_text(f"models: {{far: {{url: '{url}'}}}}\n")
        environment = {
            **os.environ,
            "XDG_STATE_HOME": str(tmp_path / "state"),
            "VISUAL": "false",
            "TERM": "xterm-256color",
        }
        terminal = Terminal([*PANEL, "--config", str(config)], environment, 100, 30)
        try:
            terminal.wait_for("far", "awake")
            terminal.press("c")
            terminal.wait_for("leave the input")
            terminal.press("typed ")
            terminal.wait_for("typed")
            terminal.press("\x07")
            terminal.wait_for("false ended with 1", "typed")
            terminal.press("and more")
            terminal.wait_for("typed and more")
            terminal.process.terminate()
            assert terminal.end() == 0
        finally:
            terminal.close()


async def test_d_asks_another_model_the_same_and_compares_and_the_first_answer_is_gone_on_with(
    tmp_path: Path,
) -> None:
    fleet = ScriptedFleet()
    fleet.answers = {
        "qwen": answer("qwen", "one two three four", ttft=0.026),
        "phi": answer("phi", "one two three five", switch_seconds=0.36, ttft=0.03),
    }
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("d")
        await until_seen(pilot, "Ask qwen something first")
        await ask(pilot, "count")
        await until_seen(pilot, "one two three four")
        await pilot.press("escape", "d")
        await until_seen(pilot, "Ask another model the same", "about 0.53 s, puts qwen to sleep")
        await pilot.press("enter")
        await until_seen(pilot, "Switch to phi?")
        await pilot.press("y")
        await until_seen(pilot, "w words that differ", "one two three four", "one two three five")
        await pilot.press("escape")
        await until_seen(pilot, "Chat with qwen", "75 % of the words are the same")
        await until_seen(pilot, "TTFT 26 ms", "woke in 0.36 s · TTFT 30 ms")
        assert fleet.asked[1] == ("phi", [{"role": "user", "content": "count"}])
        await pilot.press("c", *"on", "enter")
        await until(pilot, lambda: len(fleet.asked) == 3, "the next question")
        assert [turn["content"] for turn in fleet.asked[2][1]] == ["count", "one two three four", "on"]
